"""ReBRAC: Revisited Behaviour-Regularised Actor-Critic (arXiv 2305.09836).

Pre-training clones the behaviour with a tanh-squashed Gaussian. Fine-tuning is TD3 with a decoupled penalty on the
distance to the data's actions: one in the critic's target, one in the actor's loss.

This file holds the configuration, the losses and the updates; sampling batches, looping over steps and files live
elsewhere. The losses are functions of an agent with the networks `actor` and `critic`, because DINO + ReBRAC and MBPO +
ReBRAC minimise the same ones, on features and on imagined data.
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
from utils.networks import GaussianActor, ScalarHead, gaussian_log_prob, tanh_gaussian_log_prob

# -------------------------------------------------------------------------------------- policy and losses of the family


def policy(agent, params, observations):
    """The mode μ(s), and the Gaussian's mean and standard deviation before squashing: three times (B, A)."""
    means, stds = agent.networks.actor.apply({'params': params['actor']}, observations)
    return jnp.tanh(means) if agent.config.tanh_squash else means, means, stds


def sample_actions(agent, params, observations, key, temperature=1.0):
    """Actions (B, A) in [−1, 1] with `temperature` times the policy's noise; 0 gives the mode."""
    _, means, stds = policy(agent, params, observations)
    actions = means + temperature * stds * jax.random.normal(key, means.shape)
    return jnp.tanh(actions) if agent.config.tanh_squash else jnp.clip(actions, -1, 1)


def smoothed_actions(agent, params, observations, key):
    """clip₁(μ(s) + clip(σ·ε, ±c)), (B, A): the mode with the noise of TD3's target policy smoothing (arXiv 1802.09477,
    §5.3)."""
    config = agent.config
    modes, _, _ = policy(agent, params, observations)
    noise = config.actor_noise * jax.random.normal(key, modes.shape)
    return jnp.clip(modes + jnp.clip(noise, -config.actor_noise_clip, config.actor_noise_clip), -1, 1)


def cloning_loss(agent, params, batch):
    """L_BC = −E log π(a|s), the change of variables by tanh included."""
    modes, means, stds = policy(agent, params, batch['observations'])
    log_prob = tanh_gaussian_log_prob if agent.config.tanh_squash else gaussian_log_prob
    loss = -log_prob(means, stds, batch['actions']).mean()
    return loss, {'bc_loss': loss, 'actor_mse': jnp.mean((jnp.clip(modes, -1, 1) - batch['actions']) ** 2)}


def critic_loss(agent, params, batch, key):
    """L_Q = E_{i,k}(Q_k(s, a) − y)² with y = r + γ·m·(min_k Q̄_k(s', ã') − α_critic·‖ã' − a'‖²) (arXiv 2305.09836, §3)
    and ã' the target actor's smoothed action."""
    config = agent.config
    next_actions = smoothed_actions(agent, agent.target_params, batch['next_observations'], key)
    next_qs = agent.networks.critic.apply(
        {'params': agent.target_params['critic']}, batch['next_observations'], next_actions
    )  # (2, B)
    penalty = ((next_actions - batch['next_actions']) ** 2).sum(axis=-1)
    next_q = next_qs.min(axis=0) - config.alpha_critic * penalty
    targets = batch['rewards'] + config.discount * batch['masks'] * next_q
    qs = agent.networks.critic.apply({'params': params['critic']}, batch['observations'], batch['actions'])  # (2, B)
    loss = ((qs - targets) ** 2).mean()
    return loss, {
        'critic_loss': loss,
        'critic_penalty': penalty.mean(),
        **common.q_metrics(qs),
        'q_target_mean': targets.mean(),
    }


def actor_loss(agent, params, batch):
    """L_π = −λ·E min_k Q_k(s, μ(s)) + α_actor·E‖μ(s) − a‖², λ = sg[1 / E|q|] (arXiv 2305.09836, §3)."""
    modes, _, _ = policy(agent, params, batch['observations'])
    q = common.pessimistic_q(agent, lax.stop_gradient(params), batch['observations'], jnp.clip(modes, -1, 1))
    penalty = ((modes - batch['actions']) ** 2).sum(axis=-1).mean()
    loss = common.q_maximization(q, agent.config.normalize_q_loss) + agent.config.alpha_actor * penalty
    return loss, {'actor_loss': loss, 'actor_q': q.mean(), 'actor_penalty': penalty}


# ------------------------------------------------------------------------------------------------------------ the agent


class Networks(NamedTuple):
    """Module definitions (no parameters); names are the keys of `ReBRACAgent.params`."""

    critic: nn.Module
    actor: nn.Module


class ReBRACAgent(flax.struct.PyTreeNode):
    """Parameters and optimiser states; every method is pure, jit-able, and vmap-able over seeds."""

    params: dict[str, Any]
    target_params: dict[str, Any]
    opt_states: dict[str, Any]
    networks: Networks = flax.struct.field(pytree_node=False)
    config: ml_collections.FrozenConfigDict = flax.struct.field(pytree_node=False)

    # What the training loop must put into a batch besides observations, actions, next observations (and rewards).
    needs: ClassVar[frozenset[str]] = frozenset({'next_actions', 'task_ends'})
    # What a pre-training need not have for fine-tuning to start from it.
    finetuning_state: ClassVar[tuple[str, ...]] = (common.STEP,)

    # --------------------------------------------------------------------------------------------------------- losses

    def pretraining_loss(self, params, batch, key):
        """L = L_BC."""
        del key  # Cloning draws nothing.
        loss, metrics = cloning_loss(self, params, batch)
        return loss, {'loss': loss, **metrics}

    def finetuning_loss(self, params, batch, key, update_actor: bool = True):
        """L = L_Q, + L_π in the steps that update the actor."""
        terms = [critic_loss(self, params, batch, key)]
        if update_actor:
            terms.append(actor_loss(self, params, batch))
        return common.total(terms)

    # -------------------------------------------------------------------------------------------------------- updates

    def pretrain(self, batch, key):
        """One update of the cloned actor; returns (agent, metrics)."""
        return self._step(['actor'], lambda params: self.pretraining_loss(params, batch, key))

    def finetune(self, batch, key, *, update_actor: bool):
        """One update on labelled data; `update_actor` is static, and without it the actor and the targets of both
        networks stay exactly where they are."""
        modules = ['critic', 'actor'] if update_actor else ['critic']
        agent, metrics = self._step(modules, lambda params: self.finetuning_loss(params, batch, key, update_actor))
        if update_actor:  # TD3's delayed updates: the targets move with the actor.
            agent = agent.replace(target_params=common.target_update(agent.params, self.target_params, self.config.tau))
        return common.count_update(agent), metrics

    def begin_finetuning(self, labelled_batch, key):
        """The switch between the phases: target critic and target actor are set to copies of their online networks."""
        del labelled_batch, key  # ReBRAC infers nothing from labelled data here.
        return common.reset_targets(self)

    def q_values(self, observations, actions):
        """min_k Q_k(s, a): (B,)."""
        return common.pessimistic_q(self, self.params, observations, actions)

    def act(self, observations, key, temperature=1.0):
        """Actions (B, A) in [−1, 1]: sampled with `temperature` times the policy's noise; 0 gives the mode."""
        return sample_actions(self, {'actor': common.acting_actor(self)}, observations, key, temperature)

    def _step(self, modules, loss_fn):
        params, opt_states, metrics = common.adam_step(self, modules, loss_fn)
        return self.replace(params=params, opt_states=opt_states), metrics

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

        init('critic', networks.critic, observations, actions)
        init('actor', networks.actor, observations)
        return cls(
            params=params,
            target_params=common.copy_of(params),
            opt_states=common.init_adam(params, config),
            networks=networks,
            config=config,
        )


AGENT = ReBRACAgent  # What `agents.load` hands to the training loop.
has_schedule = common.has_schedule


def validate_config(config):
    """Raises UserError for values that no run of ReBRAC or of an agent built on it can have."""
    common.validate_optimizer(config)
    common.require_at_least(0, config, 'alpha_actor', 'alpha_critic', 'actor_noise', 'actor_noise_clip')


def get_config():
    """The defaults; per-task published values come from `utils/presets.py`."""
    return ml_collections.ConfigDict(
        dict(
            agent_name='rebrac',
            lr=3e-4,  # Adam learning rate.
            actor_lr=ml_collections.config_dict.placeholder(float),  # The actor's own learning rate; None: lr.
            finetuning_schedule='constant',  # Learning rates of fine-tuning: constant, as published; cosine, to 0.
            schedule_steps=ml_collections.config_dict.placeholder(int),  # Updates it takes; None: all of a run's.
            actor_tau=0.001,  # Rate, per actor update, of the average of the actor that acts; 1: no average.
            joint_adam=False,  # One Adam over all modules, trained or not, as published.
            batch_size=256,
            actor_hidden_dims=(512, 512, 512, 512),
            value_hidden_dims=(512, 512, 512, 512),  # Critic.
            value_layer_norm=True,  # Critic.
            actor_layer_norm=False,
            discount=0.99,  # γ.
            tau=0.005,  # Rate of the target networks' moving average.
            tanh_squash=True,  # The policy is a Gaussian squashed by tanh; else a plain one.
            alpha_actor=0.1,  # Weight of the actor's distance to the data's actions; tuned per task.
            alpha_critic=0.1,  # Weight of the same distance in the critic's target; tuned per task.
            actor_noise=0.2,  # σ, scale of the noise on target actions.
            actor_noise_clip=0.5,  # c, where that noise is clipped.
            normalize_q_loss=True,  # λ: divide the actor's Q term by its mean magnitude.
            actor_freq=4,  # Fine-tuning steps per update of the actor and of the targets.
            const_std=True,  # Standard deviation before squashing fixed at 1; else a learned vector.
            encoder=ml_collections.config_dict.placeholder(str),  # Image encoder (utils/encoders.py); None: states.
        )
    )
