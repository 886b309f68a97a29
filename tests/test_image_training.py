"""Image data in training: one copy in memory, the same batches on host and device, every agent's update on them.

How frames are stacked and cropped is `test_datasets.py`'s, where images come from `test_visual.py`'s.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agents
import envs
from benchmarks import image_memory
from tests import tiny, tiny_agents
from utils import batches, datasets, resume, saved_policy, training
from utils.errors import UserError
from utils.normalizers import Normalizer

SEEDS = [0]
FRAME_STACK = 2
VISUAL = 'visual-cube-single-play-singletask-task1-v0'


def image_dataset(labelled):
    """Random 16×16 images of three episodes."""
    rng = np.random.default_rng(0)
    rows = 36
    raw = {
        'observations': rng.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8),
        'actions': rng.uniform(-0.9, 0.9, (rows, tiny.ACTION_DIM)).astype(np.float32),
        'terminals': np.arange(1, rows + 1) % 12 == 0,
    }
    if labelled:
        raw |= {'rewards': rng.choice(np.float32([-1, 0]), rows), 'masks': np.ones(rows, np.float32)}
    return tiny.make_dataset(raw, frame_stack=FRAME_STACK, p_aug=0.5)


def create(name, dataset, make=training.create_agents):
    config = tiny_agents.make_config(name, images=True)
    return make(agents.load(name).AGENT, SEEDS, datasets.example_batch(dataset), config)


@pytest.mark.parametrize('name', sorted(set(agents.available()) - {'mbpo_rebrac'}))
def test_every_agent_takes_the_batches_of_an_image_data_set(name):
    """Traced, not computed: the values of an update on images are `test_agents.py`'s."""
    unlabelled, labelled = image_dataset(labelled=False), image_dataset(labelled=True)
    fresh = create(name, unlabelled, training.describe_agents)
    keys = training.stream_keys(SEEDS, 'pretraining')
    batch = jax.eval_shape(lambda: datasets.sample(labelled, jax.random.key(0), 4, fresh.needs))
    images = [value for value in batch.values() if value.ndim == 4]
    assert len(images) >= 3 and all(value.dtype == np.uint8 and value.shape[-1] == 6 for value in images)
    for phase, dataset in (('pretraining', unlabelled), ('finetuning', labelled)):
        updated, metrics = jax.eval_shape(
            lambda fresh, dataset=dataset, phase=phase: training.train_chunk(
                fresh, dataset, keys, jnp.int32(0), phase=phase, n=2
            ),
            fresh,
        )
        assert jax.tree.map(jnp.shape, updated) == jax.tree.map(jnp.shape, fresh)
        assert metrics


@pytest.mark.slow
def test_an_update_on_images_is_the_same_from_the_host():
    """InFOM, computed: one update on the device's data and one on batches drawn on the host."""
    dataset = image_dataset(labelled=False)
    keys = training.stream_keys(SEEDS, 'pretraining')
    results = []
    for source in (
        batches.DeviceBatches(dataset, 1),
        batches.HostBatches(dataset, 1, agents=create('infom', dataset), keys=keys, block=1),
    ):
        before = create('infom', dataset)
        encoders = jax.device_get(before.params['encoder'])
        after, metrics = training.train_chunk(before, source.chunk(0), keys, jnp.int32(0), phase='pretraining', n=1)
        source.close()
        assert all(np.isfinite(mean).all() for mean, _ in metrics.values())
        moved = jax.tree.map(lambda one, two: np.abs(one - two).max(), encoders, after.params['encoder'])
        assert min(jax.tree.leaves(moved)) > 0
        results.append(jax.device_get(after.params))
    for one, two in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.slow
def test_a_frame_is_in_memory_once():
    """From file to trained agent: at most 1.15 times the pixels a frame; a second copy would make it 2."""
    frames = 16_000
    peaks = [image_memory.measure(n, 'iql', 'device') for n in (image_memory.SMALL_FRAMES, frames)]
    each = image_memory.per_frame(*peaks, frames - image_memory.SMALL_FRAMES)
    assert 0.5 < each['host_bytes'] / image_memory.FRAME_BYTES < 1.15


def test_a_checkpoint_of_other_stacks_is_refused():
    task = envs.task_spec(VISUAL)
    meta = {
        'domain': task.domain, 'num_seeds': 1, 'agent_name': 'infom', 'agent_config': {}, 'frame_stack': 3,
        'normalizer': {'kind': 'none'},
    }  # fmt: skip
    agent = tiny_agents.make_config('infom', images=True)
    config = types.SimpleNamespace(num_seeds=1, agent_name='infom', agent=agent, frame_stack=3, obs_norm_type='none')
    resume.check_compatible(meta, task, config, 'run')
    config.frame_stack = 1
    with pytest.raises(UserError, match='frame_stack=3, now it is 1'):
        resume.check_compatible(meta, task, config, 'run')


def test_a_saved_policy_takes_stacked_frames(tmp_path, monkeypatch):
    """The template of the parameters has the run's number of channels."""
    seen = {}
    monkeypatch.setattr(saved_policy.checkpoints, 'resolve', lambda path: path)
    meta = {'agent_name': 'infom', 'seed': 0, 'num_seeds': 1, 'frame_stack': 3, 'agent_config': {}}
    meta['normalizer'] = Normalizer('none').to_dict()
    monkeypatch.setattr(saved_policy.checkpoints, 'load_meta', lambda path: meta)
    monkeypatch.setattr(saved_policy.checkpoints, 'restore', lambda path, template, optional: template)
    monkeypatch.setattr(
        saved_policy.training,
        'describe_agents',
        lambda agent, seeds, example, config: seen.update(example) or np.zeros(1),
    )
    saved_policy.load_policy(tmp_path, envs.task_spec(VISUAL))
    assert seen['observations'].shape == (1, 64, 64, 9) and seen['observations'].dtype == np.uint8
