"""What InFOM learns on problems with a known answer: the occupancy of a chain, two intentions, the better of two arms.

Learning runs of seconds, on two seeds each; tolerances are some 1.5 times the largest error seen over seeds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents import common
from agents.infom import InFOMAgent, get_config
from tests.learning import train
from tests.tiny import make_dataset
from utils import datasets, training

SEEDS = [0, 1]
DISCOUNT = 0.9


def small_config(**overrides):
    config = get_config()
    config.update(
        {
            'value_hidden_dims': (64, 64),
            'reward_hidden_dims': (32, 32),
            'actor_hidden_dims': (32,),
            'intention_encoder_hidden_dims': (32,),
            'latent_dim': 2,
            'discount': DISCOUNT,
            'lr': 1e-3,
            'tau': 0.02,
            'clip_flow_goals': False,
            'num_flow_goals': 8,
            **overrides,
        }
    )
    return config


def rows_of(observations, actions):
    """Row arrays of episodes (E, T, ·)."""
    terminals = np.zeros(observations.shape[:2], bool)
    terminals[:, -1] = True
    return {
        'observations': observations.reshape(-1, observations.shape[-1]).astype(np.float32),
        'actions': actions.reshape(-1, actions.shape[-1]).astype(np.float32),
        'terminals': terminals.reshape(-1),
    }


# ------------------------------------------------------------------------------------------- occupancy in closed form


def two_state_chain(switch_probability, num_episodes=200, length=101):
    """Action 1 switches between the states −1.5 and 1.5, action −1 stays; the behaviour switches with a fixed
    probability."""
    rng = np.random.default_rng(0)
    actions = np.where(rng.random((num_episodes, length)) < switch_probability, 1.0, -1.0)
    states = np.zeros((num_episodes, length), int)
    states[:, 0] = rng.integers(0, 2, num_episodes)
    for t in range(length - 1):
        states[:, t + 1] = np.where(actions[:, t] > 0, 1 - states[:, t], states[:, t])
    return rows_of(np.where(states, 1.5, -1.5)[..., None], actions[..., None])


def chain_occupancy(state, switches, switch_probability):
    """(1−γ)·Σ_{k≥0} γ^k·P(s_k = · | s_0 = state, first action): from the resolvent of the behaviour's transition
    matrix."""
    transitions = np.array([[1 - switch_probability, switch_probability], [switch_probability, 1 - switch_probability]])
    later = (1 - DISCOUNT) * np.linalg.inv(np.eye(2) - DISCOUNT * transitions)
    return (1 - DISCOUNT) * np.eye(2)[state] + DISCOUNT * later[1 - state if switches else state]


def test_flow_samples_match_the_discounted_occupancy_of_a_chain():
    """γ = 0.9 and two states: total variation to the closed form below 0.1 on average, while a flow that does not
    bootstrap (the next state alone) would be off by 0.4 to 0.5."""
    dataset = make_dataset(two_state_chain(0.3))
    agents = training.create_agents(InFOMAgent, SEEDS, datasets.example_batch(dataset), small_config(kl_weight=10.0))
    agents = train(agents, SEEDS, dataset, 'pretraining', 2000)

    def sample(agent, state, action):
        latent_key, noise_key = jax.random.split(jax.random.key(7))
        ones = jnp.ones((4000, 1))
        condition = agent.condition(
            agent.params, state * ones, action * ones, jax.random.normal(latent_key, (4000, agent.config.latent_dim))
        )
        return agent.sample_futures(agent.params, jax.random.normal(noise_key, (4000, 1)), condition)

    errors, gaps = [], []
    for state in (0, 1):
        for switches in (False, True):
            futures = jax.vmap(lambda agent: sample(agent, 3.0 * state - 1.5, 2.0 * switches - 1.0))(agents)
            expected = chain_occupancy(state, switches, 0.3)[1]
            errors.append(np.abs(np.asarray(futures[..., 0] > 0).mean(axis=1) - expected))
            gaps.append(abs(float(state != switches) - expected))
    assert np.mean(errors) < 0.1 and np.max(errors) < 0.2, f'total variation {np.round(errors, 3)}'
    assert np.mean(gaps) > 0.4, 'the problem is one that needs bootstrapping'


# -------------------------------------------------------------------------------------------------------- intentions


def two_behaviours(num_episodes=800, length=5):
    """From 0, where both take action 0, one behaviour goes to 2 and stays there with actions 0.8, the other to −2 with
    −0.8: what comes after the start is known from (s', a') alone."""
    rng = np.random.default_rng(0)
    behaviour = np.repeat([1.0, -1.0], num_episodes // 2)[:, None]
    later = np.arange(length) > 0
    states = later * (2.0 * behaviour + 0.02 * rng.normal(size=(num_episodes, length)))
    return rows_of(states[..., None], (later * 0.8 * behaviour)[..., None])


@pytest.mark.slow
def test_inferred_intentions_lead_to_where_their_behaviour_goes():
    """Given z ~ q(z | s', a') of one behaviour, futures of the common start lie on its side; given z ~ N(0, I), on
    either side.

    A small KL weight: z has gradient through the current state's term alone, which (s, a) explains without z, so a
    large one empties z. And s', a' hardly differ along an episode: the field at (s', a') is asked about the z of the
    row before.
    """
    dataset = make_dataset(two_behaviours())
    config = small_config(kl_weight=0.001, latent_dim=4)
    agents = training.create_agents(InFOMAgent, SEEDS, datasets.example_batch(dataset), config)
    agents = train(agents, SEEDS, dataset, 'pretraining', 1200)
    behaviour = np.repeat([1.0, -1.0], 1000)[:, None]

    def futures(agent, latents_of):
        latent_key, noise_key = jax.random.split(jax.random.key(3))
        start = jnp.zeros((len(behaviour), 1))
        condition = agent.condition(agent.params, start, start, latents_of(agent, latent_key))
        return agent.sample_futures(agent.params, jax.random.normal(noise_key, start.shape), condition)

    def inferred(agent, key):
        batch = {'next_observations': 2.0 * behaviour, 'next_actions': 0.8 * behaviour}
        return agent.infer_intentions(agent.params, batch, key)[0]

    def prior(agent, key):
        return jax.random.normal(key, (len(behaviour), agent.config.latent_dim))

    def share_on_its_side(latents_of):
        samples = np.asarray(jax.vmap(lambda agent: futures(agent, latents_of))(agents))
        moved = np.abs(samples) > 0.5  # A share 1 − γ of the occupancy is the start itself.
        assert moved.mean() > 0.8
        return (moved & (samples * behaviour > 0)).sum(axis=(1, 2)) / moved.sum(axis=(1, 2))

    assert share_on_its_side(inferred).min() > 0.8, f'{share_on_its_side(inferred)}'
    assert np.abs(share_on_its_side(prior) - 0.5).max() < 0.1, f'{share_on_its_side(prior)}'


# ---------------------------------------------------------------------------------------------- expectile and policy


@pytest.mark.parametrize('expectile', [0.5, 0.9])
def test_the_expectile_loss_finds_the_expectile(expectile):
    """Targets 0 and 1 with equal probability: the κ-expectile is κ (the root of κ·(1−q) = (1−κ)·q)."""
    targets = jnp.array([0.0, 1.0])
    grid = jnp.linspace(0, 1, 1001)
    losses = common.expectile_loss(targets[None] - grid[:, None], expectile).mean(axis=1)
    assert abs(float(grid[jnp.argmin(losses)]) - expectile) < 2e-3


@pytest.mark.slow
def test_fine_tuning_prefers_the_arm_that_leads_to_reward():
    """From the start, positive actions lead right and negative ones left; only the right is rewarded. The clone is
    indifferent, the fine-tuned policy goes right, and its Q knows the difference."""
    num_episodes, length = 400, 8
    rng = np.random.default_rng(0)
    first = rng.uniform(-0.9, 0.9, num_episodes)
    states = np.where(np.arange(length) > 0, np.sign(first)[:, None] * 1.5, 0.0)
    actions = rng.uniform(-0.9, 0.9, (num_episodes, length))
    actions[:, 0] = first
    raw = rows_of(states[..., None], actions[..., None])
    labelled = {
        **raw,
        'rewards': (raw['observations'][:, 0] > 1).astype(np.float32),
        'masks': np.ones(len(states) * length),
    }
    labelled['masks'] = labelled['masks'].astype(np.float32)
    # An average as short as the training; and a slower field, with which the modes are 0.38 and 0.48 (at the full rate
    # 0.36 and 0.30).
    config = small_config(alpha=0.02, num_flow_steps=5, actor_tau=0.05, finetuning_field_rate=0.1)
    agents = training.create_agents(InFOMAgent, SEEDS, datasets.example_batch(make_dataset(raw)), config)
    agents = train(agents, SEEDS, make_dataset(raw), 'pretraining', 2000)

    def mode(agents):
        return np.asarray(jax.vmap(lambda agent: agent.act(jnp.zeros((1, 1)), jax.random.key(0), 0.0))(agents)).ravel()

    assert np.abs(mode(agents)).max() < 0.2, 'the clone is indifferent'
    agents = training.begin_finetuning(agents, make_dataset(labelled), training.stream_keys(SEEDS, 'begin_finetuning'))
    agents = train(agents, SEEDS, make_dataset(labelled), 'finetuning', 1000)
    assert mode(agents).min() > 0.3, f'modes {mode(agents)}'
    right, left = (
        jax.vmap(lambda agent: agent.q_values(jnp.zeros((1, 1)), jnp.full((1, 1), a)))(agents) for a in (0.5, -0.5)
    )
    assert (right - left).min() > 3, f'Q {right.ravel()} to the right, {left.ravel()} to the left'
