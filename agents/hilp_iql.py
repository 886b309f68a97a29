"""HILP + IQL: Hilbert representations (arXiv 2402.15567), with skills and fine-tuning by IQL (arXiv 2110.06169).

Pre-training fits, on reward-free transitions, φ whose distances ‖φ(s) − φ(g)‖ are temporal ones, discounted, as the
goal-reaching value −‖φ(s) − φ(g)‖, and, by IQL, skills π(a|s, z) that move φ along z: r = (φ(s') − φ(s))·z.
Fine-tuning infers the z whose reward is nearest to the task's, and IQL goes on with the same networks at it.

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
from utils.goals import Goals
from utils.networks import GaussianActor, ScalarHead, VectorHead

# Share of goals that are future states of the trajectory, as in HILP; the others are any state of the data.
FUTURE_GOALS = 0.625


class Networks(NamedTuple):
    """Module definitions (no parameters); names are the keys of `HILPIQLAgent.params`."""

    representation: nn.Module
    value: nn.Module
    critic: nn.Module
    actor: nn.Module


class HILPIQLAgent(flax.struct.PyTreeNode):
    """Parameters and optimiser states; every method is pure, jit-able, and vmap-able over seeds."""

    params: dict[str, Any]
    target_params: dict[str, Any]
    opt_states: dict[str, Any]
    task_latent: jax.Array  # (Z,): the z of the task, a random one until `begin_finetuning`.
    networks: Networks = flax.struct.field(pytree_node=False)
    config: ml_collections.FrozenConfigDict = flax.struct.field(pytree_node=False)

    # What a pre-training need not have for fine-tuning to start from it.
    finetuning_state: ClassVar[tuple[str, ...]] = (common.STEP,)

    @property
    def needs(self) -> frozenset:
        """What the training loop must put into a batch besides observations, actions, next observations (and
        rewards): the goals of the distances."""
        discount = self.config.discount
        return frozenset({Goals('goal', future=FUTURE_GOALS, marginal=1 - FUTURE_GOALS, discount=discount)})

    # ------------------------------------------------------------------------------------------------------- features

    def represent(self, params, observations):
        """φ_e(s): (E, B, Z)."""
        return self.networks.representation.apply({'params': params['representation']}, observations)

    # --------------------------------------------------------------------------------------------------------- losses

    def representation_loss(self, params, batch):
        """L_φ: the expectile temporal difference of V(s, g) = −‖φ(s) − φ(g)‖ with reward −1 until the goal is
        reached."""
        observations, next_observations, goals = batch['observations'], batch['next_observations'], batch['goals']
        target_goals = self.represent(self.target_params, goals)
        return hilbert_loss(
            goal_values(self.represent(params, observations), self.represent(params, goals)),
            goal_values(self.represent(self.target_params, observations), target_goals),
            goal_values(self.represent(self.target_params, next_observations), target_goals),
            batch['goal_masks'],
            self.config.discount,
            self.config.expectile,
        )

    def displacements(self, params, batch):
        """φ₁(s') − φ₁(s), (B, Z), without gradient: what skills are rewarded for, along their z."""
        params = lax.stop_gradient(params)
        return self.represent(params, batch['next_observations'])[0] - self.represent(params, batch['observations'])[0]

    def skill_losses(self, params, batch, key):
        """IQL on r = (φ₁(s') − φ₁(s))·z without termination, z uniform on the sphere of radius √Z: a list of (loss,
        metrics)."""
        latents = common.sphere_latents(key, (batch['actions'].shape[0], self.config.latent_dim))
        rewards = (self.displacements(params, batch) * latents).sum(axis=1)
        return common.latent_iql_losses(
            self, params, batch, latents, rewards, jnp.ones_like(rewards), alpha=self.config.alpha, update_actor=True
        )

    def pretraining_loss(self, params, batch, key):
        """L = L_φ + L_V + L_Q + L_π, the last three of the skills."""
        terms = [self.representation_loss(params, batch), *self.skill_losses(params, batch, key)]
        return common.total(terms)

    def finetuning_loss(self, params, batch, key, update_actor: bool = True):
        """L = L_V + L_Q of IQL at the task's z and reward, + L_π in the steps that update the actor."""
        del key  # Nothing is drawn.
        latents = common.task_latents(self, len(batch['actions']))
        terms = common.latent_iql_losses(
            self,
            params,
            batch,
            latents,
            batch['rewards'],
            batch['masks'],
            alpha=self.config.alpha,
            update_actor=update_actor,
        )
        return common.total(terms)

    # -------------------------------------------------------------------------------------------------------- updates

    def pretrain(self, batch, key):
        """One reward-free update of the representation and the skills; returns (agent, metrics)."""
        modules = ['representation', 'value', 'critic', 'actor']
        return self._step(modules, lambda params: self.pretraining_loss(params, batch, key))

    def pretrain_representation(self, batch):
        """One update of the representation without the skills; returns (agent, metrics)."""
        return self._step(['representation'], lambda params: self.representation_loss(params, batch))

    def finetune(self, batch, key, *, update_actor: bool):
        """One update on labelled data; `update_actor` is static, and without it the actor stays exactly where it is."""
        modules = ['value', 'critic', 'actor'] if update_actor else ['value', 'critic']
        agent, metrics = self._step(modules, lambda params: self.finetuning_loss(params, batch, key, update_actor))
        return common.count_update(agent), metrics

    def begin_finetuning(self, labelled_batch, key):
        """The switch between the phases: z = argmin E((φ₁(s') − φ₁(s))·z − r)² over the labelled batch, scaled to √Z,
        and every target is set to a copy of its online network."""

        def represent(observations):
            return self.represent(self.params, observations)[0]

        with jax.default_matmul_precision('highest'):  # The cut-off below is that of float32.
            displacements = common.map_observations(
                represent, labelled_batch['next_observations']
            ) - common.map_observations(represent, labelled_batch['observations'])
        # NumPy's cut-off for singular values: below it there is rounding, which would be most of z once it is scaled.
        cutoff = jnp.finfo(displacements.dtype).eps * max(displacements.shape)
        direction = jnp.linalg.lstsq(displacements, labelled_batch['rewards'], rcond=cutoff)[0]
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
            representation=VectorHead(
                config.latent_dim,
                config.value_hidden_dims,
                config.value_layer_norm,
                num_ensembles=2,
                encoder=make_encoder(config.encoder),
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
        init('representation', networks.representation, observations)
        init('value', networks.value, observations, latents)
        init('critic', networks.critic, observations, actions, latents)
        init('actor', networks.actor, observations, latents)
        return cls(
            params=params,
            target_params=common.copy_of({name: params[name] for name in ('representation', 'critic')}),
            opt_states=common.init_adam(params, config),
            task_latent=common.sphere_latents(latent_key, (config.latent_dim,)),
            networks=networks,
            config=config,
        )


def goal_values(representations, goals):
    """V_e(s, g) = −‖φ_e(s) − φ_e(g)‖ (HILP, arXiv 2402.15567, §4): (E, B, Z), (E, B, Z) → (E, B)."""
    squared = ((representations - goals) ** 2).sum(axis=-1)
    # The root has no finite derivative where a state is its own goal; the value there is 0 whatever φ is.
    apart = squared > 0
    return -jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)


def hilbert_loss(values, target_values, next_target_values, goal_masks, discount: float, expectile: float):
    """L_φ = Σ_k E w(A)·(y_k − V_k(s, g))² (HILP, arXiv 2402.15567, §4), with r = −1{t≠goal} and m = 1{t≠goal}:
    y_k = r + γ·m·V̄_k(s', g), A = r + γ·m·min_k V̄_k(s', g) − mean_k V̄_k(s, g), and w(A) = κ if A ≥ 0, else 1 − κ.

    The values: (E, B); goal_masks: (B,), m.
    """
    targets = lax.stop_gradient(-goal_masks + discount * goal_masks * next_target_values)  # (E, B)
    advantages = targets.min(axis=0) - target_values.mean(axis=0)
    weights = lax.stop_gradient(jnp.where(advantages >= 0, expectile, 1 - expectile))
    loss = (weights * (targets - values) ** 2).mean(axis=1).sum()
    return loss, {
        'representation_loss': loss,
        'goal_value_mean': values.mean(),
        'goal_value_min': values.min(),
        'goal_advantage': advantages.mean(),
    }


AGENT = HILPIQLAgent  # What `agents.load` hands to the training loop.
has_schedule = common.has_schedule


def validate_config(config):
    """Raises UserError for values that no HILP run can have."""
    common.validate_optimizer(config)
    common.require_at_least(0, config, 'alpha')
    common.require_at_least(1, config, 'num_latent_inference_samples')


def get_config():
    """The defaults; per-task published values come from `utils/presets.py`."""
    return ml_collections.ConfigDict(
        dict(
            agent_name='hilp_iql',
            lr=3e-4,  # Adam learning rate.
            actor_lr=ml_collections.config_dict.placeholder(float),  # The actor's own learning rate; None: lr.
            finetuning_schedule='constant',  # Learning rates of fine-tuning: constant, as published; cosine, to 0.
            schedule_steps=ml_collections.config_dict.placeholder(int),  # Updates it takes; None: all of a run's.
            actor_tau=0.001,  # Rate, per actor update, of the average of the actor that acts; 1: no average.
            joint_adam=False,  # One Adam over all modules, trained or not, as published.
            batch_size=256,
            actor_hidden_dims=(512, 512, 512, 512),
            value_hidden_dims=(512, 512, 512, 512),  # Representation, V and Q.
            value_layer_norm=True,
            actor_layer_norm=False,
            latent_dim=512,  # Z.
            discount=0.99,  # γ, also of the goals' geometric offsets.
            tau=0.005,  # Rate of the target networks' moving average.
            expectile=0.9,  # κ of the representation's and of IQL's expectile losses.
            alpha=10.0,  # Inverse temperature of IQL's advantage-weighted regression; tuned per task.
            num_latent_inference_samples=10_000,  # Labelled samples that the task's latent is inferred from.
            actor_freq=4,  # Fine-tuning steps per actor update.
            const_std=True,  # Policy standard deviation fixed at 1; else a learned vector.
            encoder=ml_collections.config_dict.placeholder(str),  # Image encoder (utils/encoders.py); None: states.
        )
    )
