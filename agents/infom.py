"""InFOM: Intention-Conditioned Flow Occupancy Models (arXiv 2506.08902).

Pre-training fits, on reward-free transitions, an intention encoder q(z|s',a') (the paper's p_e) and a vector field
v(x_t, t, s, a, z) whose flow samples the discounted future states of (s, a) under intention z, with the SARSA form of
the TD-flow loss (arXiv 2503.09817), plus a cloned policy.
Fine-tuning scores sampled futures with a learned reward, distils them over random z into Q with an expectile loss
(implicit generalised policy improvement) and improves the policy on Q with behavioural cloning as regulariser.
Intentions of other origins, for ablations, are in `agents/intentions.py`, candidates against instability in
`agents/stabilizers.py`.
Shapes: B batch, N flow samples per row, S state features (or image features), A action dimensions, Z latent dimensions.
"""

from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from jax import lax

from agents import common, intentions, stabilizers
from utils import random_keys
from utils.encoders import make_encoder
from utils.errors import UserError
from utils.flows import clipping_bounds, euler_integrate, map_rows
from utils.networks import GaussianActor, IntentionEncoder, ScalarHead, VectorField, rounded
from utils.values import intention_values


class Networks(NamedTuple):
    """Module definitions (no parameters); names are the keys of `InFOMAgent.params`."""

    vector_field: nn.Module
    intention_encoder: nn.Module | None  # None in ablations without it.
    critic: nn.Module
    reward: nn.Module
    actor: nn.Module
    encoder: nn.Module | None  # None for states.


class InFOMAgent(flax.struct.PyTreeNode):
    """Parameters and optimiser states; every method is pure, jit-able, and vmap-able over seeds."""

    params: dict[str, Any]
    target_params: dict[str, Any]
    opt_states: dict[str, Any]
    flow_bounds: tuple[jax.Array, jax.Array] | None  # (lower, upper), each (S,): where flow samples are clipped.
    representation: Any  # The agent that gives the intentions in an ablation, else None.
    networks: Networks = flax.struct.field(pytree_node=False)
    config: ml_collections.FrozenConfigDict = flax.struct.field(pytree_node=False)

    # Names of what fine-tuning may start afresh from any pre-training.
    finetuning_state = (common.STEP, *stabilizers.STATE)

    @property
    def needs(self) -> frozenset:
        """What a batch must hold besides observations, actions, next observations (and rewards)."""
        ends = {'task_ends'} if self.config.absorbing_ends else set()  # Else the future term asks for a next action.
        return frozenset({'next_actions'} | ends) | intentions.needs(self.representation)

    # ------------------------------------------------------------------------------------------------------- features

    def features(self, params, observations):
        """Images → features (B, S) by the encoder in `params`; states are their own features."""
        if self.networks.encoder is None:
            return observations
        return self.networks.encoder.apply({'params': params['encoder']}, observations)

    def condition(self, params, features, actions, latents):
        """The vector field's part that is constant along the flow, for s, a, z: (B, H)."""
        return self.networks.vector_field.apply(
            {'params': params['vector_field']}, features, actions, latents, method='condition'
        )

    def velocity(self, params, x, times, condition):
        """v(x_t, t, s, a, z) with (s, a, z) given as `condition`."""
        return self.networks.vector_field.apply({'params': params['vector_field']}, x, times, condition)

    def sample_futures(self, params, noise, condition):
        """Future states (…, S): Euler steps of the field in `params` from noise (…, S), each clipped if configured;
        callers stop the gradient to the params."""
        params = rounded(params)
        return euler_integrate(
            lambda x, t: self.velocity(params, x, t, condition), noise, self.config.num_flow_steps, self.flow_bounds
        )

    def infer_intentions(self, params, batch, key):
        """z ~ q(z | s', a'), reparametrised; returns z (B, Z), means and log stds."""
        means, log_stds = self.networks.intention_encoder.apply(
            {'params': params['intention_encoder']}, batch['next_observations'], batch['next_actions']
        )
        return means + jnp.exp(log_stds) * jax.random.normal(key, means.shape), means, log_stds

    def intentions_and_kl(self, params, batch, key):
        """z (B, Z) of the transitions, and the KL term of its distribution."""
        if intentions.origin(self.config) != 'variational':
            return intentions.infer(self.representation, batch), jnp.zeros(())
        latents, means, log_stds = self.infer_intentions(params, batch, key)
        # Mean over latent dimensions, so that the effective weight of the KL term is λ / Z.
        return latents, -0.5 * jnp.mean(1 + 2 * log_stds - means**2 - jnp.exp(2 * log_stds), axis=-1).mean()

    def critic_intentions(self, params, batch, key):
        """z (B, Z) of the critic's targets: of the prior, of the transitions or, for `aggregate`, of other ones."""
        if self.config.critic_latent_type == 'prior':
            shape = (batch['actions'].shape[0], intentions.latent_dim(self.config))
            return intentions.prior(self.representation, key, shape)
        latents, _ = self.intentions_and_kl(params, batch, key)
        if self.config.critic_latent_type == 'aggregate':
            latents = jax.random.permutation(jax.random.fold_in(key, 1), latents)
        return latents

    def predicted_rewards(self, params, features):
        """R(s̃): (…, S) → (…,)."""
        return self.networks.reward.apply({'params': params['reward']}, features)

    def q_values(self, observations, actions):
        """Q(s, a), aggregated over the two critics as the actor sees it: (B,)."""
        qs = self.networks.critic.apply({'params': self.params['critic']}, observations, actions)
        return qs.min(axis=0) if self.config.q_agg == 'min' else qs.mean(axis=0)

    # --------------------------------------------------------------------------------------------------------- losses

    def occupancy_loss(self, params, batch, key):
        """L_FM + λ·L_KL: the value of the negative evidence lower bound with the SARSA TD-flow loss as its likelihood
        term; its gradient only with `future_intention_gradient`.

        L_FM = E[(1−γ)·ℓ_cur + γ·ℓ_fut] (arXiv 2506.08902, §4.2; arXiv 2503.09817): ℓ_cur draws the flow towards the
        current state, ℓ_fut towards samples of the target field at (s', a'). z gets gradient from ℓ_cur and L_KL only,
        as published, unless `future_intention_gradient`.
        """
        latent_key, time_key, noise_key, next_noise_key = jax.random.split(key, 4)
        latents, kl_loss = self.intentions_and_kl(params, batch, latent_key)

        # With images, the online encoder learns through x_t of the current term alone.
        observations = self.features(params, batch['observations'])
        states = lax.stop_gradient(observations)
        times = jax.random.uniform(time_key, (states.shape[0], 1))

        # Current term: x_t = t·s + (1−t)·ε, regressed on s − ε.
        noise = jax.random.normal(noise_key, states.shape)
        current_x = times * observations + (1 - times) * noise
        current_target = states - noise

        future_x, future_target = self.future_term(batch, lax.stop_gradient(latents), times, next_noise_key)

        # One forward pass for both terms; their conditions are the same, but z is a constant in the future one.
        if self.config.future_intention_gradient:
            future_condition = current_condition = self.condition(params, states, batch['actions'], latents)
        else:
            future_condition = self.condition(params, states, batch['actions'], lax.stop_gradient(latents))
            current_condition = self.networks.vector_field.apply(
                {'params': params['vector_field']}, future_condition, latents, method='through_last'
            )
        velocities = self.velocity(
            params,
            jnp.concatenate([current_x, future_x]),
            jnp.concatenate([times, times]),
            jnp.concatenate([current_condition, future_condition]),
        )
        targets = jnp.concatenate([current_target, future_target])
        current_loss, future_loss = jnp.split(jnp.mean((velocities - targets) ** 2, axis=-1), 2)
        flow_loss = jnp.mean((1 - self.config.discount) * current_loss + self.config.discount * future_loss)

        return flow_loss + self.config.kl_weight * kl_loss, {
            'flow_loss': flow_loss,
            'current_flow_loss': current_loss.mean(),
            'future_flow_loss': future_loss.mean(),
            'kl_loss': kl_loss,
        }

    def future_term(self, batch, latents, times, key):
        """x_t and target of ℓ_fut, each (B, S): x̂ by the target field from ε' at (s', a', z); with the same t, onto its
        velocity.

        Where a label ends the task (mask 0), `absorbing_ends` has x̂ = s̃, the state that the label belongs to, and the
        velocity that leads there: the task stays in it for ever.
        """
        next_states = self.features(self.target_params, batch['next_observations'])
        noise = jax.random.normal(key, next_states.shape)
        condition = self.condition(self.target_params, next_states, batch['next_actions'], latents)
        futures = map_rows(partial(self.sample_futures, self.target_params), noise, condition)
        x = times * futures + (1 - times) * noise
        target = self.velocity(rounded(self.target_params), x, times, condition)
        if not (self.config.absorbing_ends and 'reward_observations' in batch):  # Reward-free data end nothing.
            return x, target
        states = self.features(self.target_params, batch['reward_observations'])
        ends = batch['masks'][:, None] == 0
        return jnp.where(ends, times * states + (1 - times) * noise, x), jnp.where(ends, states - noise, target)

    def reward_loss(self, params, batch):
        """L_R = E(R(s̃) − r)², s̃ the state that the reward belongs to; features carry no gradient to the encoder."""
        features = lax.stop_gradient(self.features(params, batch['reward_observations']))
        return common.reward_regression(self.predicted_rewards(params, features), batch['rewards'])

    def q_targets(self, params, batch, key):
        """y (M, B) without gradient: the returns under M intentions per row; for `gpi` their maximum, (1, B)."""
        params = lax.stop_gradient(params)
        if self.num_critic_latents == 1:
            return self.intention_returns(params, batch, key)[None]
        returns = intention_values(self.replace(params=params), batch, key, self.num_critic_latents)
        return returns.max(axis=0, keepdims=True) if self.config.policy_extraction == 'gpi' else returns

    def intention_returns(self, params, batch, key):
        """Q̂(s, a, z) = 1/((1−γ)·N)·Σ_k R(x̂_k), N futures of the field in `params` at (s, a, z), one z per row: (B,).

        The occupancy counts s itself: where rewards belong to s' (ExORL), this is R(s) + γ times their return.
        """
        latent_key, noise_key = jax.random.split(key)
        latents = self.critic_intentions(params, batch, latent_key)
        states = self.features(params, batch['observations'])
        condition = self.condition(params, states, batch['actions'], latents)
        noise = jax.random.normal(noise_key, (states.shape[0], self.config.num_flow_goals, states.shape[1]))

        def rewards_of_row(noise, condition):  # (N, S), (H,) → (N,)
            return self.predicted_rewards(rounded(params), self.sample_futures(params, noise, condition))

        rewards = map_rows(rewards_of_row, noise, condition, samples_per_row=noise.shape[1])  # (B, N)
        return rewards.mean(axis=1) / (1 - self.config.discount)

    @property
    def num_critic_latents(self):
        """M, intentions per row in the critic's targets: as configured; else 1, and 8 for the maximum of `gpi`."""
        return self.config.num_critic_latents or (8 if self.config.policy_extraction == 'gpi' else 1)

    @property
    def expectile(self):
        """μ; the ablations' policy improvement is explicit or none: their Q is the mean."""
        return self.config.expectile if self.config.policy_extraction == 'implicit_gpi' else 0.5

    def critic_loss(self, params, batch, key):
        """L_Q = E_{e,i} ρ_μ(y − Q_e(s, a)): over random z, implicit generalised policy improvement. With the paper's
        argument, Q − Q̂, μ > 0.5 would make Q a low expectile of the targets, not the high one that is meant."""
        targets = self.q_targets(params, batch, key)
        qs = self.networks.critic.apply({'params': params['critic']}, batch['observations'], batch['actions'])  # (2, B)
        loss = common.expectile_loss(targets[:, None] - qs, self.expectile).mean()
        return loss, {'critic_loss': loss, **common.q_metrics(qs), 'q_target_mean': targets.mean()}

    def cloning_loss(self, params, batch):
        """L_BC = −E log π(a|s)."""
        means, stds = self.networks.actor.apply({'params': params['actor']}, batch['observations'])
        return common.behavioral_cloning(means, stds, batch['actions'])

    def actor_loss(self, params, batch):
        """L_π = −E agg_e Q_e(s, clip₁(mode)) − α·E log π(a|s); `normalize_q_loss` divides the first term by sg E|q|."""
        means, stds = self.networks.actor.apply({'params': params['actor']}, batch['observations'])
        frozen = self.replace(params=lax.stop_gradient(params))
        q = frozen.q_values(batch['observations'], jnp.clip(means, -1, 1))
        bc_loss, metrics = common.behavioral_cloning(means, stds, batch['actions'])
        loss = common.q_maximization(q, self.config.normalize_q_loss) + self.config.alpha * bc_loss
        return loss, {'actor_loss': loss, 'actor_q': q.mean(), **metrics}

    def pretraining_loss(self, params, batch, key):
        """L = L_FM + λ·L_KL + L_BC."""
        return common.total([self.occupancy_loss(params, batch, key), self.cloning_loss(params, batch)])

    def finetuning_loss(self, params, batch, key, update_actor: bool = True):
        """L = L_R + L_Q + L_FM + λ·L_KL, + L_π in the steps that update the actor."""
        critic_key, occupancy_key = jax.random.split(key)
        terms = [
            self.reward_loss(params, batch),
            self.critic_loss(params, batch, critic_key),
            self.occupancy_loss(params, batch, occupancy_key),
        ]
        if update_actor:
            terms.append(self.actor_loss(params, batch))
        return common.total(terms)

    # -------------------------------------------------------------------------------------------------------- updates

    def pretrain(self, batch, key):
        """One reward-free update of field, intention encoder and cloned actor; returns (agent, metrics)."""
        modules = ['vector_field', 'actor', *self.encoder_modules]
        return self._step(modules, lambda params: self.pretraining_loss(params, batch, key), batch, key)

    def finetune(self, batch, key, *, update_actor: bool):
        """One update on labelled data; `update_actor` is static, and without it the actor stays exactly where it is."""
        modules = ['vector_field', 'critic', 'reward', *self.encoder_modules]
        modules += ['actor'] if update_actor else []
        rates = dict.fromkeys(['vector_field', *self.encoder_modules], self.config.finetuning_field_rate)
        loss_fn = lambda params: self.finetuning_loss(params, batch, key, update_actor)  # noqa: E731
        agent, metrics = self._step(modules, loss_fn, batch, key, rates)
        return common.count_update(agent), metrics

    def begin_finetuning(self, labelled_batch, key):
        """The switch between the phases: every target is set to a copy of its online network.

        labelled_batch: `observation_min` and `observation_max` where labelled observations have a normaliser of their
        own; flow samples are clipped to that range from now on. InFOM infers nothing else from labelled data here.
        """
        del key
        agent = common.reset_targets(self)
        if self.flow_bounds is not None and 'observation_min' in labelled_batch:
            lowest, highest = labelled_batch['observation_min'], labelled_batch['observation_max']
            agent = agent.replace(flow_bounds=clipping_bounds(lowest, highest))
        return agent.replace(representation=common.reset_targets(self.representation))

    def act(self, observations, key, temperature=1.0):
        """Actions (B, A) in [−1, 1]: the mode plus `temperature` times the policy's noise; 0 gives the mode."""
        means, stds = self.networks.actor.apply({'params': common.acting_actor(self)}, observations)
        return jnp.clip(means + temperature * stds * jax.random.normal(key, means.shape), -1, 1)

    @property
    def encoder_modules(self):
        """Those of image encoder and intention encoder that there are."""
        return [name for name in ('encoder', 'intention_encoder') if name in self.params]

    def _step(self, modules, loss_fn, batch, key, rates=None):
        agent, metrics = common.update_modules(self, modules, loss_fn, rates)
        # Apart: no gradient passes between the representation and the occupancy model.
        representation, more = intentions.update(self.representation, batch, random_keys.beside(key))
        return agent.replace(representation=representation), metrics | more

    # ------------------------------------------------------------------------------------------------------- creation

    @classmethod
    def create(cls, key, example_batch, config):
        """A fresh agent for batches like `example_batch`.

        key: a JAX random key. example_batch: observations (B, …), actions (B, A) and, for `clip_flow_goals`,
        observation_min and observation_max (S,) of the normalised pre-training observations. Raises UserError for an
        inconsistent config.
        """
        config = ml_collections.FrozenConfigDict(config)
        validate_config(config)
        if (stabilized := stabilizers.stabilized(cls, config)) is not cls:
            return stabilized.create(key, example_batch, config)
        observations, actions = example_batch['observations'], example_batch['actions']
        keys = dict(zip(Networks._fields, jax.random.split(key, len(Networks._fields)), strict=True))
        params = {}

        def init(name, module, *inputs, **kwargs):
            params[name] = module.init(keys[name], *inputs, **kwargs)['params']

        encoder = make_encoder(config.encoder)  # A definition: each network that holds it has parameters of its own.
        features = observations
        if encoder is not None:
            init('encoder', encoder, observations)
            features = encoder.apply({'params': params['encoder']}, observations)
        latents = jnp.zeros((*actions.shape[:-1], intentions.latent_dim(config)))
        intention_encoder = None
        if intentions.origin(config) == 'variational':
            sizes = (config.latent_dim, config.intention_encoder_hidden_dims, config.intention_encoder_layer_norm)
            intention_encoder = IntentionEncoder(*sizes, encoder=encoder)
            init('intention_encoder', intention_encoder, observations, actions)
        critic_norm = config.value_layer_norm if config.critic_layer_norm is None else config.critic_layer_norm
        networks = Networks(
            vector_field=VectorField(
                output_dim=features.shape[-1],
                condition_dim=features.shape[-1] + actions.shape[-1] + latents.shape[-1],
                hidden_dims=config.value_hidden_dims,
                layer_norm=config.value_layer_norm,
            ),
            intention_encoder=intention_encoder,
            critic=ScalarHead(config.value_hidden_dims, critic_norm, num_ensembles=2, encoder=encoder),
            reward=ScalarHead(config.reward_hidden_dims, config.reward_layer_norm),
            actor=GaussianActor(
                actions.shape[-1], config.actor_hidden_dims, config.actor_layer_norm, config.const_std, encoder
            ),
            encoder=encoder,
        )
        flow_inputs = (features, jnp.zeros(()), features, actions, latents)
        init('vector_field', networks.vector_field, *flow_inputs, method='init_all')
        init('critic', networks.critic, observations, actions)
        init('reward', networks.reward, features)
        init('actor', networks.actor, observations)

        flow_bounds = None
        if config.clip_flow_goals:
            flow_bounds = clipping_bounds(example_batch['observation_min'], example_batch['observation_max'])
        return cls(
            params=params,
            target_params=common.copy_of({k: params[k] for k in ('vector_field', 'encoder') if k in params}),
            opt_states=common.init_adam(params, config),
            flow_bounds=flow_bounds,
            representation=intentions.create(random_keys.beside(key), example_batch, config),
            networks=networks,
            config=config,
        )


AGENT = InFOMAgent  # What `agents.load` hands to the training loop.


def validate_config(config):
    """Raises UserError for values that no InFOM run can have."""
    common.validate_optimizer(config)
    intentions.validate_config(config)
    stabilizers.validate_config(config)
    common.require_choice(config, 'q_agg', ('min', 'mean'))
    common.require_choice(config, 'critic_latent_type', ('prior', 'encoding', 'aggregate'))
    common.require_at_least(1, config, 'latent_dim', 'num_flow_goals', 'num_flow_steps')
    common.require_at_least(0, config, 'alpha', 'kl_weight', 'finetuning_field_rate')
    if config.num_critic_latents is not None:
        common.require_at_least(1, config, 'num_critic_latents')
    if config.clip_flow_goals and config.encoder is not None:
        raise UserError("agent.clip_flow_goals=True with an encoder: the features' range is not known; set it to False")


def has_schedule(config) -> bool:
    """Whether anything changes over `schedule_steps`, so that a run has to say how many they are."""
    return common.has_schedule(config) or 'anneal_expectile' in config.stabilizer


def get_config():
    """The defaults; per-task published values come from `utils/presets.py`."""
    return ml_collections.ConfigDict(
        dict(
            agent_name='infom',
            lr=3e-4,  # Adam learning rate.
            actor_lr=ml_collections.config_dict.placeholder(float),  # The actor's own learning rate; None: lr.
            finetuning_schedule='cosine',  # Learning rates of fine-tuning: cosine, to 0; constant, as published.
            schedule_steps=ml_collections.config_dict.placeholder(int),  # Updates it takes; None: all of a run's.
            finetuning_field_rate=1.0,  # Fine-tuning's share of the vector field's and its encoders' learning rate.
            actor_tau=0.001,  # Rate, per actor update, of the average of the actor that acts; 1: no average.
            joint_adam=False,  # One Adam over all modules, trained or not, as published.
            batch_size=256,
            intention_encoder_hidden_dims=(512, 512, 512, 512),
            actor_hidden_dims=(512, 512, 512, 512),
            value_hidden_dims=(512, 512, 512, 512),  # Critic and vector field.
            reward_hidden_dims=(512, 512, 512, 512),
            intention_encoder_layer_norm=True,
            value_layer_norm=True,  # Critic and vector field; without it others report collapses.
            actor_layer_norm=False,
            reward_layer_norm=True,
            reward_weight_decay=0.0,  # Decoupled weight decay (AdamW) of the learned reward.
            latent_dim=512,  # Z.
            discount=0.99,  # γ.
            tau=0.005,  # Rate of the target networks' moving average.
            expectile=0.9,  # μ of the critic's expectile loss.
            absorbing_ends=True,  # The occupancy model stays where the task ends (mask 0); published: it goes on.
            future_intention_gradient=False,  # Let z learn from ℓ_fut as well as from ℓ_cur.
            kl_weight=0.01,  # λ; the KL term is a mean over Z.
            alpha=10.0,  # Weight of behavioural cloning in the actor loss; tuned per task.
            q_agg='min',  # Aggregation of the two critics in the actor loss: min or mean.
            intention_encoder='variational',  # Origin of z; ablations: none, fb, hilp (agents/intentions.py).
            policy_extraction='implicit_gpi',  # Expectile over z; ablations: gpi (max over z), one_step (no z).
            critic_latent_type='prior',  # z of the critic's targets: prior, encoding, or aggregate (other rows').
            num_critic_latents=ml_collections.config_dict.placeholder(int),  # M, z per row in them; None: 1, for gpi 8.
            num_flow_goals=16,  # N, futures per row in the critic's target.
            num_flow_steps=10,  # Euler steps.
            clip_flow_goals=True,  # Clip flow samples to the observed range after each step (states only).
            normalize_q_loss=False,  # Divide the actor's Q term by its mean magnitude.
            actor_freq=4,  # Fine-tuning steps per actor update.
            const_std=True,  # Policy standard deviation fixed at 1; else a learned vector.
            encoder=ml_collections.config_dict.placeholder(str),  # Image encoder (utils/encoders.py); None: states.
            **stabilizers.settings(),
        )
    )
