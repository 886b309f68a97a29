"""What IQL and ReBRAC learn on problems with a known answer: the optimal value of a chain, the better of two arms.

Learning runs of seconds, on two seeds each; tolerances are some 1.5 times the largest error seen over seeds. Both
problems have data sets of one shape, so that an agent is compiled once for the two.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agents
from tests.learning import train
from tests.tiny import make_dataset
from utils import training

SEEDS = [0, 1]
DISCOUNT = 0.9
NUM_EPISODES, EPISODE_LENGTH = 300, 10
SIZES = dict(actor_tau=0.05, discount=DISCOUNT, batch_size=128, lr=1e-3, tau=0.02, actor_freq=2)
AGENTS = {'iql': dict(alpha=3.0, expectile=0.95), 'rebrac': dict(alpha_actor=0.02, alpha_critic=0.0, actor_noise=0.05)}


@functools.cache
def created(name):
    """Fresh agents of `SEEDS`, on the host; both problems have states and actions of one feature."""
    module = agents.load(name)
    config = module.get_config()
    config.update({key: (32, 32) for key in config if key.endswith('hidden_dims')})
    config.update({**SIZES, **AGENTS[name]})
    example = {'observations': jnp.zeros((1, 1)), 'actions': jnp.zeros((1, 1))}
    return jax.device_get(training.create_agents(module.AGENT, SEEDS, example, config))


def finetuned(name, raw):
    """Agents of `SEEDS` after 2,000 updates on labelled rows, from scratch: the policy is indifferent at first."""
    dataset = make_dataset(raw)
    agents = jax.tree.map(jnp.array, created(name))
    assert np.abs(modes(agents, POSITIONS)).max() < 0.1
    return train(agents, SEEDS, dataset, 'finetuning', 2000)


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def _modes(agents, observations):
    return agents.act(observations, jax.random.key(0), 0.0)


def modes(agents, positions):
    """Deterministic actions (seeds, B) at `positions` (B,)."""
    return np.asarray(_modes(agents, jnp.float32(positions)[:, None]))[..., 0]


def rows_of(states, actions, rewards, masks):
    """Labelled row arrays of episodes (E, T)."""
    terminals = np.zeros(states.shape, bool)
    terminals[:, -1] = True
    return {
        'observations': states.reshape(-1, 1).astype(np.float32),
        'actions': actions.reshape(-1, 1).astype(np.float32),
        'rewards': rewards.reshape(-1).astype(np.float32),
        'masks': masks.reshape(-1).astype(np.float32),
        'terminals': terminals.reshape(-1),
    }


# ------------------------------------------------------------------------------------------- optimal value of a chain

LENGTH = 4
POSITIONS = np.arange(LENGTH) - 1.5
OPTIMAL = -(1 - DISCOUNT ** np.arange(LENGTH - 1, -1, -1)) / (1 - DISCOUNT)


def chain():
    """Positive actions move right, negative ones left; −1 a step, until the right end, which is final. The behaviour
    moves either way at random, with actions that are not near 0."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(0.4, 0.9, (NUM_EPISODES, EPISODE_LENGTH))
    actions *= rng.choice([-1, 1], actions.shape)
    states = np.zeros(actions.shape, int)
    states[:, 0] = rng.integers(0, LENGTH, NUM_EPISODES)
    for t in range(EPISODE_LENGTH - 1):
        states[:, t + 1] = np.clip(states[:, t] + np.where(actions[:, t] > 0, 1, -1), 0, LENGTH - 1)
    reached = states == LENGTH - 1
    return rows_of(POSITIONS[states], actions, reached - 1.0, ~reached)


def behaviour_values():
    """V of the random behaviour, from its linear equations."""
    transitions = np.zeros((LENGTH, LENGTH))
    for k in range(LENGTH - 1):  # From the last state nothing follows.
        transitions[k, max(k - 1, 0)] += 0.5
        transitions[k, k + 1] += 0.5
    return np.linalg.solve(np.eye(LENGTH) - DISCOUNT * transitions, np.append(-np.ones(LENGTH - 1), 0.0))


def test_the_chain_asks_for_more_than_cloning():
    assert np.abs(behaviour_values() - OPTIMAL).max() > 2


@pytest.mark.slow
@pytest.mark.parametrize('name', AGENTS)
def test_the_optimal_value_of_a_chain(name):
    """V (IQL) or min_k Q_k(s, μ(s)) (ReBRAC) is within 0.4 of the optimum, where the behaviour's is off by more than 2;
    and the policy walks right."""
    agents = finetuned(name, chain())
    policy = modes(agents, POSITIONS)
    states = jnp.float32(POSITIONS)[:, None]

    def values(agent, actions):
        if name == 'iql':
            return agent.networks.value.apply({'params': agent.params['value']}, states)
        return agent.networks.critic.apply({'params': agent.params['critic']}, states, actions[:, None]).min(axis=0)

    learned = np.asarray(jax.jit(jax.vmap(values))(agents, policy))
    assert np.abs(learned - OPTIMAL).max() < 0.4, f'learned {np.round(learned, 2)}, optimal {np.round(OPTIMAL, 2)}'
    assert policy[:, :-1].min() > 0.1, f'policy {np.round(policy, 2)}'


# -------------------------------------------------------------------------------------------------------- two arms


@pytest.mark.slow
@pytest.mark.parametrize('better', [1, -1])
@pytest.mark.parametrize('name', AGENTS)
def test_the_better_of_two_arms(name, better):
    """From the start, positive actions lead right and negative ones left; only one side is rewarded. No action is near
    0, so that Q, which knows the two sides alone, rises all the way between them."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(0.4, 0.9, (NUM_EPISODES, EPISODE_LENGTH)) * rng.choice([-1, 1], (NUM_EPISODES, 1))
    states = np.where(np.arange(EPISODE_LENGTH) > 0, np.sign(actions[:, :1]) * 1.5, 0.0)
    agents = finetuned(name, rows_of(states, actions, states * better > 1, np.ones(states.shape)))
    policy = modes(agents, [0.0])
    assert (better * policy).min() > 0.2, f'modes {policy}'
