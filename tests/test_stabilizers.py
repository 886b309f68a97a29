"""The candidates against instability: each changes what it says, and nothing where none is named; and ends that absorb,
which became a default."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agents import common, stabilizers
from agents.common import STEP
from agents.infom import InFOMAgent
from tests import infom_reference as reference
from tests import tiny, tiny_agents
from utils import checkpoints, datasets, training
from utils.errors import UserError

KEY = jax.random.key(11)


@functools.cache
def make_case(name='', **settings):
    """An agent with the stabiliser at the beginning of fine-tuning, and a labelled batch whose third row ends."""
    batch = tiny_agents.make_batch()
    batch['masks'] = batch['masks'].at[2].set(0.0)
    agent = tiny_agents.make_agent('infom', batch, stabilizer=name, **settings)
    return jax.jit(lambda agent: agent.begin_finetuning(batch, KEY))(agent), batch


finetune = jax.jit(lambda agent, batch: agent.finetune(batch, KEY, update_actor=True)[0])


def moved(before, after):
    """Largest change of any parameter in a module's tree."""
    return max(jnp.abs(a - b).max() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def at_step(agent, step):
    return agent.replace(opt_states=agent.opt_states | {STEP: jnp.asarray(step, jnp.int32)})


def test_none_by_default():
    agent, _ = make_case()
    assert type(agent) is InFOMAgent
    assert agent.opt_states.keys() == agent.params.keys() | {common.ACTING_ACTOR, STEP}


def test_a_choice_is_one_class():
    first, _ = make_case('clip_at_end')
    again = tiny_agents.make_agent('infom', tiny_agents.make_batch(), stabilizer='clip_at_end')
    assert type(first) is type(again), 'compiled programs know their agents by class'
    both = stabilizers.stabilized(InFOMAgent, tiny_agents.make_config('infom', stabilizer='clip_at_end+bound_q'))
    assert issubclass(both, stabilizers.ClipAtEnd) and issubclass(both, stabilizers.BoundQ)


@pytest.mark.parametrize('name', ['clip_reward', 'bound_q+bound_q', 'clip_at_end,bound_q', '+'])
def test_what_there_is_not(name):
    with pytest.raises(UserError, match='expected some of clip_rewards, bound_q'):
        tiny_agents.make_agent('infom', tiny_agents.make_batch(), stabilizer=name)


@pytest.mark.slow
def test_chunks_of_two_seeds_with_all_of_them():
    """Both phases run under the loop's transformations, and keep the agents' structure."""
    data = tiny.make_dataset(tiny.random_walks(labelled=True))
    config = tiny_agents.make_config('infom', stabilizer='+'.join(stabilizers.STABILIZERS), schedule_steps=4)
    agents = training.create_agents(InFOMAgent, [0, 1], datasets.example_batch(data), config)
    keys = training.stream_keys([0, 1], 'finetuning')
    agents, _ = training.train_chunk(agents, data, keys, 0, phase='pretraining', n=2)
    agents = training.begin_finetuning(agents, data, keys)
    agents, metrics = training.train_chunk(agents, data, keys, 0, phase='finetuning', n=4)
    assert all(np.isfinite(mean).all() for mean, _ in metrics.values())
    np.testing.assert_array_equal(agents.opt_states[STEP], [4, 4])
    lowest, highest = agents.opt_states[stabilizers.REWARD_RANGE]
    labels = data.rewards[data.transition_rows]
    assert (lowest >= labels.min()).all() and (highest <= labels.max()).all() and (lowest < highest).all()


@pytest.mark.parametrize(('before', 'after'), [('', 'clip_rewards'), ('clip_rewards', '')])
def test_any_pretraining_fits_any_of_them(tmp_path, before, after):
    """What they keep in fine-tuning is not asked of a pre-training's checkpoint, all else is."""
    batch = tiny_agents.make_batch()
    saved, template = (tiny_agents.make_agent('infom', batch, stabilizer=name) for name in (before, after))
    saved = saved.replace(params=jax.tree.map(lambda x: x + 1, saved.params))
    with checkpoints.CheckpointWriter(tmp_path) as writer:
        writer.save(1, saved, {'phase': 'pretraining'})
    restored = checkpoints.restore(tmp_path, template, InFOMAgent.finetuning_state)
    jax.tree.map(np.testing.assert_array_equal, restored.params, saved.params)
    kept = restored.opt_states.keys() & set(stabilizers.STATE)
    assert kept == (set(stabilizers.STATE) if after else set())
    for name in kept:
        jax.tree.map(np.testing.assert_array_equal, restored.opt_states[name], template.opt_states[name])
    with pytest.raises(UserError, match=r'opt_states\.reward_range'):
        checkpoints.restore(tmp_path, template)


def test_clipped_rewards():
    agent, batch = make_case('clip_rewards')
    lowest, highest = batch['rewards'].min(), batch['rewards'].max()
    np.testing.assert_array_equal(agent.reward_range, (lowest, highest))
    agent = agent._with_range(jnp.asarray(-0.1), jnp.asarray(0.1))
    plain = agent.networks.reward.apply({'params': agent.params['reward']}, batch['observations'])
    assert (jnp.abs(plain) > 0.1).any()
    clipped = agent.predicted_rewards(agent.params, batch['observations'])
    np.testing.assert_allclose(clipped, jnp.clip(plain, -0.1, 0.1), rtol=1e-5)
    targets = agent.q_targets(agent.params, batch, KEY)
    assert jnp.abs(targets).max() <= 0.1 / (1 - agent.config.discount) * 1.001

    # What learns is the unclipped prediction: even where all labels lie at a bound and R beyond it, it is called back.
    batch = {**batch, 'rewards': jnp.full_like(batch['rewards'], 0.1)}
    grads = jax.grad(lambda params: agent.reward_loss(params, batch)[0])(agent.params)['reward']
    errors = 2 * (plain - batch['rewards']) / len(plain)
    outputs = lambda params: agent.networks.reward.apply({'params': params}, batch['reward_observations'])  # noqa: E731
    (expected,) = jax.vjp(outputs, agent.params['reward'])[1](errors)
    jax.tree.map(lambda ours, other: np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-6), grads, expected)


def test_the_range_of_labels_grows():
    agent, batch = make_case('clip_rewards')
    wider = finetune(agent, {**batch, 'rewards': batch['rewards'].at[0].set(7.0)})
    np.testing.assert_array_equal(wider.reward_range, (batch['rewards'].min(), 7.0))
    narrower = finetune(wider, {**batch, 'rewards': jnp.zeros_like(batch['rewards'])})
    np.testing.assert_array_equal(narrower.reward_range, wider.reward_range)


def test_bounded_values():
    agent, batch = make_case('bound_q')
    plain, _ = make_case()
    bounded = agent._with_range(jnp.asarray(-0.01), jnp.asarray(0.02))
    lowest, highest = -0.01 / (1 - agent.config.discount), 0.02 / (1 - agent.config.discount)
    targets = plain.q_targets(plain.params, batch, KEY)
    assert (targets < lowest).any() or (targets > highest).any()
    np.testing.assert_allclose(
        bounded.q_targets(bounded.params, batch, KEY), jnp.clip(targets, lowest, highest), rtol=1e-4
    )
    qs = plain.q_values(batch['observations'], batch['actions'])
    np.testing.assert_allclose(
        bounded.q_values(batch['observations'], batch['actions']), jnp.clip(qs, lowest, highest), rtol=1e-4
    )


def test_clipping_at_the_end():
    agent, batch = make_case('clip_at_end')
    config, params, batch64 = agent.config, reference.float64(agent.params), reference.float64(batch)
    noise, z = (np.asarray(jax.random.normal(KEY, (tiny.BATCH_SIZE, size))) for size in (tiny.STATE_DIM, 4))
    s, a = batch64['observations'], batch64['actions']
    futures = agent.sample_futures(agent.params, noise, agent.condition(agent.params, s, a, z))
    unclipped = reference.euler(params['vector_field'], config, None, noise, s, a, z)
    lower, upper = (np.float64(bound) for bound in agent.flow_bounds)
    np.testing.assert_allclose(futures, np.clip(unclipped, lower, upper), rtol=1e-4, atol=1e-5)
    stepwise = reference.euler(params['vector_field'], config, tiny.OBSERVED_RANGE, noise, s, a, z)
    assert np.abs(futures - stepwise).max() > 1e-3


@pytest.mark.parametrize('reward_at', ['observations', 'next_observations'])
def test_absorbing_ends(reward_at):
    agent, batch = make_case()
    batch = {**batch, 'reward_observations': batch[reward_at]}
    plain, _ = make_case(absorbing_ends=False)
    z = jax.random.normal(KEY, (tiny.BATCH_SIZE, 4))
    times = jax.random.uniform(KEY, (tiny.BATCH_SIZE, 1))
    x, target = agent.future_term(batch, z, times, KEY)
    x_plain, target_plain = plain.future_term(batch, z, times, KEY)
    others = np.arange(tiny.BATCH_SIZE) != 2
    np.testing.assert_array_equal(x[others], x_plain[others])
    np.testing.assert_array_equal(target[others], target_plain[others])
    # Straight from the noise to s̃: the velocity is constant, and leads from x_t to s̃ in the time that is left.
    ending = batch['reward_observations'][2]
    np.testing.assert_allclose(x[2] + (1 - times[2]) * target[2], ending, rtol=1e-5, atol=1e-6)
    assert np.abs(x_plain[2] + (1 - times[2]) * target_plain[2] - ending).max() > 1e-2
    # Reward-free data end nothing.
    del batch['reward_observations']
    np.testing.assert_array_equal(agent.future_term(batch, z, times, KEY), plain.future_term(batch, z, times, KEY))


def test_the_expectile_rises():
    agent, batch = make_case('anneal_expectile', schedule_steps=100, expectile=0.9)
    plain, _ = make_case(expectile=0.9)
    targets = plain.q_targets(plain.params, batch, KEY)
    qs = plain.networks.critic.apply({'params': plain.params['critic']}, batch['observations'], batch['actions'])
    for at, expectile in ((0, 0.5), (50, 0.7), (100, 0.9), (200, 0.9)):
        loss, _ = at_step(agent, at).critic_loss(agent.params, batch, KEY)
        np.testing.assert_allclose(loss, common.expectile_loss(targets[:, None] - qs, expectile).mean(), rtol=1e-4)


def test_clipped_gradients():
    agent, batch = make_case('clip_gradients')
    plain, _ = make_case()

    def gradient(agent):  # Adam's first moment after one step is 0.1 times the gradient.
        states = finetune(agent, batch).opt_states
        return {name: states[name][0].mu for name in agent.params}

    clipped, full = gradient(agent), gradient(plain)
    assert optax.tree.norm(full) > 0.11
    np.testing.assert_allclose(optax.tree.norm(clipped), 0.1, rtol=1e-4)
    ratio = 0.1 / optax.tree.norm(full)
    jax.tree.map(lambda ours, other: np.testing.assert_allclose(ours, ratio * other, atol=1e-6), clipped, full)


def test_layer_norm_of_the_critic_alone():
    def norms(agent, module):
        return sum(
            'norm' in jax.tree_util.keystr(path).lower() for path, _ in jax.tree.leaves_with_path(agent.params[module])
        )

    for field, critic in ((True, False), (False, True), (True, None)):
        agent, _ = make_case(value_layer_norm=field, critic_layer_norm=critic)
        assert bool(norms(agent, 'vector_field')) == field
        assert bool(norms(agent, 'critic')) == (field if critic is None else critic)


def test_no_config_knows_of_another_ones_settings():
    """A placeholder is a reference, and configs that shared one would share what is set."""
    tiny_agents.make_config('infom', critic_layer_norm=False, actor_lr=1.0, num_critic_latents=3, schedule_steps=5)
    later = tiny_agents.make_config('infom')
    assert [later[key] for key in ('critic_layer_norm', 'actor_lr', 'num_critic_latents', 'schedule_steps')] == [
        None
    ] * 4


def test_one_adam_decays_only_what_learns():
    """The learned reward has no gradient in pre-training: it must not shrink there, whichever modules step."""
    agent, batch = make_case(joint_adam=True, reward_weight_decay=1.0)
    later, _ = jax.jit(InFOMAgent.pretrain)(agent, batch, KEY)
    jax.tree.map(np.testing.assert_array_equal, later.params['reward'], agent.params['reward'])
    learnt = finetune(agent, batch)
    plain = finetune(tiny_agents.with_config(agent, reward_weight_decay=0.0), batch)
    trees = (jax.tree.leaves(each.params['reward']) for each in (learnt, plain, agent))
    for ours, other, start in zip(*trees, strict=True):
        np.testing.assert_allclose(ours, other - agent.config.lr * start, rtol=1e-4, atol=1e-7)


def test_weight_decay_of_each_module():
    """Each by its module's own learning rate, and less at a lower rate of all."""
    schedule = {'schedule_steps': 100, 'actor_lr': 2e-3}
    plain, _ = make_case(**schedule)
    decays = {'critic': 0.5, 'vector_field': 0.25, 'actor': 0.75, 'reward': 0.0}
    agent, batch = make_case(**schedule, **{f'{name}_weight_decay': decay for name, decay in decays.items()})
    for step, scale in ((0, 1.0), (50, 0.5)):
        decayed, full = (finetune(at_step(each, step), batch) for each in (agent, plain))
        for name, decay in decays.items():
            shrinkage = scale * (2e-3 if name == 'actor' else agent.config.lr) * decay
            jax.tree.map(
                lambda ours, other, start, shrinkage=shrinkage: np.testing.assert_allclose(
                    ours, other - shrinkage * start, rtol=1e-4, atol=1e-7
                ),
                decayed.params[name],
                full.params[name],
                plain.params[name],
            )
