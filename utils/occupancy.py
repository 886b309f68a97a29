"""How well an occupancy model knows the future: its samples against what really came, on held-out trajectories.

Pure functions of (agent, data, key), for agents with a flow over future states (`agents/infom.py`). The truth is one
trajectory for each state, so a score is an average over states of a proper score: lowest in expectation for the true
conditional distribution, though not 0 there. What it means is told by the baselines beside it.
Shapes: B states, N samples for each, S features of the agent's (normalised) observations.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from agents import intentions
from utils import datasets
from utils.flows import map_rows
from utils.goals import Goals, sample_goal_rows

PREDICTORS = ('flow, z inferred', 'flow, z of others', 'flow, z from the prior', 'marginal', 'copy of the state')
NUM_PROJECTIONS = 64  # Directions of the sliced distance.
BLOCK = 128  # Points whose distances to all others, or rows whose features, are computed at once.


def models_occupancy(agent) -> bool:
    """Whether the agent has a flow over future states to look at."""
    return hasattr(agent, 'sample_futures') and hasattr(agent, 'intentions_and_kl')


# ------------------------------------------------------------------------------------------------------ distances


def _mean_distance(x, y):
    """E‖x − y‖ over all pairs of (N, S) and (M, S)."""
    # Differences, not inner products, which would round small distances away; blocks keep (N, M, S) out of memory.
    return jax.lax.map(lambda row: jnp.linalg.norm(row - y, axis=-1).mean(), x, batch_size=BLOCK).mean()


def energy_distance(x, y):
    """2·E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖ between samples (N, S) and (M, S) (Székely and Rizzo, 2013, eq. 2.1).

    All pairs count, those of a sample with itself included: never negative, 0 for equal samples, and on average above
    0 by about E‖x − x'‖/N + E‖y − y'‖/M for two samples of one distribution.
    """
    return 2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)


def sliced_wasserstein(key, x, y, num_projections: int = NUM_PROJECTIONS):
    """Mean over random directions of the 1-Wasserstein distance of the projections of two samples (N, S), N equal."""
    directions = jax.random.normal(key, (num_projections, x.shape[-1]))
    directions /= jnp.linalg.norm(directions, axis=-1, keepdims=True)
    return jnp.abs(jnp.sort(x @ directions.T, axis=0) - jnp.sort(y @ directions.T, axis=0)).mean()


# ------------------------------------------------------------------------------------------------------- the truth


def geometric_futures(key, rows, ends, discount: float, num_samples: int, first_offset: int = 0):
    """Rows (B, N) of the states that came after `rows` (B,), discounted: min(t + k, end), P(k) = (1 − γ)·γ^(k − first).

    ends (B,): last rows of their episodes, where the offsets are cut, as those of `utils.goals.Goals` are. The InFOM
    flow's occupancy counts the state itself: `first_offset` 0, k = 0 with probability 1 − γ.
    """
    goals = Goals('future', future=1.0, discount=discount, first_offset=first_offset)
    rows, ends = (jnp.repeat(values, num_samples) for values in (rows, ends))
    return sample_goal_rows(goals, key, rows, ends, num_rows=0).reshape(-1, num_samples)


def early_rows(dataset) -> np.ndarray:
    """Rows with a next action in the first half of their episodes: their futures are rarely cut at the end."""
    rows = np.asarray(dataset.next_action_rows)
    starts, ends = np.asarray(dataset.starts)[rows], np.asarray(dataset.ends)[rows]
    early = rows[2 * (rows - starts) <= ends - starts]
    return early if len(early) else rows


# --------------------------------------------------------------------------------------------------------- samples


def latent_shape(agent, num_rows: int) -> tuple[int, int]:
    """(B, Z) of the intentions of `num_rows` rows."""
    return num_rows, intentions.latent_dim(agent.config)


def prior_intentions(agent, key, num_rows: int):
    """z (B, Z) as the critic draws them."""
    return intentions.prior(agent.representation, key, latent_shape(agent, num_rows))


def inferred_intentions(agent, batch, key):
    """(z (B, Z) of the batch's transitions, their means where the encoder gives a distribution, else z, KL (B,) in
    nats).

    The mean KL from the prior bounds from above how many nats z tells about the transition; it is NaN for intentions
    that are no distribution.
    """
    if intentions.origin(agent.config) != 'variational':
        latents, _ = agent.intentions_and_kl(agent.params, batch, key)
        return latents, latents, jnp.full(len(latents), jnp.nan)
    latents, means, log_stds = agent.infer_intentions(agent.params, batch, key)
    return latents, means, -0.5 * jnp.sum(1 + 2 * log_stds - means**2 - jnp.exp(2 * log_stds), axis=-1)


def sample_futures(agent, batch, latents, key, num_samples: int):
    """Futures (B, N, S) of the batch's states and actions under `latents` (B, Z)."""
    features = agent.features(agent.params, batch['observations'])
    condition = agent.condition(agent.params, features, batch['actions'], latents)
    noise = jax.random.normal(key, (features.shape[0], num_samples, features.shape[1]))
    return map_rows(
        lambda noise, condition: agent.sample_futures(agent.params, noise, condition),
        noise,
        condition,
        samples_per_row=num_samples,
    )


def features_of(agent, dataset, rows):
    """What the flow predicts, at any rows (…): (…, S). Rows go through an image encoder in blocks: thousands of stacked
    frames would not fit at once."""

    def one(row):
        return agent.features(agent.params, datasets.gather_observations(dataset, row[None]))[0]

    return jax.lax.map(one, rows.reshape(-1), batch_size=BLOCK).reshape(*rows.shape, -1)


# ---------------------------------------------------------------------------------------------------------- report


def occupancy_report(agent, dataset, key, num_states: int = 64, num_samples: int = 128) -> dict[str, dict[str, float]]:
    """Scores of the flow and of two baselines on a held-out `datasets.Dataset`; lower is better.

    For each of `num_states` rows drawn from the first halves of the episodes, `num_samples` predicted futures are
    compared with as many geometric-horizon futures of the same trajectory. Predictors: the flow under the intention
    inferred from the transition, under that of another transition drawn from the data set, and under one from the
    prior; random rows of the data set; the state itself.

    Returns:
        {predictor: {energy_distance, energy_distance_error, sliced_wasserstein, sliced_wasserstein_error}}: means over
        the states and their standard errors (which take the states for independent).
    """
    row_key, key = jax.random.split(key)
    rows = jax.random.choice(row_key, jnp.asarray(early_rows(dataset)), (num_states,))
    scores = jax.device_get(_scores(agent, dataset, rows, key, num_samples))
    report = {}
    for predictor in PREDICTORS:
        report[predictor] = {}
        for name, values in scores[predictor].items():
            values = np.asarray(values, np.float64)
            error = values.std(ddof=1) / np.sqrt(num_states) if num_states > 1 else float('nan')
            report[predictor] |= {name: float(values.mean()), f'{name}_error': float(error)}
    return report


@functools.partial(jax.jit, static_argnames='num_samples')
def _scores(agent, dataset, rows, key, num_samples):
    """{predictor: {metric: (B,)}}."""
    future_key, marginal_key, latent_key, prior_key, noise_key, slice_key = jax.random.split(key, 6)
    batch = datasets.gather_batch(dataset, rows, frozenset({'next_actions'}))
    shape = (len(rows), num_samples)
    truth = geometric_futures(future_key, rows, dataset.ends[rows], agent.config.discount, num_samples)
    marginal = jax.random.randint(marginal_key, shape, 0, len(dataset.ends))
    others = jax.random.choice(jax.random.fold_in(latent_key, 1), jnp.asarray(dataset.next_action_rows), rows.shape)
    transitions = batch, datasets.gather_batch(dataset, others, frozenset({'next_actions'}))
    latents = [inferred_intentions(agent, each, latent_key)[0] for each in transitions]
    latents.append(prior_intentions(agent, prior_key, len(rows)))
    samples = (
        *(sample_futures(agent, batch, each, noise_key, num_samples) for each in latents),
        features_of(agent, dataset, marginal),
        jnp.repeat(features_of(agent, dataset, rows)[:, None], num_samples, axis=1),
    )
    truth = features_of(agent, dataset, truth)
    keys = jax.random.split(slice_key, len(rows))  # The same directions for every predictor.
    return {
        predictor: {
            'energy_distance': jax.lax.map(lambda pair: energy_distance(*pair), (predicted, truth)),
            'sliced_wasserstein': jax.vmap(sliced_wasserstein)(keys, predicted, truth),
        }
        for predictor, predicted in zip(PREDICTORS, samples, strict=True)
    }
