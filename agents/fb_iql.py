"""FB + IQL: forward-backward representations (arXiv 2103.07945, 2209.14935), fine-tuned by IQL (arXiv 2110.06169).

Pre-training fits, on reward-free transitions, F(s, a, z) and B(s) such that F(s, a, z)·B(g) is the ratio of the
discounted occupancy of (s, a) under the policy π(·|s, z), Σ γ^t from s' on, to the data's density at g, and improves
that policy on F(s, a, z)·z: for a reward r, it is the task's optimal policy at z = E r·B.
Fine-tuning infers that z from labelled states and goes on with IQL at it, from the pre-trained policy.

This file holds the configuration, the losses and the updates; sampling batches, looping over steps and files live
elsewhere.
Shapes: B batch, E ensemble members, A action dimensions, Z latent dimensions.
"""

from typing import Any, ClassVar, NamedTuple

import flax
import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from jax import lax

from agents import common
from utils.encoders import make_encoder
from utils.errors import UserError
from utils.networks import GaussianActor, ScalarHead, VectorHead


class Networks(NamedTuple):
    """Module definitions (no parameters); names are the keys of `FBIQLAgent.params`."""

    forward: nn.Module
    backward: nn.Module
    value: nn.Module
    critic: nn.Module
    actor: nn.Module


class FBIQLAgent(flax.struct.PyTreeNode):
    """Parameters and optimiser states; every method is pure, jit-able, and vmap-able over seeds."""

    params: dict[str, Any]
    target_params: dict[str, Any]
    opt_states: dict[str, Any]
    task_latent: jax.Array  # (Z,): the z of the task, a random one until `begin_finetuning`.
    networks: Networks = flax.struct.field(pytree_node=False)
    config: ml_collections.FrozenConfigDict = flax.struct.field(pytree_node=False)

    # What the training loop must put into a batch besides observations, actions, next observations (and rewards).
    needs: ClassVar[frozenset[str]] = frozenset()
    # What a pre-training need not have for fine-tuning to start from it.
    finetuning_state: ClassVar[tuple[str, ...]] = (common.STEP,)

    # ------------------------------------------------------------------------------------------------------- features

    def forward(self, params, observations, actions, latents):
        """F_e(s, a, z): (E, B, Z)."""
        return self.networks.forward.apply({'params': params['forward']}, observations, actions, latents)

    def backward(self, params, observations):
        """B̂(s) = √Z·B(s)/‖B(s)‖: (B, Z)."""
        return common.to_sphere(self.networks.backward.apply({'params': params['backward']}, observations))

    def sample_latents(self, params, batch, key):
        """z (B, Z) of the batch's rows: uniform on the sphere of radius √Z with probability `latent_mix_prob`, else
        B̂ of another row's state."""
        sphere_key, permutation_key, mix_key = jax.random.split(key, 3)
        batch_size = batch['actions'].shape[0]
        random_latents = common.sphere_latents(sphere_key, (batch_size, self.config.latent_dim))
        others = jax.random.permutation(permutation_key, batch_size)
        goal_latents = lax.stop_gradient(self.backward(params, batch['observations'][others]))
        is_random = jax.random.uniform(mix_key, (batch_size, 1)) < self.config.latent_mix_prob
        return jnp.where(is_random, random_latents, goal_latents)

    # --------------------------------------------------------------------------------------------------------- losses

    def representation_loss(self, params, batch, latents):
        """L_FB + c·L_orth: the Bellman residual of the occupancies, M̄ by the target networks at ã = clip₁(mode of
        π(·|s', z)), and the orthonormality of B̂."""
        next_observations = batch['next_observations']
        actor_params = lax.stop_gradient(params['actor'])
        next_means, _ = self.networks.actor.apply({'params': actor_params}, next_observations, latents)
        next_forwards = self.forward(self.target_params, next_observations, jnp.clip(next_means, -1, 1), latents)
        next_measures = next_forwards @ self.backward(self.target_params, next_observations).T  # (E, B, B)
        mean = self.config.repr_agg == 'mean'
        next_measures = next_measures.mean(axis=0) if mean else next_measures.min(axis=0)

        forwards = self.forward(params, batch['observations'], batch['actions'], latents)
        backwards = self.backward(params, next_observations)
        fb_loss, fb_metrics = forward_backward_loss(forwards @ backwards.T, next_measures, self.config.discount)
        orthonormality = orthonormality_loss(backwards)
        loss = fb_loss + self.config.orthonorm_coeff * orthonormality
        return loss, {'fb_loss': fb_loss, 'orthonormality_loss': orthonormality, **fb_metrics}

    def skill_loss(self, params, batch, latents):
        """L_π = −E min_e F_e(s, clip₁(mode), z)·z − α_repr·E log π(a|s, z)."""
        means, stds = self.networks.actor.apply({'params': params['actor']}, batch['observations'], latents)
        frozen = lax.stop_gradient(params)
        forwards = self.forward(frozen, batch['observations'], jnp.clip(means, -1, 1), latents)
        q = (forwards * latents).sum(axis=2).min(axis=0)
        bc_loss, metrics = common.behavioral_cloning(means, stds, batch['actions'])
        loss = common.q_maximization(q, normalize=False) + self.config.alpha_repr * bc_loss
        return loss, {'actor_loss': loss, 'actor_q': q.mean(), **metrics}

    def pretraining_loss(self, params, batch, key):
        """L = L_FB + c·L_orth + L_π, with a z for each row."""
        latents = self.sample_latents(params, batch, key)
        return common.total([self.representation_loss(params, batch, latents), self.skill_loss(params, batch, latents)])

    def finetuning_loss(self, params, batch, key, update_actor: bool = True):
        """L = L_V + L_Q of IQL at the task's z, + L_π in the steps that update the actor."""
        del key  # Nothing is drawn.
        latents = common.task_latents(self, len(batch['actions']))
        terms = common.latent_iql_losses(
            self,
            params,
            batch,
            latents,
            batch['rewards'],
            batch['masks'],
            alpha=self.config.alpha_awr,
            update_actor=update_actor,
        )
        return common.total(terms)

    # -------------------------------------------------------------------------------------------------------- updates

    def pretrain(self, batch, key):
        """One reward-free update of the representations and the policy of all z; returns (agent, metrics)."""
        modules = ['forward', 'backward', 'actor']
        return self._step(modules, lambda params: self.pretraining_loss(params, batch, key))

    def finetune(self, batch, key, *, update_actor: bool):
        """One update on labelled data; `update_actor` is static, and without it the actor stays exactly where it is."""
        modules = ['value', 'critic', 'actor'] if update_actor else ['value', 'critic']
        agent, metrics = self._step(modules, lambda params: self.finetuning_loss(params, batch, key, update_actor))
        return common.count_update(agent), metrics

    def begin_finetuning(self, labelled_batch, key):
        """The switch between the phases: z ∝ mean r·B̂(s̃) over the labelled batch, and every target is set to a copy
        of its online network."""
        backwards = common.map_observations(
            lambda observations: self.backward(self.params, observations), labelled_batch['reward_observations']
        )
        direction = (labelled_batch['rewards'][:, None] * backwards).mean(axis=0)
        return common.reset_targets(self).replace(task_latent=common.task_latent(direction, key))

    def q_values(self, observations, actions):
        """min_k Q_k(s, a, z) at the task's z: (B,)."""
        return common.pessimistic_q(
            self, self.params, observations, actions, common.task_latents(self, len(observations))
        )

    def act(self, observations, key, temperature=1.0):
        """Actions (B, A) in [−1, 1] at the task's z: the mode plus `temperature` times the policy's noise; 0 gives the
        mode."""
        latents = common.task_latents(self, len(observations))
        means, stds = self.networks.actor.apply({'params': common.acting_actor(self)}, observations, latents)
        return jnp.clip(means + temperature * stds * jax.random.normal(key, means.shape), -1, 1)

    def _step(self, modules, loss_fn):
        return common.update_modules(self, modules, loss_fn)

    # ------------------------------------------------------------------------------------------------------- creation

    @classmethod
    def create(cls, key, example_batch, config):
        """A fresh agent for batches like `example_batch`.

        key: a JAX random key. example_batch: observations (B, …), actions (B, A). Raises UserError for an inconsistent
        config.
        """
        config = ml_collections.FrozenConfigDict(config)
        validate_config(config)
        observations, actions = example_batch['observations'], example_batch['actions']
        latent_key, key = jax.random.split(key)
        keys = dict(zip(Networks._fields, jax.random.split(key, len(Networks._fields)), strict=True))
        params = {}

        def init(name, module, *inputs, **kwargs):
            params[name] = module.init(keys[name], *inputs, **kwargs)['params']

        latents = jnp.zeros((*actions.shape[:-1], config.latent_dim))
        networks = Networks(
            forward=VectorHead(
                config.latent_dim,
                config.repr_hidden_dims,
                config.repr_layer_norm,
                num_ensembles=2,
                encoder=make_encoder(config.encoder),
            ),
            backward=VectorHead(
                config.latent_dim, config.repr_hidden_dims, config.repr_layer_norm, encoder=make_encoder(config.encoder)
            ),
            value=ScalarHead(config.value_hidden_dims, config.value_layer_norm, encoder=make_encoder(config.encoder)),
            critic=ScalarHead(
                config.value_hidden_dims, config.value_layer_norm, num_ensembles=2, encoder=make_encoder(config.encoder)
            ),
            actor=GaussianActor(
                action_dim=actions.shape[-1],
                hidden_dims=config.actor_hidden_dims,
                layer_norm=config.actor_layer_norm,
                const_std=config.const_std,
                encoder=make_encoder(config.encoder),
            ),
        )
        init('forward', networks.forward, observations, actions, latents)
        init('backward', networks.backward, observations)
        init('value', networks.value, observations, latents)
        init('critic', networks.critic, observations, actions, latents)
        init('actor', networks.actor, observations, latents)
        return cls(
            params=params,
            target_params=common.copy_of({name: params[name] for name in ('forward', 'backward', 'critic')}),
            opt_states=common.init_adam(params, config),
            task_latent=common.sphere_latents(latent_key, (config.latent_dim,)),
            networks=networks,
            config=config,
        )


def forward_backward_loss(measures, next_measures, discount: float):
    """L_FB = E_i Σ_e [−M_ii + 1/(2(B−1))·Σ_{j≠i} (M_ij − γ·M̄_ij)²] (FB, arXiv 2103.07945; 2209.14935, §3), summed over
    the two F as in the published code: `orthonorm_coeff` weighs against both.

    measures: (E, B, B), F_e(s_i, a_i, z_i)·B̂(s'_j); next_measures: (B, B), of the target networks at s'_i.
    """
    residuals = measures - discount * lax.stop_gradient(next_measures)
    diagonal = -jnp.diagonal(measures, axis1=1, axis2=2).mean(axis=1).sum()
    off_diagonal = 0.5 * off_diagonal_mean(residuals**2).sum()
    return diagonal + off_diagonal, {
        'fb_diagonal_loss': diagonal,
        'fb_off_diagonal_loss': off_diagonal,
        'measure_mean': measures.mean(),
        'next_measure_mean': next_measures.mean(),
    }


def orthonormality_loss(backwards):
    """L_orth = E_i[−2·C_ii + 1/(B−1)·Σ_{j≠i} C_ij²], C_ij = B̂(s_i)·B̂(s_j) (FB, arXiv 2209.14935):
    ‖E B̂B̂ᵀ − I‖² up to a constant. backwards: (B, Z)."""
    covariances = backwards @ backwards.T
    return -2 * jnp.diagonal(covariances).mean() + off_diagonal_mean(covariances**2)


def off_diagonal_mean(x):
    """Mean over the entries off the diagonal of x (…, B, B): (…)."""
    size = x.shape[-1]
    return (x * (1 - jnp.eye(size))).sum(axis=(-2, -1)) / max(size * (size - 1), 1)


AGENT = FBIQLAgent  # What `agents.load` hands to the training loop.
has_schedule = common.has_schedule


def validate_config(config):
    """Raises UserError for values that no FB run can have."""
    common.validate_optimizer(config)
    common.require_choice(config, 'repr_agg', ('mean', 'min'))
    if not 0 <= config.latent_mix_prob <= 1:
        raise UserError(f'agent.latent_mix_prob={config.latent_mix_prob}: expected a probability, from 0 to 1')
    common.require_at_least(0, config, 'orthonorm_coeff', 'alpha_repr', 'alpha_awr')
    common.require_at_least(1, config, 'num_latent_inference_samples')


def get_config():
    """The defaults; per-task published values come from `utils/presets.py`."""
    return ml_collections.ConfigDict(
        dict(
            agent_name='fb_iql',
            lr=3e-4,  # Adam learning rate.
            actor_lr=ml_collections.config_dict.placeholder(float),  # The actor's own learning rate; None: lr.
            finetuning_schedule='constant',  # Learning rates of fine-tuning: constant, as published; cosine, to 0.
            schedule_steps=ml_collections.config_dict.placeholder(int),  # Updates it takes; None: all of a run's.
            actor_tau=0.001,  # Rate, per actor update, of the average of the actor that acts; 1: no average.
            joint_adam=False,  # One Adam over all modules, trained or not, as published.
            batch_size=256,
            repr_hidden_dims=(512, 512, 512, 512),  # Forward and backward representation.
            actor_hidden_dims=(512, 512, 512, 512),
            value_hidden_dims=(512, 512, 512, 512),  # V and Q of fine-tuning.
            repr_layer_norm=True,
            value_layer_norm=True,
            actor_layer_norm=False,
            latent_dim=512,  # Z.
            discount=0.99,  # γ.
            tau=0.005,  # Rate of the target networks' moving average.
            repr_agg='mean',  # Aggregation of the two target occupancies: mean or min.
            orthonorm_coeff=1.0,  # c, weight of the orthonormality of B.
            latent_mix_prob=0.5,  # Share of pre-training's latents that are uniform on the sphere, not B of a state.
            alpha_repr=10.0,  # Weight of behavioural cloning in pre-training's actor loss; tuned per task.
            num_latent_inference_samples=10_000,  # Labelled samples that the task's latent is inferred from.
            expectile=0.9,  # κ of IQL's value loss.
            alpha_awr=10.0,  # Inverse temperature of IQL's advantage-weighted regression; tuned per task.
            actor_freq=4,  # Fine-tuning steps per actor update.
            const_std=True,  # Policy standard deviation fixed at 1; else a learned vector.
            encoder=ml_collections.config_dict.placeholder(str),  # Image encoder (utils/encoders.py); None: states.
        )
    )
