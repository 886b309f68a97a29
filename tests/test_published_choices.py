"""What the published code does otherwise and a user may choose: one Adam over all modules, a normaliser for every file,
next actions across the ends of episodes; and the preset that chooses all of it, InFOM's own included."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agents
from tests import tiny_agents
from tests.test_datasets import IDENTITY, NEXT, numbered
from tests.test_experiment import load_raw, make_config, make_experiment
from utils import datasets, presets, training
from utils.normalizers import Normalizer

KEY = jax.random.key(5)


@pytest.mark.parametrize('joint', [True, False])
def test_joint_adam_is_one_adam_over_all_parameters(joint):
    batch = tiny_agents.make_batch()
    agent = tiny_agents.make_agent('iql', batch, joint_adam=joint)
    start = agent.params
    with_actor = jax.jit(lambda agent: agent.finetune(batch, KEY, update_actor=True)[0])(agent)
    after = jax.jit(lambda agent: agent.finetune(batch, KEY, update_actor=False)[0])(with_actor)

    # The reference: a single optimiser whose second step finds no gradient for the actor.
    adam = optax.adam(agent.config.lr)

    def step(agent, params, state, update_actor):
        loss = lambda params: agent.finetuning_loss(params, batch, KEY, update_actor)[0]  # noqa: E731
        updates, state = adam.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params, state = step(agent, start, adam.init(start), True)
    params, _ = step(with_actor, params, state, False)
    coasted = jnp.abs(with_actor.params['actor']['mean']['bias'] - after.params['actor']['mean']['bias']).max()
    if joint:
        assert coasted > 1e-5
        for module in params:
            jax.tree.map(
                lambda ours, expected: np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6),
                after.params[module],
                params[module],
            )
    else:
        assert coasted == 0


def test_next_actions_across_episodes():
    """Rows 3 and 6 end episodes: the transition into such a row takes the following row's action, and the last one of
    all wraps around."""
    dataset = datasets.Dataset.create(numbered([4, 3]), IDENTITY, next_actions_across_episodes=True)
    rows = dataset.transition_rows
    np.testing.assert_array_equal(rows, [0, 1, 2, 4, 5])
    batch = datasets.gather_batch(jax.tree.map(jnp.asarray, dataset), jnp.asarray(rows), NEXT)
    np.testing.assert_array_equal(np.round(batch['next_actions'][:, 0] * 7), [1, 2, 4, 5, 0])
    sampled = datasets.sample_rows(dataset, KEY, 200, NEXT)
    np.testing.assert_array_equal(np.unique(sampled), rows)


@pytest.mark.parametrize(
    ('label', 'agent', 'warned'), [(-2.0, 'infom', True), (0.0, 'infom', False), (-2.0, 'rebrac', False)]
)
def test_ends_whose_labels_count_for_ever(tmp_path, caplog, label, agent, warned):
    def ended(phase, split, size):
        raw = load_raw(phase, split, size)
        if phase == 'finetuning':
            raw['rewards'][14], raw['masks'][14] = label, 0.0  # The last transition of the first episode.
        return raw

    with make_experiment(make_config(tmp_path, f'--agent=agents/{agent}.py'), load=ended) as experiment:
        experiment._load_phase('pretraining')
        assert 'counts for ever' not in caplog.text
        experiment._load_phase('finetuning')
    assert ('labels other than 0, of -2 on average' in caplog.text) == warned


@pytest.mark.parametrize('per_split', [True, False])
def test_a_normaliser_for_every_file(tmp_path, per_split):
    def shifted(phase, split, size):
        raw = load_raw(phase, split, size)
        offset = {'pretraining': 0, 'finetuning': 100}[phase] + {'train': 0, 'val': 10}[split]
        return {**raw, 'observations': raw['observations'] + np.float32(offset)}

    config = make_config(tmp_path, f'--obs_norm_per_split={per_split}')
    with make_experiment(config, load=shifted) as experiment:
        for phase in ('pretraining', 'finetuning'):
            _, train, validation = experiment._load_phase(phase)
            fitted = Normalizer.fit(shifted(phase, 'train', None)['observations'], config.obs_norm_type)
            if per_split:
                for dataset in (train, validation):
                    np.testing.assert_allclose(dataset.observations.mean(axis=0), 0, atol=1e-3)
            elif phase == 'finetuning':
                assert abs(train.observations.mean()) > 5
            assert (experiment.normalizer.to_dict() == fitted.to_dict()) == (per_split or phase == 'pretraining')


@pytest.mark.parametrize('own_normalizer', [True, False])
def test_flow_samples_are_clipped_to_the_range_of_the_labelled_states(own_normalizer):
    """Where these have a normaliser, and so units, of their own; else the bounds stay those of pre-training."""
    batch = tiny_agents.make_batch()
    dataset = datasets.Dataset.create(
        {**numbered([4, 3]), 'rewards': np.zeros(7, np.float32), 'masks': np.ones(7, np.float32)}, IDENTITY
    )
    dataset = dataset.replace(
        observations=np.linspace(-3, 2, 7 * batch['observations'].shape[1], dtype=np.float32).reshape(7, -1)
    )
    dataset = dataset.replace(actions=np.zeros((7, batch['actions'].shape[1]), np.float32))
    agent = tiny_agents.make_agent('infom', batch)
    seeds = jax.tree.map(lambda x: jnp.stack([x, x]), agent)
    begun = training.begin_finetuning(seeds, dataset, training.stream_keys([0, 1], 'begin_finetuning'), own_normalizer)
    expected = agent.flow_bounds
    if own_normalizer:
        expected = dataset.observations.min(axis=0) + 1e-5, dataset.observations.max(axis=0) - 1e-5
    for seed in range(2):
        for bound, wanted in zip(begun.flow_bounds, expected, strict=True):
            np.testing.assert_allclose(bound[seed], wanted, rtol=1e-6)


def test_the_published_preset_chooses_all_of_it():
    settings = presets.resolve('infom', 'cheetah_run', 'published')
    assert settings.agent['joint_adam'] is True and settings.agent['value_layer_norm'] is False
    assert settings.agent['actor_tau'] == 1
    assert settings.agent['absorbing_ends'] is False and settings.agent['finetuning_schedule'] == 'constant'
    assert settings.flags['obs_norm_per_split'] is True and settings.flags['next_actions_across_episodes'] is True
    # What the table says of LayerNorm wins, and other agents had it on.
    later = presets.resolve('infom', 'cube-single-play-singletask-task3-v0', 'published')
    assert later.agent['value_layer_norm'] is True
    assert 'value_layer_norm' not in presets.resolve('iql', 'cheetah_run', 'published').agent
    paper = presets.resolve('infom', 'cheetah_run', 'paper')
    assert paper.flags['obs_norm_per_split'] is False and 'joint_adam' not in paper.agent
    defaults = agents.load('infom').get_config()
    assert defaults.joint_adam is False and defaults.absorbing_ends is True and defaults.finetuning_schedule == 'cosine'
    same = {key: value for key, value in paper.flags.items() if settings.flags[key] != value}
    assert set(same) == {'obs_norm_per_split', 'next_actions_across_episodes'}
