"""What IQL and the ReBRAC family learn on problems with a known answer: the optimal value of a chain, the better of two
arms.

Learning runs of seconds, on two seeds each; tolerances are some 1.5 times the largest error seen over seeds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agents
from tests.tiny import make_dataset
from utils import datasets, training

SEEDS = [0, 1]
DISCOUNT = 0.9
# Settings of the agents that these problems ask for; sizes are those of all.
AGENTS = {
    'iql': dict(alpha=3.0, expectile=0.95),
    'iql_ddpgbc': dict(actor_loss='ddpgbc', alpha=0.02, expectile=0.95),
    'rebrac': dict(alpha_actor=0.05, alpha_critic=0.0),
    'dino_rebrac': dict(alpha_actor=0.05, alpha_critic=0.0),
    'mbpo_rebrac': dict(alpha_actor=0.05, alpha_critic=0.0, num_model_rollouts=64),
}
SIZES = dict(discount=DISCOUNT, batch_size=128, lr=1e-3, tau=0.02, actor_freq=2)


def load(name):
    """(agent class, config) of a key of `AGENTS`."""
    module = agents.load(name.removesuffix('_ddpgbc'))
    config = module.get_config()
    config.update({key: (32, 32) for key in config if key.endswith('hidden_dims')})
    config.update({**SIZES, **AGENTS[name]})
    return module.AGENT, config


def train(agents, dataset, phase, num_updates):
    keys = training.stream_keys(SEEDS, phase)
    agents, metrics = training.train_chunk(agents, dataset, keys, jnp.int32(0), phase=phase, n=num_updates)
    assert all((first < 0).all() for _, first in metrics.values()), 'losses stay finite'
    return agents


def modes(agents, observations):
    """(seeds, B)"""
    act = jax.jit(jax.vmap(lambda agent: agent.act(jnp.float32(observations)[:, None], jax.random.key(0), 0.0)))
    return np.asarray(act(agents))[..., 0]


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


def chain(num_episodes=300, length=10):
    """Positive actions move right, negative ones left; −1 a step, until the right end, which is final. The behaviour
    moves either way at random."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.9, 0.9, (num_episodes, length))
    states = np.zeros((num_episodes, length), int)
    states[:, 0] = rng.integers(0, LENGTH, num_episodes)
    for t in range(length - 1):
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


@pytest.mark.parametrize('name', ['iql', 'rebrac'])
def test_the_optimal_value_of_a_chain(name):
    """V (IQL) or min_k Q_k(s, μ(s)) (ReBRAC) is within 0.4 of the optimum, where the behaviour's is off by more than 2;
    and the policy walks right."""
    dataset = make_dataset(chain())
    agents = training.create_agents(*_create_arguments(name, dataset))
    agents = training.begin_finetuning(agents, dataset, training.stream_keys(SEEDS, 'begin_finetuning'))
    agents = train(agents, dataset, 'finetuning', 2500)
    policy = modes(agents, POSITIONS)
    states = jnp.float32(POSITIONS)[:, None]

    def values(agent, actions):
        if name == 'iql':
            return agent.networks.value.apply({'params': agent.params['value']}, states)
        return agent.networks.critic.apply({'params': agent.params['critic']}, states, actions[:, None]).min(axis=0)

    learned = np.asarray(jax.jit(jax.vmap(values))(agents, policy))
    assert np.abs(learned - OPTIMAL).max() < 0.4, f'learned {np.round(learned, 2)}, optimal {np.round(OPTIMAL, 2)}'
    assert policy[:, :-1].min() > 0.1, f'policy {np.round(policy, 2)}'


def _create_arguments(name, dataset):
    agent_class, config = load(name)
    return agent_class, SEEDS, datasets.example_batch(dataset), config


# -------------------------------------------------------------------------------------------------------- two arms


@pytest.mark.parametrize('name', AGENTS)
def test_fine_tuning_prefers_the_arm_that_leads_to_reward(name):
    """From the start, positive actions lead right and negative ones left; only the right is rewarded. The clone is
    indifferent, the fine-tuned policy goes right."""
    num_episodes, length = 400, 6
    rng = np.random.default_rng(0)
    first = rng.uniform(-0.9, 0.9, num_episodes)
    states = np.where(np.arange(length) > 0, np.sign(first)[:, None] * 1.5, 0.0)
    actions = rng.uniform(-0.9, 0.9, (num_episodes, length))
    actions[:, 0] = first
    labelled = rows_of(states, actions, states > 1, np.ones(states.shape))
    raw = {key: value for key, value in labelled.items() if key not in ('rewards', 'masks')}
    agents = training.create_agents(*_create_arguments(name, make_dataset(raw)))
    agents = train(agents, make_dataset(raw), 'pretraining', 400)
    assert np.abs(modes(agents, [0.0])).max() < 0.25, f'the clone is indifferent: {modes(agents, [0.0])}'

    dataset = make_dataset(labelled)
    agents = training.begin_finetuning(agents, dataset, training.stream_keys(SEEDS, 'begin_finetuning'))
    agents = train(agents, dataset, 'finetuning', 1000)
    assert modes(agents, [0.0]).min() > 0.3, f'modes {modes(agents, [0.0])}'
