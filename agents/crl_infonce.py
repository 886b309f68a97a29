"""CRL + IS: contrastive reinforcement learning with importance-sampled rewards (arXiv 2206.07568).

Pre-training fits, on reward-free transitions, logits f(s, a, g) = φ(s, a)·ψ(g)/√Z by InfoNCE between states and actions
and the discounted future states of their trajectories: the log ratio of the discounted occupancy of (s, a) to its
marginal. Besides, it clones the policy.
Fine-tuning goes on with that, learns the reward, and improves the policy on Q, the rewards of goals weighted with the
density ratios of the policy's action, with behavioural cloning as regulariser.

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
from utils.networks import ContrastiveCritic, GaussianActor, ScalarHead

# The published floor of 1e-6 under exp f, in log space.
LOGIT_FLOOR = -13.8


class Networks(NamedTuple):
    """Module definitions (no parameters); names are the keys of `CRLInfoNCEAgent.params`."""

    critic: nn.Module
    reward: nn.Module
    actor: nn.Module


class CRLInfoNCEAgent(flax.struct.PyTreeNode):
    """Parameters and optimiser states; every method is pure, jit-able, and vmap-able over seeds."""

    params: dict[str, Any]
    target_params: dict[str, Any]
    opt_states: dict[str, Any]
    networks: Networks = flax.struct.field(pytree_node=False)
    config: ml_collections.FrozenConfigDict = flax.struct.field(pytree_node=False)

    # What a pre-training need not have for fine-tuning to start from it.
    finetuning_state: ClassVar[tuple[str, ...]] = (common.STEP,)

    @property
    def needs(self) -> frozenset:
        """What the training loop must put into a batch besides observations, actions, next observations (and
        rewards): the goals of the contrastive loss, and those of the actor's."""
        config = self.config
        future = Goals('goal', future=1.0, discount=config.discount, first_offset=config.goal_offset)
        return frozenset({future, Goals('actor_goal', **{config.actor_goals: 1.0})})

    # ------------------------------------------------------------------------------------------------------- features

    def logits(self, params, observations, actions, goals):
        """f_ij of both members for every state and action i with every goal j: (E, B, B)."""
        return common.contrastive_logits(
            *self.networks.critic.apply({'params': params['critic']}, observations, actions, goals)
        )

    # --------------------------------------------------------------------------------------------------------- losses

    def contrastive_loss(self, params, batch):
        """E_{e,i}[−f_ii + lse_j f_ij + c·(lse_j f_ij)²] (contrastive RL, arXiv 2206.07568, with the InfoNCE loss of
        arXiv 1807.03748, eq. 4); the last term fixes the constant in f that the others leave free.

        `symmetric_infonce` is E_{e,i}[(−f_ii + lse_j f_ij) + (−f_ii + lse_j f_ji)], without that term.
        """
        logits = self.logits(params, batch['observations'], batch['actions'], batch['goals'])
        positives = jnp.diagonal(logits, axis1=1, axis2=2)  # (E, B)
        log_partition = jax.nn.logsumexp(logits, axis=2)
        losses = log_partition - positives
        if self.config.contrastive_loss == 'forward_infonce':
            losses += self.config.logsumexp_penalty_coeff * log_partition**2
        else:
            losses += jax.nn.logsumexp(logits, axis=1) - positives
        loss = losses.mean()
        return loss, {'contrastive_loss': loss, **common.contrastive_metrics(logits)}

    def reward_loss(self, params, batch):
        """L_R = E(R(s̃) − r)², s̃ the state that the reward belongs to."""
        predictions = self.networks.reward.apply({'params': params['reward']}, batch['reward_observations'])
        return common.reward_regression(predictions, batch['rewards'])

    def cloning_loss(self, params, batch):
        """L_BC = −E log π(a|s)."""
        means, stds = self.networks.actor.apply({'params': params['actor']}, batch['observations'])
        return common.behavioral_cloning(means, stds, batch['actions'])

    def actor_loss(self, params, batch):
        """L_π = −λ·E w_i·R(g_i) − α·E log π(a|s), w the density ratio at the policy's mode by the smaller of the two
        logits."""
        means, stds = self.networks.actor.apply({'params': params['actor']}, batch['observations'])
        frozen = lax.stop_gradient(params)
        logits = self.logits(frozen, batch['observations'], jnp.clip(means, -1, 1), batch['actor_goals'])
        logits = jnp.maximum(logits, LOGIT_FLOOR).min(axis=0)
        goal_rewards = self.networks.reward.apply({'params': frozen['reward']}, batch['actor_goals'])
        return common.importance_weighted_actor_loss(
            logits, goal_rewards, means, stds, batch['actions'], self.config.alpha, self.config.normalize_q_loss
        )

    def pretraining_loss(self, params, batch, key):
        """L = L_contrastive + L_BC."""
        del key  # Nothing is drawn: the goals are part of the batch.
        return common.total([self.contrastive_loss(params, batch), self.cloning_loss(params, batch)])

    def finetuning_loss(self, params, batch, key, update_actor: bool = True):
        """L = L_R + L_contrastive, + L_π in the steps that update the actor."""
        del key
        terms = [self.reward_loss(params, batch), self.contrastive_loss(params, batch)]
        if update_actor:
            terms.append(self.actor_loss(params, batch))
        return common.total(terms)

    # -------------------------------------------------------------------------------------------------------- updates

    def pretrain(self, batch, key):
        """One reward-free update of critic and cloned actor; returns (agent, metrics)."""
        return self._step(['critic', 'actor'], lambda params: self.pretraining_loss(params, batch, key))

    def finetune(self, batch, key, *, update_actor: bool):
        """One update on labelled data; `update_actor` is static, and without it the actor stays exactly where it is."""
        modules = ['critic', 'reward', 'actor'] if update_actor else ['critic', 'reward']
        agent, metrics = self._step(modules, lambda params: self.finetuning_loss(params, batch, key, update_actor))
        return common.count_update(agent), metrics

    def begin_finetuning(self, labelled_batch, key):
        """The switch between the phases: nothing is inferred from labelled data, and there is no target to reset."""
        del labelled_batch, key
        return self

    def act(self, observations, key, temperature=1.0):
        """Actions (B, A) in [−1, 1]: the mode plus `temperature` times the policy's noise; 0 gives the mode."""
        means, stds = self.networks.actor.apply({'params': common.acting_actor(self)}, observations)
        return jnp.clip(means + temperature * stds * jax.random.normal(key, means.shape), -1, 1)

    def _step(self, modules, loss_fn):
        params, opt_states, metrics = common.adam_step(self, modules, loss_fn)
        return self.replace(params=params, opt_states=opt_states), metrics

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
        keys = dict(zip(Networks._fields, jax.random.split(key, len(Networks._fields)), strict=True))
        params = {}

        def init(name, module, *inputs, **kwargs):
            params[name] = module.init(keys[name], *inputs, **kwargs)['params']

        networks = Networks(
            critic=ContrastiveCritic(
                config.latent_dim,
                config.value_hidden_dims,
                config.value_layer_norm,
                encoder=make_encoder(config.encoder),
                goal_encoder=make_encoder(config.encoder),
            ),
            reward=ScalarHead(
                config.reward_hidden_dims, config.reward_layer_norm, encoder=make_encoder(config.encoder)
            ),
            actor=GaussianActor(
                action_dim=actions.shape[-1],
                hidden_dims=config.actor_hidden_dims,
                layer_norm=config.actor_layer_norm,
                const_std=config.const_std,
                encoder=make_encoder(config.encoder),
            ),
        )
        init('critic', networks.critic, observations, actions, observations)
        init('reward', networks.reward, observations)
        init('actor', networks.actor, observations)
        return cls(
            params=params,
            target_params={},
            opt_states=common.init_adam(params, config),
            networks=networks,
            config=config,
        )


AGENT = CRLInfoNCEAgent  # What `agents.load` hands to the training loop.
has_schedule = common.has_schedule


def validate_config(config):
    """Raises UserError for values that no CRL run can have."""
    common.validate_optimizer(config)
    common.require_choice(config, 'contrastive_loss', ('forward_infonce', 'symmetric_infonce'))
    common.require_choice(config, 'actor_goals', ('trajectory', 'marginal'))
    common.require_at_least(0, config, 'alpha', 'goal_offset', 'logsumexp_penalty_coeff')


def get_config():
    """The defaults; per-task published values come from `utils/presets.py`."""
    return ml_collections.ConfigDict(
        dict(
            agent_name='crl_infonce',
            lr=3e-4,  # Adam learning rate.
            actor_lr=ml_collections.config_dict.placeholder(float),  # The actor's own learning rate; None: lr.
            finetuning_schedule='constant',  # Learning rates of fine-tuning: constant, as published; cosine, to 0.
            schedule_steps=ml_collections.config_dict.placeholder(int),  # Updates it takes; None: all of a run's.
            actor_tau=0.001,  # Rate, per actor update, of the average of the actor that acts; 1: no average.
            joint_adam=False,  # One Adam over all modules, trained or not, as published.
            batch_size=256,
            actor_hidden_dims=(512, 512, 512, 512),
            value_hidden_dims=(512, 512, 512, 512),  # Both representations of the critic.
            reward_hidden_dims=(512, 512, 512, 512),
            value_layer_norm=True,
            actor_layer_norm=False,
            reward_layer_norm=True,
            reward_weight_decay=0.0,  # Decoupled weight decay (AdamW) of the learned reward.
            latent_dim=512,  # Z, of the representations φ and ψ.
            discount=0.99,  # γ, of the goals' geometric offsets.
            goal_offset=1,  # Smallest offset of a goal from its row; 0 admits the row itself.
            contrastive_loss='forward_infonce',  # Or symmetric_infonce.
            logsumexp_penalty_coeff=0.01,  # c, of the squared log partition in forward_infonce.
            actor_goals='trajectory',  # Goals of the actor loss: trajectory (later states) or marginal (any state).
            alpha=0.1,  # Weight of behavioural cloning in the actor loss; tuned per task.
            normalize_q_loss=True,  # Divide the actor's Q term by its mean magnitude.
            actor_freq=4,  # Fine-tuning steps per actor update.
            const_std=True,  # Policy standard deviation fixed at 1; else a learned vector.
            encoder=ml_collections.config_dict.placeholder(str),  # Image encoder (utils/encoders.py); None: states.
        )
    )
