"""DINO + ReBRAC: self-distilled features (DINO, arXiv 2104.14294), then ReBRAC (arXiv 2305.09836) on them.

Pre-training distils an observation encoder, the student, from its own moving average, the teacher: the distribution
that the teacher sees in one view of an observation is predicted from another view. A centre that follows the teacher's
mean output and a sharp temperature keep the features from collapsing. A policy is cloned on the features on the side.
Fine-tuning is ReBRAC with the encoder frozen.

This file holds the configuration, the losses and the updates; sampling batches, looping over steps and files live
elsewhere.
Shapes: B batch, D features, A action dimensions.
"""

from typing import Any, ClassVar, NamedTuple

import flax
import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from jax import lax

from agents import common, rebrac
from utils.datasets import CROP_PADDING, random_crop
from utils.encoders import make_encoder
from utils.errors import UserError
from utils.networks import GaussianActor, ScalarHead


class Networks(NamedTuple):
    """Module definitions (no parameters); names are the keys of `DINOReBRACAgent.params`."""

    encoder: nn.Module
    critic: nn.Module
    actor: nn.Module


class DINOReBRACAgent(flax.struct.PyTreeNode):
    """Parameters and optimiser states; every method is pure, jit-able, and vmap-able over seeds."""

    params: dict[str, Any]
    target_params: dict[str, Any]  # Of the encoder: the teacher.
    opt_states: dict[str, Any]
    center: jax.Array  # (D,): moving average of the teacher's outputs.
    networks: Networks = flax.struct.field(pytree_node=False)
    config: ml_collections.FrozenConfigDict = flax.struct.field(pytree_node=False)

    # What the training loop must put into a batch besides observations, actions, next observations (and rewards).
    needs: ClassVar[frozenset[str]] = frozenset({'next_actions', 'task_ends'})
    # What a pre-training need not have for fine-tuning to start from it.
    finetuning_state: ClassVar[tuple[str, ...]] = (common.STEP,)

    # ------------------------------------------------------------------------------------------------------- features

    def features(self, params, observations):
        """Observations (…, B, ·) → features (…, B, D) by the encoder in `params`."""
        return self.networks.encoder.apply({'params': params['encoder']}, observations)

    def encoded(self, params, batch):
        """The batch with features, which carry no gradient, in place of observations and next observations."""
        names = ('observations', 'next_observations')
        return {**batch, **{name: lax.stop_gradient(self.features(params, batch[name])) for name in names}}

    def views(self, observations, key):
        """Two independent views of each observation, (2, B, …): states with clipped Gaussian noise, images cropped at
        random."""

        def noisy(key):
            noise = self.config.repr_noise * jax.random.normal(key, observations.shape)
            return observations + jnp.clip(noise, -self.config.repr_noise_clip, self.config.repr_noise_clip)

        def cropped(key):
            return random_crop(observations, jax.random.randint(key, (len(observations), 2), 0, 2 * CROP_PADDING + 1))

        view = noisy if self.config.encoder == 'mlp' else cropped
        return jnp.stack([view(key) for key in jax.random.split(key)])

    # --------------------------------------------------------------------------------------------------------- losses

    def distillation_loss(self, params, batch, key):
        """½·H(f̄(v₁), f(v₂)) + ½·H(f̄(v₂), f(v₁)), crossed over two views (arXiv 2104.14294, eq. 3), with
        H(t, x) = −E Σ_d softmax((sg t − c) / T̄)_d·log softmax(x / T)_d."""
        views = self.views(batch['observations'], key)
        teacher = lax.stop_gradient(self.features(self.target_params, views))  # (2, B, D)
        student = self.features(params, views)
        targets = jax.nn.softmax((teacher - self.center) / self.config.target_repr_temp)
        log_probs = jax.nn.log_softmax(student / self.config.repr_temp)
        loss = -(targets * log_probs[::-1]).sum(axis=-1).mean()
        return loss, {
            'repr_loss': loss,
            'repr_target_entropy': jax.scipy.special.entr(targets).sum(axis=-1).mean(),
            'repr_feature_std': student[0].std(axis=0).mean(),  # 0 where the features have collapsed.
        }

    def next_center(self, batch, key):
        """c ← (1 − ρ)·c + ρ·(mean of the teacher's outputs over batch and views) (arXiv 2104.14294, eq. 4), for the key
        of the step's loss."""
        # The very views and outputs of the loss: the compiler computes them once.
        teacher = self.features(self.target_params, self.views(batch['observations'], key))
        return (1 - self.config.center_rate) * self.center + self.config.center_rate * teacher.mean(axis=(0, 1))

    def pretraining_loss(self, params, batch, key):
        """L = L_DINO + L_BC, the policy on features without gradient."""
        cloning = rebrac.cloning_loss(self, params, self.encoded(params, batch))
        return common.total([self.distillation_loss(params, batch, key), cloning])

    def finetuning_loss(self, params, batch, key, update_actor: bool = True):
        """L = L_Q, + L_π in the steps that update the actor, both of ReBRAC on features without gradient."""
        batch = self.encoded(params, batch)
        terms = [rebrac.critic_loss(self, params, batch, key)]
        if update_actor:
            terms.append(rebrac.actor_loss(self, params, batch))
        return common.total(terms)

    # -------------------------------------------------------------------------------------------------------- updates

    def pretrain(self, batch, key):
        """One reward-free update of encoder and cloned actor, then of teacher and centre; returns (agent, metrics)."""
        agent, metrics = self._step(
            ['encoder', 'actor'], lambda params: self.pretraining_loss(params, batch, key), averaged=['encoder']
        )
        return agent.replace(center=self.next_center(batch, key)), metrics

    def finetune(self, batch, key, *, update_actor: bool):
        """One update on labelled data with the encoder frozen; `update_actor` is static, and without it the actor and
        the targets stay exactly where they are."""
        modules = ['critic', 'actor'] if update_actor else ['critic']
        averaged = modules if update_actor else []  # TD3's delayed updates: the targets move with the actor.
        loss_fn = lambda params: self.finetuning_loss(params, batch, key, update_actor)  # noqa: E731
        agent, metrics = self._step(modules, loss_fn, averaged)
        return common.count_update(agent), metrics

    def begin_finetuning(self, labelled_batch, key):
        """The switch between the phases: every target is set to a copy of its online network."""
        del labelled_batch, key  # DINO infers nothing from labelled data here.
        return common.reset_targets(self)

    def q_values(self, observations, actions):
        """min_k Q_k(s, a) on features: (B,)."""
        return common.pessimistic_q(self, self.params, self.features(self.params, observations), actions)

    def act(self, observations, key, temperature=1.0):
        """Actions (B, A) in [−1, 1]: sampled with `temperature` times the policy's noise; 0 gives the mode."""
        params = {'actor': common.acting_actor(self)}
        return rebrac.sample_actions(self, params, self.features(self.params, observations), key, temperature)

    def _step(self, modules, loss_fn, averaged):
        """Adam on `modules`, then the moving average of the targets of `averaged`."""
        params, opt_states, metrics = common.adam_step(self, modules, loss_fn)
        targets = {name: self.target_params[name] for name in averaged}
        target_params = {**self.target_params, **common.target_update(params, targets, self.config.tau)}
        return self.replace(params=params, opt_states=opt_states, target_params=target_params), metrics

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
        if (observations.ndim > 2) != (config.encoder != 'mlp'):
            kind, expected = ('images', 'impala_small') if observations.ndim > 2 else ('states', 'mlp')
            raise UserError(f'agent.encoder={config.encoder!r} for {kind}: use --agent.encoder={expected}')
        keys = dict(zip(Networks._fields, jax.random.split(key, len(Networks._fields)), strict=True))
        networks = Networks(
            encoder=make_encoder(config.encoder, config.encoder_hidden_dims),
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

        init('encoder', networks.encoder, observations)
        features = networks.encoder.apply({'params': params['encoder']}, observations)
        init('critic', networks.critic, features, actions)
        init('actor', networks.actor, features)
        return cls(
            params=params,
            target_params=common.copy_of(params),
            opt_states=common.init_adam(params, config),
            center=jnp.zeros(features.shape[-1]),
            networks=networks,
            config=config,
        )


AGENT = DINOReBRACAgent  # What `agents.load` hands to the training loop.
has_schedule = common.has_schedule


def validate_config(config):
    """Raises UserError for values that no DINO + ReBRAC run can have."""
    rebrac.validate_config(config)
    if config.encoder is None:
        raise UserError('agent.encoder=None: DINO trains an encoder; use mlp for states, impala_small for images')
    for name in ('repr_temp', 'target_repr_temp'):
        if config[name] <= 0:
            raise UserError(f'agent.{name}={config[name]}: expected a positive number')
    common.require_at_least(0, config, 'repr_noise', 'repr_noise_clip')
    if not 0 < config.center_rate <= 1:
        raise UserError(f'agent.center_rate={config.center_rate}: expected a number above 0, at most 1')


def get_config():
    """The defaults; per-task published values come from `utils/presets.py`."""
    return ml_collections.ConfigDict(
        dict(
            agent_name='dino_rebrac',
            lr=3e-4,  # Adam learning rate.
            actor_lr=ml_collections.config_dict.placeholder(float),  # The actor's own learning rate; None: lr.
            finetuning_schedule='constant',  # Learning rates of fine-tuning: constant, as published; cosine, to 0.
            schedule_steps=ml_collections.config_dict.placeholder(int),  # Updates it takes; None: all of a run's.
            actor_tau=0.001,  # Rate, per actor update, of the average of the actor that acts; 1: no average.
            joint_adam=False,  # One Adam over all modules, trained or not, as published.
            batch_size=256,
            encoder_hidden_dims=(512, 512, 512, 512),  # Of the encoder mlp; the last one is D.
            actor_hidden_dims=(512, 512, 512, 512),
            value_hidden_dims=(512, 512, 512, 512),  # Critic.
            value_layer_norm=True,  # Critic.
            actor_layer_norm=False,
            discount=0.99,  # γ.
            tau=0.005,  # Rate of the target networks' moving average, the teacher's included.
            repr_noise=0.2,  # Scale of the noise that makes a view of a state.
            repr_noise_clip=0.2,  # Where that noise is clipped.
            repr_temp=0.1,  # T, the student's temperature; tuned per task.
            target_repr_temp=0.04,  # T̄, the teacher's temperature: the sharper one.
            center_rate=0.1,  # ρ, rate of the centre's moving average.
            tanh_squash=True,  # The policy is a Gaussian squashed by tanh; else a plain one.
            alpha_actor=0.1,  # Weight of the actor's distance to the data's actions; tuned per task.
            alpha_critic=0.1,  # Weight of the same distance in the critic's target; tuned per task.
            actor_noise=0.2,  # σ, scale of the noise on target actions.
            actor_noise_clip=0.5,  # c, where that noise is clipped.
            normalize_q_loss=True,  # λ: divide the actor's Q term by its mean magnitude.
            actor_freq=4,  # Fine-tuning steps per update of the actor and of the targets.
            const_std=True,  # Standard deviation before squashing fixed at 1; else a learned vector.
            encoder='mlp',  # Observation encoder (utils/encoders.py): mlp for states; images take one of theirs.
        )
    )
