"""What `test_devices.py` runs in a process with four virtual devices: a mesh changes where things are computed, not
what."""

import functools
import re

import jax
import numpy as np
import pytest

from agents.infom import InFOMAgent
from tests import tiny, tiny_agents
from tests.test_experiment import make_config, run
from utils import batches, checkpoints, datasets, devices, runs, training
from utils.errors import UserError

SEEDS = list(range(8))
MESHES = {'seeds': (4, 1), 'both': (2, 2)}
COLLECTIVES = re.compile(r'\b(all-reduce|all-to-all|collective-permute|reduce-scatter)\b')


@pytest.fixture(scope='module')
def data():
    return {
        phase: tiny.make_dataset(tiny.random_walks(labelled=phase == 'finetuning'))
        for phase in ('pretraining', 'finetuning')
    }


def make_mesh(shape):
    return devices.make_mesh(len(SEEDS), tiny.BATCH_SIZE, *shape)


def train(data, phase, mesh, seeds=SEEDS, on_host=False):
    """Eight updates of fresh agents in two chunks: (agents, metrics of the second, the compiled program)."""
    config, example = tiny_agents.make_config('infom'), datasets.example_batch(data['pretraining'])
    fresh = training.create_agents(InFOMAgent, seeds, example, config)
    agents = devices.place(fresh, mesh, 'seed')
    keys = training.stream_keys(seeds, phase)
    if on_host:
        source = batches.HostBatches(data[phase], 4, agents=agents, keys=keys, block=2)
    else:
        source = batches.DeviceBatches(data[phase], 4, mesh)
    keys = devices.place(keys, mesh, 'seed')
    compiled, _ = training.compile_chunk(agents, source.chunk(0), keys, phase=phase, n=4)
    for start in (0, 4):
        agents, metrics = compiled(agents, source.chunk(start), keys, np.int32(start))
    source.close()
    return agents, metrics, compiled


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-5, rtol=1e-3), a, b)


@pytest.fixture(scope='module')
def alone(data):
    """phase → agents and metrics of one device."""
    return functools.cache(lambda phase: jax.device_get(train(data, phase, None)[:2]))


@pytest.mark.parametrize(
    ('phase', 'shape'),
    [('pretraining', 'seeds'), ('pretraining', 'both'), ('finetuning', 'both')],
)
def test_a_mesh_trains_to_the_same_parameters(data, alone, phase, shape):
    mesh = make_mesh(MESHES[shape])
    agents, metrics, compiled = train(data, phase, mesh)
    kernel = jax.tree.leaves(agents.params)[0]
    over_seeds = MESHES[shape][0]
    assert {shard.data.shape[0] for shard in kernel.addressable_shards} == {8 // over_seeds}
    assert len(kernel.sharding.device_set) == 4
    expected, expected_metrics = alone(phase)
    assert_close(agents.params, expected.params)
    assert_close(metrics, expected_metrics)
    program = compiled.as_text()
    # On a GPU, what is handed on unchanged from one donated buffer to another comes out wrong (jax-ml/jax#39625).
    kept = re.findall(r'\{(\d+)\}: \((\d+), \{\}, may-alias\)', program.splitlines()[0])
    places = [str(place) for place in range(len(jax.tree.leaves(agents)))]
    assert kept == list(zip(places, places, strict=True)), 'every array of an agent keeps its buffer'
    messages = set(COLLECTIVES.findall(program))
    if shape == 'seeds':
        assert not messages, 'seeds have nothing to tell each other'
    else:
        assert 'all-reduce' in messages, 'the gradients of parts of a batch are added up'


def test_a_batch_is_computed_in_parts(data):
    """The arithmetic of one device falls with the batch, not only its share of the seeds."""
    flops = {}
    for shape in ((1, 1), (1, 4)):
        mesh = devices.make_mesh(1, tiny.BATCH_SIZE, *shape)
        flops[shape] = train(data, 'pretraining', mesh, seeds=[0])[2].cost_analysis()['flops']
    assert flops[1, 4] < 0.7 * flops[1, 1]


def test_batches_drawn_on_the_host_are_shared_alike(data, alone):
    agents, _, _ = train(data, 'finetuning', make_mesh((2, 2)), on_host=True)
    assert_close(agents.params, alone('finetuning')[0].params)


def test_a_whole_run_on_a_mesh_equals_one_on_a_device(tmp_path):
    """Four seeds over both axes, evaluated, and resumed half-way on another mesh."""
    small = '--num_seeds=4', '--agent=iql'
    alone = make_config(tmp_path / 'a', *small, '--mesh_seeds=1')
    run(alone, calls=[])
    spread = make_config(tmp_path / 'b', *small, '--mesh_seeds=2', '--mesh_batch=2', '--finetuning_steps=8')
    assert run(spread, calls=[]).mesh.shape == {'seed': 2, 'batch': 2}
    resumed = run(make_config(tmp_path / 'b', *small), calls=[])
    assert resumed.mesh.shape == {'seed': 4, 'batch': 1}, 'seeds are spread first'
    arrays = [checkpoints.read_arrays(config.run_dir / 'checkpoints' / '48') for config in (alone, spread)]
    assert_close(*({k: v for k, v in a.items() if k.startswith('params')} for a in arrays))
    returns = [
        [row['evaluation/episode.return'] for row in rows if 'evaluation/episode.return' in row]
        for rows in (runs.read_metrics(config.run_dir / 'metrics.jsonl') for config in (alone, spread))
    ]
    np.testing.assert_allclose(*returns, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('how', [('--dataset_location=device', '--eval_async'), ('--dataset_location=host',)])
def test_one_accelerator_does_the_work_of_a_run(tmp_path, monkeypatch, how):
    """What was drawn on the host's processor, here the last device, does not keep later work there; from scratch, and
    from a checkpoint."""
    accelerator, host = jax.devices()[0], jax.devices()[3]
    monkeypatch.setattr(batches, 'host_device', lambda: host)
    used = []
    train_chunk = training.compile_chunk

    def compile_and_note(agents, *arguments, **options):
        used.extend(leaf.devices() for leaf in jax.tree.leaves(agents))
        return train_chunk(agents, *arguments, **options)

    monkeypatch.setattr(training, 'compile_chunk', compile_and_note)
    settings = '--agent=fb_iql', '--mesh_seeds=1', '--pretraining_steps=8', *how
    for steps in (8, 16):
        experiment = run(make_config(tmp_path, *settings, f'--finetuning_steps={steps}'), calls=[])
        used += [leaf.devices() for leaf in jax.tree.leaves(experiment.agents)]
    assert experiment.mesh is None
    assert all(devices_of == {accelerator} for devices_of in used)


def test_the_automatic_mesh():
    shapes = {n: devices.make_mesh(n, 256) for n in (1, 2, 3, 6, 8)}
    assert shapes[1] is None, 'one seed takes one device'
    assert [shapes[n].shape['seed'] for n in (2, 3, 6, 8)] == [2, 3, 3, 4]
    assert devices.make_mesh(8, 256, mesh_batch=2).shape == {'seed': 2, 'batch': 2}
    assert devices.make_mesh(8, 256, mesh_seeds=1) is None


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((8, 256, 3), 'mesh_seeds=3 does not divide --num_seeds=8'),
        ((1, 255, 0, 2), 'mesh_batch=2 does not divide --agent.batch_size=255'),
        ((8, 256, 4, 2), 'takes 8 devices, there are 4'),
    ],
)
def test_meshes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        devices.make_mesh(*arguments)
