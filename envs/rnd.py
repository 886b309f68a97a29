"""The explorer of ExORL's `rnd` data: DDPG whose only reward is the error of predicting a fixed random network (RND).

A state that has been seen often is predicted well and pays little; a new one pays. Pure functions of an `Explorer` and
a `Replay`; simulators, files and the loop are in `collect_rnd.py`. The bonus is that of Burda et al. 2018
(arXiv:1810.12894, section 2.2), its use without any task that of Yarats et al. 2022 (arXiv:2201.13425).
"""

import functools

import flax
import jax
import jax.numpy as jnp
import optax

from utils.networks import MLP, ScalarHead

HIDDEN_DIMS = (256, 256)
EMBEDDING_DIM = 64  # Outputs of the random network.
BATCH_SIZE = 256
LEARNING_RATE = 3e-4
PREDICTOR_LEARNING_RATE = 1e-4  # Slower: the bonus of a state should outlast the policy's learning to get there.
DISCOUNT = 0.99
TAU = 0.01  # Of the target critics' moving average.
NOISE_STD, NOISE_CLIP = 0.2, 0.3  # Of actions taken; and of the target policy's, clipped (TD3's smoothing).
OBSERVATION_CLIP = 5.0  # Standard deviations.
TRANSITIONS_PER_UPDATE = 2
RANDOM_TRANSITIONS = 4000  # Taken with random actions before anything is learnt.


class Moments(flax.struct.PyTreeNode):
    """Running mean and variance of the rows of arrays (…, D), or of numbers."""

    count: jax.Array
    mean: jax.Array
    squares: jax.Array  # Sum of squared deviations from the mean.

    @classmethod
    def create(cls, shape=()) -> 'Moments':
        # Three arrays of their own: buffers are donated, and one buffer cannot be given twice.
        return cls(jnp.zeros(()), jnp.zeros(shape), jnp.zeros(shape))

    def add(self, rows) -> 'Moments':
        """With the rows (B, …) counted in (Chan's parallel update)."""
        size = rows.shape[0]
        count, mean = self.count + size, rows.mean(axis=0)
        difference = mean - self.mean
        squares = self.squares + ((rows - mean) ** 2).sum(axis=0) + difference**2 * self.count * size / count
        return Moments(count, self.mean + difference * size / count, squares)

    @property
    def std(self):
        return jnp.sqrt(self.squares / jnp.maximum(self.count, 1.0)) + 1e-6


class Replay(flax.struct.PyTreeNode):
    """All episodes, E side by side: row k·(T + 1) + t holds step t of round k.

    observations (rows, E, D); actions (rows, E, A), each in the row of the state it was taken in.
    """

    observations: jax.Array
    actions: jax.Array


class Explorer(flax.struct.PyTreeNode):
    """Parameters, optimiser states and running statistics; all of it goes into a checkpoint."""

    params: dict  # actor, critic, predictor
    target_critic: dict
    random_network: dict
    opt_states: dict
    observation_moments: Moments
    bonus_moments: Moments


def _networks(action_size: int) -> dict:
    return {
        'actor': MLP(HIDDEN_DIMS, action_size, layer_norm=True),
        'critic': ScalarHead(HIDDEN_DIMS, layer_norm=True, num_ensembles=2),
        'predictor': MLP(HIDDEN_DIMS, EMBEDDING_DIM),
    }


def _optimisers() -> dict:
    rates = {'actor': LEARNING_RATE, 'critic': LEARNING_RATE, 'predictor': PREDICTOR_LEARNING_RATE}
    return {name: optax.adam(rate) for name, rate in rates.items()}


def create(key, observation_size: int, action_size: int) -> Explorer:
    """A fresh explorer."""
    keys = jax.random.split(key, 4)
    observations, actions = jnp.zeros((1, observation_size)), jnp.zeros((1, action_size))
    networks = _networks(action_size)
    params = {
        'actor': networks['actor'].init(keys[0], observations),
        'critic': networks['critic'].init(keys[1], observations, actions),
        'predictor': networks['predictor'].init(keys[2], observations),
    }
    return Explorer(
        params=params,
        target_critic=jax.tree.map(jnp.copy, params['critic']),
        random_network=networks['predictor'].init(keys[3], observations),
        opt_states={name: optimiser.init(params[name]) for name, optimiser in _optimisers().items()},
        observation_moments=Moments.create((observation_size,)),
        bonus_moments=Moments.create(),
    )


def _normalised(explorer: Explorer, observations):
    moments = explorer.observation_moments
    return jnp.clip((observations - moments.mean) / moments.std, -OBSERVATION_CLIP, OBSERVATION_CLIP)


def _policy(actor, params, observations):
    return jnp.tanh(actor.apply(params, observations))


@functools.partial(jax.jit, static_argnames='action_size')
def act(explorer: Explorer, observations, key, *, action_size: int):
    """Actions (E, action_size) in [-1, 1] for observations (E, D), with exploration noise."""
    means = _policy(_networks(action_size)['actor'], explorer.params['actor'], _normalised(explorer, observations))
    return jnp.clip(means + NOISE_STD * jax.random.normal(key, means.shape), -1.0, 1.0)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def see(explorer: Explorer, replay: Replay, row, observations):
    """Puts observations (E, D) into the replay and into the statistics that normalise them."""
    explorer = explorer.replace(observation_moments=explorer.observation_moments.add(observations))
    return explorer, replay.replace(observations=replay.observations.at[row].set(observations))


@functools.partial(jax.jit, donate_argnums=0)
def do(replay: Replay, row, actions) -> Replay:
    """Puts the actions (E, A) taken in a row into the replay."""
    return replay.replace(actions=replay.actions.at[row].set(actions))


def _sample(replay: Replay, steps, episode_length: int, key):
    """A batch of transitions, uniform over the first `steps` steps of all E columns."""
    step_key, column_key = jax.random.split(key)
    step = jax.random.randint(step_key, (BATCH_SIZE,), 0, steps)
    rows = step // episode_length * (episode_length + 1) + step % episode_length
    columns = jax.random.randint(column_key, (BATCH_SIZE,), 0, replay.actions.shape[1])
    return replay.observations[rows, columns], replay.actions[rows, columns], replay.observations[rows + 1, columns]


@functools.partial(jax.jit, donate_argnums=0, static_argnames=('episode_length', 'updates'))
def learn(explorer: Explorer, replay: Replay, steps, key, *, episode_length: int, updates: int):
    """`updates` updates on batches of the first `steps` steps.

    Returns:
        The explorer, and means over the updates: bonus (the raw prediction error), critic_loss, value.
    """
    networks, optimisers = _networks(replay.actions.shape[-1]), _optimisers()

    def update(explorer, key):
        sample_key, noise_key, actor_key = jax.random.split(key, 3)
        observations, actions, next_observations = _sample(replay, steps, episode_length, sample_key)
        states, next_states = _normalised(explorer, observations), _normalised(explorer, next_observations)
        embeddings = networks['predictor'].apply(explorer.random_network, next_states)

        def smoothed_policy(params, states, key):
            noise = jnp.clip(NOISE_STD * jax.random.normal(key, actions.shape), -NOISE_CLIP, NOISE_CLIP)
            return jnp.clip(_policy(networks['actor'], params, states) + noise, -1.0, 1.0)

        def prediction_errors(params):
            return jnp.square(networks['predictor'].apply(params, next_states) - embeddings).mean(axis=-1)

        def predictor_loss(params):
            errors = prediction_errors(params)
            return errors.mean(), errors

        (_, bonuses), predictor_gradient = jax.value_and_grad(predictor_loss, has_aux=True)(
            explorer.params['predictor']
        )
        bonus_moments = explorer.bonus_moments.add(bonuses)
        next_actions = smoothed_policy(explorer.params['actor'], next_states, noise_key)
        next_values = networks['critic'].apply(explorer.target_critic, next_states, next_actions).min(axis=0)
        # An episode's end is a time limit: the future goes on, and there is always a next value.
        targets = bonuses / bonus_moments.std + DISCOUNT * next_values

        def critic_loss(params):
            values = networks['critic'].apply(params, states, actions)
            return jnp.square(values - targets).mean(), values.mean()

        def actor_loss(params):
            chosen = smoothed_policy(params, states, actor_key)
            return -networks['critic'].apply(explorer.params['critic'], states, chosen).min(axis=0).mean()

        (loss, value), critic_gradient = jax.value_and_grad(critic_loss, has_aux=True)(explorer.params['critic'])
        gradients = {
            'actor': jax.grad(actor_loss)(explorer.params['actor']),
            'critic': critic_gradient,
            'predictor': predictor_gradient,
        }
        params, opt_states = {}, {}
        for name, optimiser in optimisers.items():
            steps_taken, opt_states[name] = optimiser.update(gradients[name], explorer.opt_states[name])
            params[name] = optax.apply_updates(explorer.params[name], steps_taken)
        explorer = explorer.replace(
            params=params,
            opt_states=opt_states,
            target_critic=optax.incremental_update(params['critic'], explorer.target_critic, TAU),
            bonus_moments=bonus_moments,
        )
        return explorer, {'bonus': bonuses.mean(), 'critic_loss': loss, 'value': value}

    explorer, metrics = jax.lax.scan(update, explorer, jax.random.split(key, updates))
    return explorer, jax.tree.map(jnp.mean, metrics)
