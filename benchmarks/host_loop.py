"""The plain host loop that InFOM is timed against: the same losses, trained the way the field's JAX code usually does.

NumPy draws a batch on the host, one jitted call makes one update, one Adam holds every parameter (targets and modules
without a loss in this phase included), the vector field is a plain MLP on [x_t, t, s, a, z] at every Euler step with
each row repeated once per flow sample, and gradient statistics are computed at every step. The actor's loss enters at
every `actor_freq`-th fine-tuning step by a static flag. Everything else is ordinary good JAX: float32, one compilation
per flag, an unrolled Euler loop, no host synchronisation between updates. Buffers are not donated, as published code
does not. Written without the agent's losses and networks, which makes it a second derivation of the same mathematics;
random keys are split in the agent's order, so that equal parameters and keys give equal losses
(`tests/test_benchmarks.py`) where no label ends the task: as published, the occupancy goes on past it. States only.
Timing is `benchmarks/throughput.py`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class MLP(nn.Module):
    """Dense → GELU → (LayerNorm) per hidden width, then a Dense of `output_dim` if that is given."""

    hidden_dims: Sequence[int]
    output_dim: int | None = None
    layer_norm: bool = False

    @nn.compact
    def __call__(self, *inputs):
        x = jnp.concatenate(inputs, axis=-1)
        for width in self.hidden_dims:
            x = nn.gelu(nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())(x))
            if self.layer_norm:
                x = nn.LayerNorm()(x)
        if self.output_dim is not None:
            x = nn.Dense(self.output_dim, kernel_init=nn.initializers.xavier_uniform())(x)
        return x


class Gaussian(nn.Module):
    """An MLP with a mean head and, where `learned_std`, a log std head clipped to [−10, 2]: (mean, log std)."""

    output_dim: int
    hidden_dims: Sequence[int]
    layer_norm: bool
    learned_std: bool

    @nn.compact
    def __call__(self, *inputs):
        x = MLP(self.hidden_dims, layer_norm=self.layer_norm)(*inputs)
        scale = 1.0 if self.learned_std else 0.01
        means = nn.Dense(self.output_dim, kernel_init=nn.initializers.variance_scaling(scale, 'fan_avg', 'uniform'))(x)
        if not self.learned_std:
            return means, jnp.zeros_like(means)
        return means, jnp.clip(nn.Dense(self.output_dim, kernel_init=nn.initializers.xavier_uniform())(x), -10, 2)


def make_modules(observation_dim, action_dim, config):
    """The modules of the training state, by name; targets and online networks are modules alike."""
    value = functools.partial(MLP, config.value_hidden_dims, layer_norm=config.value_layer_norm)
    critics = nn.vmap(
        MLP, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=None, out_axes=0, axis_size=2
    )
    return {
        'vector_field': value(observation_dim),
        'target_vector_field': value(observation_dim),
        'intention_encoder': Gaussian(
            config.latent_dim, config.intention_encoder_hidden_dims, config.intention_encoder_layer_norm, True
        ),
        'critic': critics(config.value_hidden_dims, 1, config.value_layer_norm),
        'reward': MLP(config.reward_hidden_dims, 1, config.reward_layer_norm),
        'actor': Gaussian(action_dim, config.actor_hidden_dims, config.actor_layer_norm, False),
    }


class TrainState(flax.struct.PyTreeNode):
    """All parameters by module, one optimiser state over them, and the bounds that flow samples are clipped to."""

    params: dict[str, Any]
    opt_state: Any
    flow_bounds: tuple[jax.Array, jax.Array] | None
    modules: dict[str, nn.Module] = flax.struct.field(pytree_node=False)
    config: Any = flax.struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, observation_dim, action_dim, config, flow_bounds=None):
        """A fresh state; the target field starts as its online network."""
        s, a, z, t = (jnp.zeros((1, width)) for width in (observation_dim, action_dim, config.latent_dim, 1))
        inputs = {'intention_encoder': (s, a), 'critic': (s, a), 'reward': (s,), 'actor': (s,)}
        modules = make_modules(observation_dim, action_dim, config)
        keys = jax.random.split(key, len(modules))
        params = {
            name: module.init(keys[i], *inputs.get(name, (s, t, s, a, z)))['params']
            for i, (name, module) in enumerate(modules.items())
        }
        params['target_vector_field'] = params['vector_field']
        return cls(params, optax.adam(config.lr).init(params), flow_bounds, flax.core.FrozenDict(modules), config)

    def apply(self, name, params, *inputs):
        return self.modules[name].apply({'params': params[name]}, *inputs)

    # ----------------------------------------------------------------------------------------------------------- losses

    def sample_flow(self, name, params, noise, *conditions):
        """Euler integration from noise (rows, S) with conditions (rows, ·)."""
        x, steps = noise, self.config.num_flow_steps
        for step in range(steps):
            times = jnp.full((x.shape[0], 1), step / steps)
            x = x + self.apply(name, params, x, times, *conditions) / steps
            if self.flow_bounds is not None:
                x = jnp.clip(x, *self.flow_bounds)
        return x

    def sample_intentions(self, params, batch, key):
        means, log_stds = self.apply('intention_encoder', params, batch['next_observations'], batch['next_actions'])
        return means + jnp.exp(log_stds) * jax.random.normal(key, means.shape), means, log_stds

    def flow_loss(self, params, batch, key):
        """The SARSA flow occupancy loss plus kl_weight times the KL term."""
        s, a, next_s, next_a = (batch[k] for k in ('observations', 'actions', 'next_observations', 'next_actions'))
        latent_key, time_key, noise_key, next_noise_key = jax.random.split(key, 4)
        z, means, log_stds = self.sample_intentions(params, batch, latent_key)
        kl_loss = -0.5 * jnp.mean(1 + 2 * log_stds - means**2 - jnp.exp(2 * log_stds))

        times = jax.random.uniform(time_key, (s.shape[0], 1))
        noise = jax.random.normal(noise_key, s.shape)
        velocity = self.apply('vector_field', params, times * s + (1 - times) * noise, times, s, a, z)
        current_loss = jnp.mean((velocity - (s - noise)) ** 2, axis=-1)

        z = jax.lax.stop_gradient(z)
        noise = jax.random.normal(next_noise_key, s.shape)
        futures = self.sample_flow('target_vector_field', params, noise, next_s, next_a, z)
        x = times * futures + (1 - times) * noise
        target = jax.lax.stop_gradient(self.apply('target_vector_field', params, x, times, next_s, next_a, z))
        velocity = self.apply('vector_field', params, jax.lax.stop_gradient(x), times, s, a, z)
        future_loss = jnp.mean((velocity - target) ** 2, axis=-1)

        discount = self.config.discount
        flow_loss = jnp.mean((1 - discount) * current_loss + discount * future_loss)
        return flow_loss + self.config.kl_weight * kl_loss, {
            'flow_loss': flow_loss,
            'current_flow_loss': current_loss.mean(),
            'future_flow_loss': future_loss.mean(),
            'kl_loss': kl_loss,
        }

    def reward_loss(self, params, batch):
        predictions = self.apply('reward', params, batch['reward_observations']).squeeze(-1)
        loss = jnp.mean((predictions - batch['rewards']) ** 2)
        return loss, {'reward_loss': loss, 'reward_prediction': predictions.mean()}

    def critic_loss(self, params, batch, key):
        """Expectile regression of Q on the mean reward of flow samples under random intentions."""
        s, a, samples = batch['observations'], batch['actions'], self.config.num_flow_goals
        latent_key, noise_key = jax.random.split(key)
        if self.config.critic_latent_type == 'prior':
            z = jax.random.normal(latent_key, (s.shape[0], self.config.latent_dim))
        else:
            z, _, _ = self.sample_intentions(params, batch, latent_key)
        noise = jax.random.normal(noise_key, (s.shape[0] * samples, s.shape[1]))
        repeated = [jnp.repeat(condition, samples, axis=0) for condition in (s, a, z)]
        futures = self.sample_flow('vector_field', params, noise, *repeated)
        rewards = self.apply('reward', params, futures).reshape(s.shape[0], samples)
        targets = jax.lax.stop_gradient(rewards.mean(axis=1) / (1 - self.config.discount))

        q = self.apply('critic', params, s, a).squeeze(-1)
        error = targets - q
        weight = jnp.where(error >= 0, self.config.expectile, 1 - self.config.expectile)
        loss = (weight * error**2).mean()
        return loss, {
            'critic_loss': loss,
            'q_mean': q.mean(),
            'q_max': q.max(),
            'q_min': q.min(),
            'q_target_mean': targets.mean(),
        }

    def bc_loss(self, params, batch):
        means, log_stds = self.apply('actor', params, batch['observations'])
        log_prob = jax.scipy.stats.norm.logpdf(batch['actions'], means, jnp.exp(log_stds)).sum(axis=-1)
        metrics = {'bc_loss': -log_prob.mean(), 'actor_mse': jnp.mean((jnp.clip(means, -1, 1) - batch['actions']) ** 2)}
        return -log_prob.mean(), metrics, means

    def actor_loss(self, params, batch):
        """Behaviour-regularised policy improvement; the critic is a constant here."""
        bc_loss, metrics, means = self.bc_loss(params, batch)
        frozen = {'critic': jax.lax.stop_gradient(params['critic'])}
        q = self.apply('critic', frozen, batch['observations'], jnp.clip(means, -1, 1)).squeeze(-1)
        q = q.min(axis=0) if self.config.q_agg == 'min' else q.mean(axis=0)
        scale = jax.lax.stop_gradient(jnp.abs(q).mean()) if self.config.normalize_q_loss else 1.0
        loss = -q.mean() / scale + self.config.alpha * bc_loss
        return loss, {'actor_loss': loss, 'actor_q': q.mean(), **metrics}

    def pretraining_loss(self, params, batch, key):
        flow_loss, flow_metrics = self.flow_loss(params, batch, key)
        bc_loss, bc_metrics, _ = self.bc_loss(params, batch)
        return flow_loss + bc_loss, {'loss': flow_loss + bc_loss, **flow_metrics, **bc_metrics}

    def finetuning_loss(self, params, batch, key, full_update=True):
        critic_key, flow_key = jax.random.split(key)
        reward_loss, reward_metrics = self.reward_loss(params, batch)
        critic_loss, critic_metrics = self.critic_loss(params, batch, critic_key)
        flow_loss, flow_metrics = self.flow_loss(params, batch, flow_key)
        loss = reward_loss + critic_loss + flow_loss
        metrics = {**reward_metrics, **critic_metrics, **flow_metrics}
        if full_update:
            actor_loss, actor_metrics = self.actor_loss(params, batch)
            loss = loss + actor_loss
            metrics.update(actor_metrics)
        return loss, {'loss': loss, **metrics}

    # ---------------------------------------------------------------------------------------------------------- updates

    def update(self, loss_fn):
        """One joint Adam step on everything, gradient statistics, and the target's moving average."""
        grads, metrics = jax.grad(loss_fn, has_aux=True)(self.params)
        leaves = jax.tree.leaves(grads)
        metrics['grad/max'] = jnp.stack([g.max() for g in leaves]).max()
        metrics['grad/min'] = jnp.stack([g.min() for g in leaves]).min()
        metrics['grad/norm'] = jnp.stack([jnp.abs(g).sum() for g in leaves]).sum()

        updates, opt_state = optax.adam(self.config.lr).update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        params['target_vector_field'] = jax.tree.map(
            lambda p, t: p * self.config.tau + t * (1 - self.config.tau),
            params['vector_field'],
            params['target_vector_field'],
        )
        return self.replace(params=params, opt_state=opt_state), metrics

    @jax.jit
    def pretrain(self, batch, key):
        return self.update(lambda params: self.pretraining_loss(params, batch, key))

    @functools.partial(jax.jit, static_argnames='full_update')
    def finetune(self, batch, key, full_update):
        return self.update(lambda params: self.finetuning_loss(params, batch, key, full_update))


def sample_batch(data, rng, batch_size):
    """A batch of NumPy arrays, uniformly drawn from `data` (`row_arrays`)."""
    rows = data['rows'][rng.integers(len(data['rows']), size=batch_size)]
    batch = {
        'observations': data['observations'][rows],
        'actions': data['actions'][rows],
        'next_observations': data['observations'][rows + 1],
        'next_actions': data['actions'][rows + 1],
    }
    if 'rewards' in data:
        batch.update(rewards=data['rewards'][rows], masks=data['masks'][rows])
        batch['reward_observations'] = batch[data['reward_at']]
    return batch


def train(state, data, rng, key, start, updates, phase):
    """`updates` updates of one phase after `start` earlier ones: (state, metrics of the last one), not waited for."""
    metrics = {}
    for step in range(start, start + updates):
        batch = sample_batch(data, rng, state.config.batch_size)
        key, step_key = jax.random.split(key)
        if phase == 'pretraining':
            state, metrics = state.pretrain(batch, step_key)
        else:
            full_update = (step + 1) % state.config.actor_freq == 0
            state, metrics = state.finetune(batch, step_key, full_update=full_update)
    return state, metrics


def row_arrays(dataset):
    """The NumPy row arrays that `sample_batch` takes, of a `utils.datasets.Dataset` on the host."""
    data = {'observations': dataset.observations, 'actions': dataset.actions, 'rows': dataset.next_action_rows}
    if dataset.rewards is not None:
        data.update(rewards=dataset.rewards, masks=dataset.masks, reward_at=dataset.reward_at)
    return data
