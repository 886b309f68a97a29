"""MBPO + ReBRAC: losses and gradients against float64 NumPy, imagined rollouts, their buffer, and what they do to an
update. What holds for every agent is in `test_agents.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agents
from agents.mbpo_rebrac import TRANSITION
from tests import infom_reference as reference
from tests import loss_checks, rebrac_reference, tiny, tiny_agents
from tests.learning import train
from utils import datasets, presets, training

KEY = jax.random.key(7)
VARIANTS = {
    'defaults': dict(),
    'switched': dict(transition_layer_norm=False, reward_layer_norm=False, alpha_critic=1.3, tanh_squash=False),
}
ROWS = 6 * 2  # Imagined at a time: `num_model_rollouts` of the tiny agents, 2 steps each.


def random_rows(agent, seed):
    """Imagined transitions as `remember` takes them, made up."""
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.uniform(-0.9, 0.9, (ROWS, *v.shape[1:])), jnp.float32) for k, v in agent.buffer.items()}


@functools.cache
def make_case(name):
    """(agent, batch): the buffer is half full, and what is past its end would show in every loss."""
    batch = tiny_agents.make_batch(reward_at='next_observations' if name == 'switched' else 'observations')
    batch['masks'] = batch['masks'].at[::3].set(0.0)
    agent = tiny_agents.make_agent('mbpo_rebrac', batch, **VARIANTS[name])
    agent = agent.replace(buffer={k: jnp.full_like(v, 1e3) for k, v in agent.buffer.items()})
    return agent.remember(random_rows(agent, 5)), batch


def state_change(params, config, s, a):
    hidden = len(config.transition_hidden_dims)
    return reference.mlp(params['transition'], np.concatenate([s, a], -1), hidden, config.transition_layer_norm)


def make_reference(agent, batch):
    config = agent.config
    mix_key, critic_key = jax.random.split(KEY)
    real = {k: np.float64(v) for k, v in batch.items()}
    half = tiny.BATCH_SIZE // 2
    rows = np.asarray(jax.random.randint(mix_key, (half,), 0, ROWS))
    mixed = {k: np.concatenate([real[k][:half], np.float64(agent.buffer[k])[rows]]) for k in TRANSITION}
    noise = np.float64(jax.random.normal(critic_key, batch['actions'].shape))
    frozen, target = reference.float64(agent.params), reference.float64(agent.target_params)

    def losses(params):
        change = real['next_observations'] - real['observations']
        dynamics = ((state_change(params, config, real['observations'], real['actions']) - change) ** 2).mean()
        reward = reference.reward_loss(params, config, real)
        cloning = rebrac_reference.cloning_loss(params, config, real)
        terms = rebrac_reference.losses(params, frozen, target, config, mixed, noise)
        for phase in ('finetuning', 'finetuning_with_actor'):
            loss = terms[phase]['loss'] + dynamics + reward
            terms[phase] |= {'loss': loss, 'dynamics_loss': dynamics, 'reward_loss': reward}
        pretraining = {'loss': dynamics + cloning, 'dynamics_loss': dynamics, 'bc_loss': cloning}
        return {**terms, 'pretraining': pretraining}

    return losses


@pytest.mark.parametrize('name', VARIANTS)
def test_losses(name):
    agent, batch = make_case(name)
    loss_checks.assert_losses_match(agent, batch, KEY, make_reference(agent, batch))


@pytest.mark.parametrize('name', VARIANTS)
def test_gradients(name):
    agent, batch = make_case(name)
    loss_checks.assert_gradients_match(agent, batch, KEY, make_reference(agent, batch))


# -------------------------------------------------------------------------------------------------------- imagination


@functools.cache
def dreamer():
    """An agent whose imagined trajectories are longer, and end."""
    agent = tiny_agents.make_agent(
        'mbpo_rebrac', tiny_agents.make_batch(), num_model_rollouts=10, num_model_rollout_steps=3
    )
    return tiny_agents.with_config(agent, termination_reward=0.1)


@jax.jit
def imagine(agent, batch):
    return agent.imagine(batch, KEY)


@pytest.mark.parametrize('reward_at', ['observations', 'next_observations'])
def test_imagined_transitions_follow_model_policy_and_reward(reward_at):
    """Every row against the model in float64, and rows of one rollout in sequence: the state advances, a' is the next
    row's action. One feature of the data never changes, as a goal's would not."""
    agent, batch = dreamer(), tiny_agents.make_batch()
    batch['next_observations'] = batch['next_observations'].at[:, 0].set(batch['observations'][:, 0])
    batch['reward_observations'] = batch[reward_at]
    rows = reference.float64(imagine(agent, batch))
    params, config = reference.float64(agent.params), agent.config
    s, a, next_s = rows['observations'], rows['actions'], rows['next_observations']
    assert s.shape == (30, tiny.STATE_DIM)

    starts = np.concatenate([batch['observations'], batch['observations'][:2]])  # 10 rollouts from a batch of 8.
    np.testing.assert_array_equal(s[:10], np.float64(starts))
    np.testing.assert_array_equal(s[10:], next_s[:-10])
    np.testing.assert_array_equal(a[10:], rows['next_actions'][:-10])
    np.testing.assert_allclose(next_s, s + state_change(params, config, s, a), rtol=1e-4, atol=1e-5)
    rewarded = next_s if reward_at == 'next_observations' else s
    np.testing.assert_allclose(rows['rewards'], reference.rewards(params['reward'], config, rewarded), atol=1e-5)
    np.testing.assert_array_equal(rows['masks'], rows['rewards'] <= 0.1)
    assert 0 < rows['masks'].mean() < 1

    keys = jax.random.split(KEY, 4)  # Of the first actions, then of each step's next actions.
    visited, taken = [*s.reshape(3, 10, -1), next_s[-10:]], [*a.reshape(3, 10, -1), rows['next_actions'][-10:]]
    for key, states, actions in zip(keys, visited, taken, strict=True):
        means, _ = reference.actor(params['actor'], config, states)
        noise = config.actor_noise * np.float64(jax.random.normal(key, actions.shape))
        noise = np.clip(noise, -config.actor_noise_clip, config.actor_noise_clip)
        np.testing.assert_allclose(actions, np.clip(np.tanh(means) + noise, -1, 1), atol=1e-4)


def test_without_a_rule_nothing_ends():
    agent, batch = make_case('defaults')
    assert agent.config.termination_reward is None
    assert (imagine(agent, batch)['masks'] == 1).all()


def test_tasks_with_a_rule():
    """OGBench's single tasks end where the reward, 0 or less, is 0; the tasks of ExORL never end."""
    rule = presets.resolve('mbpo_rebrac', 'cube-single-play-singletask-task1-v0').agent['termination_reward']
    assert -1 < rule < 0
    assert 'termination_reward' not in presets.resolve('mbpo_rebrac', 'walker_walk').agent


@pytest.mark.slow
def test_imagined_returns_match_the_true_model_on_linear_dynamics():
    """s' = A·s + B·a and a reward that is linear in s: five imagined steps give the true states and returns."""
    rng = np.random.default_rng(0)
    dynamics = 0.9 * np.eye(tiny.STATE_DIM)
    control = 0.3 * rng.normal(size=(tiny.ACTION_DIM, tiny.STATE_DIM))
    value = rng.normal(size=tiny.STATE_DIM)
    states, actions = np.zeros((100, 16, tiny.STATE_DIM)), rng.uniform(-0.9, 0.9, (100, 16, tiny.ACTION_DIM))
    states[:, 0] = rng.normal(size=(100, tiny.STATE_DIM))
    for t in range(15):
        states[:, t + 1] = states[:, t] @ dynamics + actions[:, t] @ control
    terminals = np.zeros((100, 16), bool)
    terminals[:, -1] = True
    raw = {
        'observations': states.reshape(-1, tiny.STATE_DIM),
        'actions': actions.reshape(-1, tiny.ACTION_DIM),
        'rewards': (states @ value).reshape(-1),
    }
    raw = {k: v.astype(np.float32) for k, v in raw.items()} | {'terminals': terminals.reshape(-1)}
    raw['masks'] = np.ones(len(raw['rewards']), np.float32)
    dataset = tiny.make_dataset(raw)
    config = tiny_agents.make_config(
        'mbpo_rebrac', transition_hidden_dims=(64, 64), reward_hidden_dims=(64, 64), batch_size=64, lr=2e-3,
        num_model_rollouts=64, num_model_rollout_steps=5, transition_layer_norm=False, reward_layer_norm=False,
    )  # fmt: skip
    fresh = training.create_agents(agents.load('mbpo_rebrac').AGENT, [0], datasets.example_batch(dataset), config)
    agent = jax.tree.map(lambda x: x[0], train(fresh, [0], dataset, 'finetuning', 2000))
    batch = datasets.sample(dataset, jax.random.key(9), 64, agent.needs)
    rows = {k: np.float64(v).reshape(5, 64, -1) for k, v in imagine(agent, batch).items()}

    state, true_return, imagined_return = rows['observations'][0], 0.0, 0.0
    for t in range(5):
        true_return = true_return + 0.9**t * (state @ value)
        imagined_return = imagined_return + 0.9**t * rows['rewards'][t, :, 0]
        state = state @ dynamics + rows['actions'][t] @ control
    correlation = np.corrcoef(true_return, imagined_return)[0, 1]
    error = np.abs(true_return - imagined_return).mean() / true_return.std()
    assert correlation > 0.98 and error < 0.15, f'correlation {correlation:.3f}, relative error {error:.3f}'
    end_error = np.abs(rows['next_observations'][-1] - state).mean() / state.std()
    assert end_error < 0.15, f'relative error of the last state {end_error:.3f}'


# ---------------------------------------------------------------------------------------------------------- the buffer


def test_the_buffer_replaces_its_oldest_rows():
    """Capacity 24 rows, for 3 batches of 8, is two writes of 12."""
    agent, _ = make_case('defaults')
    agent = agent.replace(num_writes=jnp.int32(0))
    assert all(len(rows) == 2 * ROWS for rows in agent.buffer.values())
    written = [random_rows(agent, seed) for seed in range(3)]
    remember = jax.jit(lambda agent, rows: agent.remember(rows))
    for number, rows in enumerate(written, start=1):
        agent = remember(agent, rows)
        assert agent.num_writes == number
        kept = [written[2] if number == 3 else written[0], *written[1 : min(number, 2)]]
        for name in TRANSITION:
            np.testing.assert_array_equal(
                agent.buffer[name][: ROWS * len(kept)], np.concatenate([part[name] for part in kept])
            )


def test_batches_are_half_imagined_from_filled_rows_alone():
    agent, batch = make_case('defaults')
    half = tiny.BATCH_SIZE // 2
    filled = np.asarray(agent.buffer['observations'][:ROWS])
    mixed_batch = jax.jit(lambda agent, seed: agent.mixed_batch(batch, jax.random.key(seed)))
    drawn = set()
    for seed in range(10):
        mixed = mixed_batch(agent, seed)
        assert mixed.keys() == set(TRANSITION)
        for name in TRANSITION:
            assert mixed[name].shape == batch[name].shape
            np.testing.assert_array_equal(mixed[name][:half], batch[name][:half])
        for i in range(half, tiny.BATCH_SIZE):
            (row,) = np.flatnonzero((filled == mixed['observations'][i]).all(axis=1))
            drawn.add(int(row))
            for name in TRANSITION:  # A transition stays in one piece.
                np.testing.assert_array_equal(mixed[name][i], agent.buffer[name][row])
    assert len(drawn) == ROWS, 'all of them, given time'

    empty = mixed_batch(agent.replace(num_writes=jnp.int32(0)), 0)
    for name in TRANSITION:
        np.testing.assert_array_equal(empty[name], batch[name])


def test_imagined_data_change_the_update():
    """Two agents that differ in what they imagined before: critics and actors part at the very next update, the model
    does not. And the first update of all is on imagined data already."""
    agent, batch = make_case('defaults')
    other = agent.replace(num_writes=jnp.int32(0)).remember(random_rows(agent, 6))
    update = jax.jit(lambda agent, batch: agent.finetune(batch, KEY, update_actor=True))
    (first, _), (second, _) = update(agent, batch), update(other, batch)
    for module, differs in {'critic': True, 'actor': True, 'transition': False, 'reward': False}.items():
        moved = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), first.params[module], second.params[module])
        assert (max(jax.tree.leaves(moved)) > 1e-5) == differs, module

    unused = agent.replace(num_writes=jnp.int32(0))
    updated, metrics = update(unused, batch)
    assert updated.num_writes == 1
    imagination_key, loss_key = jax.random.split(KEY)
    loss = jax.jit(lambda agent: agent.finetuning_loss(agent.params, batch, loss_key)[1]['critic_loss'])
    imagined = jax.jit(lambda agent: agent.remember(agent.imagine(batch, imagination_key)))(unused)
    np.testing.assert_allclose(metrics['critic_loss'], loss(imagined), rtol=1e-4)
    assert abs(metrics['critic_loss'] - loss(unused)) > 1e-3


@pytest.mark.parametrize('num_model_rollouts', [None, 300, 20_000])
def test_the_buffer_holds_a_hundred_batches_and_whole_writes(num_model_rollouts):
    """By default, where writes do not divide a hundred batches, and where one write is more than they are."""
    module = agents.load('mbpo_rebrac')
    config = module.get_config()
    config.num_model_rollouts = num_model_rollouts or config.num_model_rollouts
    agent = jax.eval_shape(lambda: module.AGENT.create(KEY, tiny_agents.make_batch(), config))
    rows = agent.buffer['rewards'].shape[0]
    assert rows >= 100 * config.batch_size
    assert rows % (config.num_model_rollouts * config.num_model_rollout_steps) == 0
