"""Candidates against instability in long fine-tuning: each changes one thing of InFOM; all are off by default.

`agent.stabilizer` names one, or several joined by '+'; each is a class in front of `InFOMAgent` that overrides what it
changes. What is measured of them is in docs/stability.md. Shapes: B batch, S state features.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from agents import common
from utils.errors import UserError
from utils.values import value_range

REWARD_RANGE = 'reward_range'  # Beside the Adam states: (lowest, highest) label of the batches so far.
STATE = (REWARD_RANGE,)


def settings():
    """The settings that InFOM gains by this file; made anew each time, as configs that shared a placeholder would share
    its value."""
    return dict(
        stabilizer='',  # Names of `STABILIZERS`, joined by '+'.
        critic_layer_norm=config_dict.placeholder(bool),  # The critic's own; None: value_layer_norm.
        actor_weight_decay=0.0,  # Decoupled weight decay (AdamW) of the actor,
        critic_weight_decay=0.0,  # of the critic,
        vector_field_weight_decay=0.0,  # and of the vector field.
    )


class AnnealExpectile:
    """The critic's expectile rises from 0.5, the mean, to its setting over `schedule_steps` fine-tuning updates."""

    @property
    def expectile(self):
        return 0.5 + (super().expectile - 0.5) * common.finetuning_progress(self)


class LabelledRange:
    """Keeps the range of the labels that fine-tuning has seen."""

    @classmethod
    def create(cls, key, example_batch, config):
        agent = super().create(key, example_batch, config)
        return agent.replace(opt_states=agent.opt_states | {REWARD_RANGE: (jnp.zeros(()), jnp.zeros(()))})

    @property
    def reward_range(self):
        return self.opt_states[REWARD_RANGE]

    def _with_range(self, lowest, highest):
        return self.replace(opt_states=self.opt_states | {REWARD_RANGE: (lowest, highest)})

    def begin_finetuning(self, labelled_batch, key):
        rewards = labelled_batch['rewards']
        return super().begin_finetuning(labelled_batch, key)._with_range(rewards.min(), rewards.max())

    def finetune(self, batch, key, *, update_actor: bool):
        lowest, highest = self.reward_range
        seen = self._with_range(
            jnp.minimum(lowest, batch['rewards'].min()), jnp.maximum(highest, batch['rewards'].max())
        )
        return super(LabelledRange, seen).finetune(batch, key, update_actor=update_actor)


class ClipRewards(LabelledRange):
    """R is clipped to the range of the labels where it scores states, but not where it learns: beyond an extreme label
    nothing would call it back."""

    def predicted_rewards(self, params, features):
        return jnp.clip(super().predicted_rewards(params, features), *self.reward_range)

    def reward_loss(self, params, batch):
        return super(ClipRewards, self._with_range(-jnp.inf, jnp.inf)).reward_loss(params, batch)


class BoundQ(LabelledRange):
    """Targets of the critic, and Q as the actor sees it, are clipped to what rewards within the labels' range allow."""

    @property
    def _value_range(self):
        return value_range(self.reward_range, self.config.discount)

    def q_targets(self, params, batch, key):
        return jnp.clip(super().q_targets(params, batch, key), *self._value_range)

    def q_values(self, observations, actions):
        return jnp.clip(super().q_values(observations, actions), *self._value_range)


class ClipAtEnd:
    """Flow samples are clipped once, after the last Euler step, instead of after each."""

    def sample_futures(self, params, noise, condition):
        unclipped = self.replace(flow_bounds=None)
        futures = super(ClipAtEnd, unclipped).sample_futures(params, noise, condition)
        return futures if self.flow_bounds is None else jnp.clip(futures, *self.flow_bounds)


class ClipGradients:
    """The gradient of all modules together is clipped to a norm of 1 before Adam."""

    def _step(self, modules, loss_fn, batch, key, rates=None):
        return super()._step(modules, lambda params: loss_fn(_with_clipped_gradient(params)), batch, key, rates)


@jax.custom_vjp
def _with_clipped_gradient(params):
    """`params`, whose gradient is clipped to a global norm of 1."""
    return params


def _clip(_, gradients):
    return (optax.clip_by_global_norm(1.0).update(gradients, optax.EmptyState())[0],)


_with_clipped_gradient.defvjp(lambda params: (params, None), _clip)


STABILIZERS = {
    'clip_rewards': ClipRewards,
    'bound_q': BoundQ,
    'clip_at_end': ClipAtEnd,
    'clip_gradients': ClipGradients,
    'anneal_expectile': AnnealExpectile,
}


def validate_config(config):
    """Raises UserError for a stabiliser that there is not, one named twice or void."""
    names = _names(config)
    for name in names:
        if name not in STABILIZERS or names.count(name) > 1:
            raise UserError(
                f'agent.stabilizer={config.stabilizer!r}: expected some of {", ".join(STABILIZERS)}, each once, joined '
                "by '+'"
            )


def stabilized(agent_class, config):
    """`agent_class` with the configured stabilisers in front; itself where there are none, or they are there."""
    if issubclass(agent_class, tuple(STABILIZERS.values())):
        return agent_class
    return _stabilized(agent_class, _names(config))


def _names(config) -> tuple[str, ...]:
    return tuple(config.stabilizer.split('+')) if config.stabilizer else ()


@functools.cache  # One class for each choice: compiled programs know their agents by class.
def _stabilized(agent_class, names):
    if not names:
        return agent_class
    return type(agent_class.__name__, (*(STABILIZERS[name] for name in names), agent_class), {})
