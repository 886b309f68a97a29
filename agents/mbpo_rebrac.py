"""MBPO + ReBRAC: branched rollouts of a learned model (MBPO, arXiv 1906.08253), mixed into ReBRAC's (arXiv 2305.09836)
data.

Pre-training fits the dynamics and clones the behaviour. Fine-tuning goes on fitting the dynamics, fits the reward,
rolls the policy through the model for a few steps from states of the data, and minimises ReBRAC's losses on batches
that are half data and half imagination. Imagined transitions wait in a ring buffer that is part of the agent. States
only, in the normalised space of the batches.

This file holds the configuration, the losses and the updates; sampling batches, looping over steps and files live
elsewhere.
Shapes: B batch, S state features, A action dimensions, R rollouts, K steps of a rollout, C capacity of the buffer.
"""

from typing import Any, ClassVar, NamedTuple

import flax
import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from jax import lax

from agents import common, rebrac
from utils.errors import UserError
from utils.networks import MLP, GaussianActor, ScalarHead

# What ReBRAC's losses read of a batch, and what the buffer keeps of a transition.
TRANSITION = ('observations', 'actions', 'rewards', 'masks', 'next_observations', 'next_actions')


class Networks(NamedTuple):
    """Module definitions (no parameters); names are the keys of `MBPOReBRACAgent.params`."""

    transition: nn.Module
    reward: nn.Module
    critic: nn.Module
    actor: nn.Module


class MBPOReBRACAgent(flax.struct.PyTreeNode):
    """Parameters and optimiser states; every method is pure, jit-able, and vmap-able over seeds."""

    params: dict[str, Any]
    target_params: dict[str, Any]
    opt_states: dict[str, Any]
    buffer: dict[str, jax.Array]  # Imagined transitions, (C, …); C is a multiple of R·K.
    num_writes: jax.Array  # Calls of `remember` so far; each one writes R·K rows.
    networks: Networks = flax.struct.field(pytree_node=False)
    config: ml_collections.FrozenConfigDict = flax.struct.field(pytree_node=False)

    # What the training loop must put into a batch besides observations, actions, next observations (and rewards).
    needs: ClassVar[frozenset[str]] = frozenset({'next_actions', 'task_ends'})
    # What a pre-training need not have for fine-tuning to start from it.
    finetuning_state: ClassVar[tuple[str, ...]] = (common.STEP,)

    # ---------------------------------------------------------------------------------------------------- imagination

    def state_change(self, params, states, actions):
        """Δ(s, a), the predicted s' − s: (B, S)."""
        inputs = jnp.concatenate([states, actions], axis=-1)
        return self.networks.transition.apply({'params': params['transition']}, inputs)

    def imagine(self, batch, key):
        """R rollouts of K steps of the policy through the model, from states of the batch: transitions (K·R, …)
        (arXiv 1906.08253, algorithm 2).

        The policy is the one whose value ReBRAC's targets estimate, the mode with smoothing noise: the Gaussian that
        cloning fits may have a standard deviation of 1, and would leave the states that the model has seen.
        The state advances, and a' is the action that the rollout goes on with. Masks are 1 but where the predicted
        reward is above `termination_reward`.
        """
        num_states = len(batch['observations'])
        states = batch['observations'][jnp.arange(self.config.num_model_rollouts) % num_states]
        # The reward belongs to the state before the step or to the one after it, whatever the data say.
        rewarded_after = jnp.all(batch['reward_observations'] == batch['next_observations'])

        def step(carry, key):
            states, actions = carry
            next_states = states + self.state_change(self.params, states, actions)
            next_actions = rebrac.smoothed_actions(self, self.params, next_states, key)
            rewarded = jnp.where(rewarded_after, next_states, states)
            rewards = self.networks.reward.apply({'params': self.params['reward']}, rewarded)
            masks = jnp.ones_like(rewards)
            if self.config.termination_reward is not None:
                masks = jnp.where(rewards > self.config.termination_reward, 0.0, masks)
            row = (states, actions, rewards, masks, next_states, next_actions)
            return (next_states, next_actions), dict(zip(TRANSITION, row, strict=True))

        first_key, *keys = jax.random.split(key, 1 + self.config.num_model_rollout_steps)
        actions = rebrac.smoothed_actions(self, self.params, states, first_key)
        _, rows = lax.scan(step, (states, actions), jnp.stack(keys))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

    def remember(self, rows):
        """The agent with imagined transitions (K·R, …) in its buffer, in place of the oldest where it is full."""
        num_rows = len(rows['rewards'])
        start = num_rows * (self.num_writes % (len(self.buffer['rewards']) // num_rows))
        buffer = {
            name: lax.dynamic_update_slice_in_dim(self.buffer[name], rows[name], start, axis=0) for name in TRANSITION
        }
        return self.replace(buffer=buffer, num_writes=self.num_writes + 1)

    def mixed_batch(self, batch, key):
        """The first half of the batch and as many imagined transitions, uniform over those that the buffer holds;
        while it holds none, the batch as it is."""
        num_imagined = len(batch['actions']) // 2
        rows_per_write = self.config.num_model_rollouts * self.config.num_model_rollout_steps
        # In this order, which cannot overflow: the buffer is full after a fixed number of writes.
        num_filled = jnp.minimum(self.num_writes, len(self.buffer['rewards']) // rows_per_write) * rows_per_write
        rows = jax.random.randint(key, (num_imagined,), 0, jnp.maximum(num_filled, 1))

        def mix(real, imagined):
            second_half = jnp.where(num_filled > 0, imagined[rows], real[-num_imagined:])
            return jnp.concatenate([real[:-num_imagined], second_half])

        return {name: mix(batch[name], self.buffer[name]) for name in TRANSITION}

    # --------------------------------------------------------------------------------------------------------- losses

    def dynamics_loss(self, params, batch):
        """L_Δ = E_{i,d}(Δ(s, a)_d − (s' − s)_d)²."""
        changes = self.state_change(params, batch['observations'], batch['actions'])
        loss = jnp.mean((changes - (batch['next_observations'] - batch['observations'])) ** 2)
        return loss, {'dynamics_loss': loss}

    def reward_loss(self, params, batch):
        """L_R = E(R(s̃) − r)², s̃ the state that the reward belongs to."""
        predictions = self.networks.reward.apply({'params': params['reward']}, batch['reward_observations'])
        return common.reward_regression(predictions, batch['rewards'])

    def pretraining_loss(self, params, batch, key):
        """L = L_Δ + L_BC."""
        del key  # Neither term draws anything.
        return common.total([self.dynamics_loss(params, batch), rebrac.cloning_loss(self, params, batch)])

    def finetuning_loss(self, params, batch, key, update_actor: bool = True):
        """L = L_Δ + L_R on the data, + L_Q and, in the steps that update the actor, L_π of ReBRAC on the mixed
        batch."""
        mix_key, critic_key = jax.random.split(key)
        mixed = self.mixed_batch(batch, mix_key)
        terms = [
            self.dynamics_loss(params, batch),
            self.reward_loss(params, batch),
            rebrac.critic_loss(self, params, mixed, critic_key),
        ]
        if update_actor:
            terms.append(rebrac.actor_loss(self, params, mixed))
        return common.total(terms)

    # -------------------------------------------------------------------------------------------------------- updates

    def pretrain(self, batch, key):
        """One reward-free update of dynamics and cloned actor; returns (agent, metrics)."""
        return self._step(['transition', 'actor'], lambda params: self.pretraining_loss(params, batch, key))

    def finetune(self, batch, key, *, update_actor: bool):
        """One rollout of the model as it is, then one update on labelled data; `update_actor` is static, and without it
        the actor and the targets of both networks stay exactly where they are."""
        imagination_key, loss_key = jax.random.split(key)
        agent = self.remember(self.imagine(batch, imagination_key))
        modules = ['transition', 'reward', 'critic']
        modules += ['actor'] if update_actor else []
        agent, metrics = agent._step(
            modules, lambda params: agent.finetuning_loss(params, batch, loss_key, update_actor)
        )
        if update_actor:  # TD3's delayed updates: the targets move with the actor.
            agent = agent.replace(target_params=common.target_update(agent.params, self.target_params, self.config.tau))
        return common.count_update(agent), metrics

    def begin_finetuning(self, labelled_batch, key):
        """The switch between the phases: target critic and target actor are set to copies of their online networks."""
        del labelled_batch, key  # MBPO infers nothing from labelled data here.
        return common.reset_targets(self)

    def q_values(self, observations, actions):
        """min_k Q_k(s, a): (B,)."""
        return common.pessimistic_q(self, self.params, observations, actions)

    def act(self, observations, key, temperature=1.0):
        """Actions (B, A) in [−1, 1]: sampled with `temperature` times the policy's noise; 0 gives the mode."""
        return rebrac.sample_actions(self, {'actor': common.acting_actor(self)}, observations, key, temperature)

    def _step(self, modules, loss_fn):
        params, opt_states, metrics = common.adam_step(self, modules, loss_fn)
        return self.replace(params=params, opt_states=opt_states), metrics

    # ------------------------------------------------------------------------------------------------------- creation

    @classmethod
    def create(cls, key, example_batch, config):
        """A fresh agent for batches like `example_batch`.

        key: a JAX random key. example_batch: observations (B, S) and actions (B, A). Raises UserError for an
        inconsistent config, and for images.
        """
        config = ml_collections.FrozenConfigDict(config)
        validate_config(config)
        observations, actions = example_batch['observations'], example_batch['actions']
        if observations.ndim > 2:
            raise UserError(f'{config.agent_name} works on states, not on images: it rolls a model of states; {ADVICE}')
        keys = dict(zip(Networks._fields, jax.random.split(key, len(Networks._fields)), strict=True))
        networks = Networks(
            transition=MLP(config.transition_hidden_dims, observations.shape[-1], config.transition_layer_norm),
            reward=ScalarHead(config.reward_hidden_dims, config.reward_layer_norm),
            critic=ScalarHead(config.value_hidden_dims, config.value_layer_norm, num_ensembles=2),
            actor=GaussianActor(
                action_dim=actions.shape[-1],
                hidden_dims=config.actor_hidden_dims,
                layer_norm=config.actor_layer_norm,
                const_std=config.const_std,
            ),
        )
        params = {}

        def init(name, module, *inputs):
            params[name] = module.init(keys[name], *inputs)['params']

        init('transition', networks.transition, jnp.concatenate([observations, actions], axis=-1))
        init('reward', networks.reward, observations)
        init('critic', networks.critic, observations, actions)
        init('actor', networks.actor, observations)

        rows_per_write = config.num_model_rollouts * config.num_model_rollout_steps
        # A whole number of writes, so that none goes across the end.
        capacity = rows_per_write * -(-config.model_buffer_batches * config.batch_size // rows_per_write)
        state, action = (capacity, observations.shape[-1]), (capacity, actions.shape[-1])
        shapes = (state, action, (capacity,), (capacity,), state, action)
        return cls(
            params=params,
            target_params=common.copy_of({name: params[name] for name in ('critic', 'actor')}),
            opt_states=common.init_adam(params, config),
            buffer={name: jnp.zeros(shape) for name, shape in zip(TRANSITION, shapes, strict=True)},
            num_writes=jnp.zeros((), jnp.int32),
            networks=networks,
            config=config,
        )


AGENT = MBPOReBRACAgent  # What `agents.load` hands to the training loop.
has_schedule = common.has_schedule
ADVICE = 'choose a task with state observations, or another agent (rebrac, dino_rebrac)'


def validate_config(config):
    """Raises UserError for values that no MBPO + ReBRAC run can have."""
    rebrac.validate_config(config)
    if config.encoder is not None:
        raise UserError(
            f'{config.agent_name} works on states, not on images (agent.encoder={config.encoder}): {ADVICE}'
        )
    common.require_at_least(1, config, 'num_model_rollouts', 'num_model_rollout_steps', 'model_buffer_batches')
    if config.batch_size < 2:
        raise UserError(f'agent.batch_size={config.batch_size}: expected at least 2, as half of a batch is imagined')


def get_config():
    """The defaults; per-task published values come from `utils/presets.py`."""
    return ml_collections.ConfigDict(
        dict(
            agent_name='mbpo_rebrac',
            lr=3e-4,  # Adam learning rate.
            actor_lr=ml_collections.config_dict.placeholder(float),  # The actor's own learning rate; None: lr.
            finetuning_schedule='constant',  # Learning rates of fine-tuning: constant, as published; cosine, to 0.
            schedule_steps=ml_collections.config_dict.placeholder(int),  # Updates it takes; None: all of a run's.
            actor_tau=0.001,  # Rate, per actor update, of the average of the actor that acts; 1: no average.
            joint_adam=False,  # One Adam over all modules, trained or not, as published.
            batch_size=256,
            transition_hidden_dims=(512, 512, 512, 512),
            reward_hidden_dims=(512, 512, 512, 512),
            actor_hidden_dims=(512, 512, 512, 512),
            value_hidden_dims=(512, 512, 512, 512),  # Critic.
            transition_layer_norm=True,
            reward_layer_norm=True,
            reward_weight_decay=0.0,  # Decoupled weight decay (AdamW) of the learned reward.
            value_layer_norm=True,  # Critic.
            actor_layer_norm=False,
            discount=0.99,  # γ.
            tau=0.005,  # Rate of the target networks' moving average.
            num_model_rollouts=256,  # R, rollouts started at every fine-tuning step.
            num_model_rollout_steps=2,  # K, their length.
            model_buffer_batches=100,  # Capacity of the buffer of imagined transitions, in batches.
            # Imagined transitions with a reward above it are final; None: the task has no such rule.
            termination_reward=ml_collections.config_dict.placeholder(float),
            tanh_squash=True,  # The policy is a Gaussian squashed by tanh; else a plain one.
            alpha_actor=0.1,  # Weight of the actor's distance to the data's actions; tuned per task.
            alpha_critic=0.1,  # Weight of the same distance in the critic's target; tuned per task.
            actor_noise=0.2,  # σ, scale of the noise on target actions.
            actor_noise_clip=0.5,  # c, where that noise is clipped.
            normalize_q_loss=True,  # λ: divide the actor's Q term by its mean magnitude.
            actor_freq=4,  # Fine-tuning steps per update of the actor and of the targets.
            const_std=True,  # Standard deviation before squashing fixed at 1; else a learned vector.
            encoder=ml_collections.config_dict.placeholder(str),  # None: states, the only choice here.
        )
    )
