"""IQL: Implicit Q-Learning (arXiv 2110.06169).

Pre-training clones the behaviour. Fine-tuning fits V to an expectile of Q over the data's actions, so that no action
outside the data is ever evaluated, fits Q to r + γ·V(s'), and extracts a policy: by advantage-weighted regression (AWR,
arXiv 1910.00177), or by maximising Q with behavioural cloning as regulariser.

This file holds the configuration, the losses and the updates; sampling batches, looping over steps and files live
elsewhere.
Shapes: B batch, A action dimensions.
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
from utils.networks import GaussianActor, ScalarHead


class Networks(NamedTuple):
    """Module definitions (no parameters); names are the keys of `IQLAgent.params`."""

    value: nn.Module
    critic: nn.Module
    actor: nn.Module


class IQLAgent(flax.struct.PyTreeNode):
    """Parameters and optimiser states; every method is pure, jit-able, and vmap-able over seeds."""

    params: dict[str, Any]
    target_params: dict[str, Any]
    opt_states: dict[str, Any]
    networks: Networks = flax.struct.field(pytree_node=False)
    config: ml_collections.FrozenConfigDict = flax.struct.field(pytree_node=False)

    # What the training loop must put into a batch besides observations, actions, next observations (and rewards).
    needs: ClassVar[frozenset[str]] = frozenset()
    # What a pre-training need not have for fine-tuning to start from it.
    finetuning_state: ClassVar[tuple[str, ...]] = (common.STEP,)

    # --------------------------------------------------------------------------------------------------------- losses

    def value_loss(self, params, batch):
        """L_V = E ρ_κ(min_k Q̄_k(s, a) − V(s)) (eq. 5)."""
        target_qs = self.networks.critic.apply(
            {'params': self.target_params['critic']}, batch['observations'], batch['actions']
        )  # (2, B)
        values = self.networks.value.apply({'params': params['value']}, batch['observations'])
        return common.iql_value_loss(target_qs, values, self.config.expectile)

    def critic_loss(self, params, batch):
        """L_Q = E Σ_k (Q_k(s, a) − (r + γ·m·sg V(s')))² (eq. 6)."""
        next_values = self.networks.value.apply({'params': params['value']}, batch['next_observations'])
        qs = self.networks.critic.apply({'params': params['critic']}, batch['observations'], batch['actions'])  # (2, B)
        return common.iql_critic_loss(qs, next_values, batch['rewards'], batch['masks'], self.config.discount)

    def cloning_loss(self, params, batch):
        """L_BC = −E log π(a|s)."""
        means, stds = self.networks.actor.apply({'params': params['actor']}, batch['observations'])
        return common.behavioral_cloning(means, stds, batch['actions'])

    def actor_loss(self, params, batch):
        """`awr`: L_π = −E sg[w]·log π(a|s), w = min(exp(α·A), 100), A = min_k Q_k(s, a) − V(s).
        `ddpgbc`: L_π = −E q / sg E|q| − α·E log π(a|s), q = min_k Q_k(s, clip₁(mode))."""
        means, stds = self.networks.actor.apply({'params': params['actor']}, batch['observations'])
        frozen = lax.stop_gradient(params)
        if self.config.actor_loss == 'awr':
            qs = self.networks.critic.apply({'params': frozen['critic']}, batch['observations'], batch['actions'])
            values = self.networks.value.apply({'params': params['value']}, batch['observations'])
            return common.advantage_weighted_regression(qs, values, means, stds, batch['actions'], self.config.alpha)
        q = common.pessimistic_q(self, frozen, batch['observations'], jnp.clip(means, -1, 1))
        bc_loss, metrics = common.behavioral_cloning(means, stds, batch['actions'])
        loss = common.q_maximization(q, normalize=True) + self.config.alpha * bc_loss
        return loss, {'actor_loss': loss, 'actor_q': q.mean(), **metrics}

    def pretraining_loss(self, params, batch, key):
        """L = L_BC."""
        del key  # Cloning draws nothing.
        loss, metrics = self.cloning_loss(params, batch)
        return loss, {'loss': loss, **metrics}

    def finetuning_loss(self, params, batch, key, update_actor: bool = True):
        """L = L_V + L_Q, + L_π in the steps that update the actor."""
        del key  # None of the terms draws anything.
        terms = [self.value_loss(params, batch), self.critic_loss(params, batch)]
        if update_actor:
            terms.append(self.actor_loss(params, batch))
        return common.total(terms)

    # -------------------------------------------------------------------------------------------------------- updates

    def pretrain(self, batch, key):
        """One update of the cloned actor; returns (agent, metrics)."""
        return self._step(['actor'], lambda params: self.pretraining_loss(params, batch, key))

    def finetune(self, batch, key, *, update_actor: bool):
        """One update on labelled data; `update_actor` is static, and without it the actor stays exactly where it is."""
        modules = ['value', 'critic']
        modules += ['actor'] if update_actor else []
        agent, metrics = self._step(modules, lambda params: self.finetuning_loss(params, batch, key, update_actor))
        return common.count_update(agent), metrics

    def begin_finetuning(self, labelled_batch, key):
        """The switch between the phases: the target critic is set to a copy of the critic."""
        del labelled_batch, key  # IQL infers nothing from labelled data here.
        return common.reset_targets(self)

    def q_values(self, observations, actions):
        """min_k Q_k(s, a): (B,)."""
        return common.pessimistic_q(self, self.params, observations, actions)

    def act(self, observations, key, temperature=1.0):
        """Actions (B, A) in [−1, 1]: the mode plus `temperature` times the policy's noise; 0 gives the mode."""
        means, stds = self.networks.actor.apply({'params': common.acting_actor(self)}, observations)
        return jnp.clip(means + temperature * stds * jax.random.normal(key, means.shape), -1, 1)

    def _step(self, modules, loss_fn):
        return common.update_modules(self, modules, loss_fn)

    # ------------------------------------------------------------------------------------------------------- creation

    @classmethod
    def create(cls, key, example_batch, config):
        """A fresh agent for batches like `example_batch`.

        key: a JAX random key. example_batch: observations (B, …) and actions (B, A). Raises UserError for an
        inconsistent config.
        """
        config = ml_collections.FrozenConfigDict(config)
        validate_config(config)
        observations, actions = example_batch['observations'], example_batch['actions']
        keys = dict(zip(Networks._fields, jax.random.split(key, len(Networks._fields)), strict=True))
        networks = Networks(
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
        params = {}

        def init(name, module, *inputs):
            params[name] = module.init(keys[name], *inputs)['params']

        init('value', networks.value, observations)
        init('critic', networks.critic, observations, actions)
        init('actor', networks.actor, observations)
        return cls(
            params=params,
            target_params=common.copy_of({'critic': params['critic']}),
            opt_states=common.init_adam(params, config),
            networks=networks,
            config=config,
        )


AGENT = IQLAgent  # What `agents.load` hands to the training loop.
has_schedule = common.has_schedule


def validate_config(config):
    """Raises UserError for values that no IQL run can have."""
    common.validate_optimizer(config)
    common.require_choice(config, 'actor_loss', ('awr', 'ddpgbc'))
    common.require_at_least(0, config, 'alpha')


def get_config():
    """The defaults; per-task published values come from `utils/presets.py`."""
    return ml_collections.ConfigDict(
        dict(
            agent_name='iql',
            lr=3e-4,  # Adam learning rate.
            actor_lr=ml_collections.config_dict.placeholder(float),  # The actor's own learning rate; None: lr.
            finetuning_schedule='constant',  # Learning rates of fine-tuning: constant, as published; cosine, to 0.
            schedule_steps=ml_collections.config_dict.placeholder(int),  # Updates it takes; None: all of a run's.
            actor_tau=0.001,  # Rate, per actor update, of the average of the actor that acts; 1: no average.
            joint_adam=False,  # One Adam over all modules, trained or not, as published.
            batch_size=256,
            actor_hidden_dims=(512, 512, 512, 512),
            value_hidden_dims=(512, 512, 512, 512),  # V and Q.
            value_layer_norm=True,  # V and Q.
            actor_layer_norm=False,
            discount=0.99,  # γ.
            tau=0.005,  # Rate of the target critic's moving average.
            expectile=0.9,  # κ of the value loss.
            actor_loss='awr',  # Policy extraction: awr or ddpgbc.
            alpha=10.0,  # Inverse temperature of awr, weight of behavioural cloning in ddpgbc; tuned per task.
            actor_freq=4,  # Fine-tuning steps per actor update.
            const_std=True,  # Policy standard deviation fixed at 1; else a learned vector.
            encoder=ml_collections.config_dict.placeholder(str),  # Image encoder (utils/encoders.py); None: states.
        )
    )
