"""InFOM's ablations: where its intentions z come from, if not from its own variational encoder.

A representation that is trained beside the occupancy model gives them: forward-backward (`fb`, agents/fb_iql.py) or
Hilbert (`hilp`, agents/hilp_iql.py). z carries no gradient there, so the representation is that agent itself, trained
by its own loss on the same batches, with its own optimiser and targets. This file holds what InFOM needs of it.
Shapes: B batch, Z latent dimensions.
"""

import jax
import jax.numpy as jnp
from jax import lax

from agents import common, fb_iql, hilp_iql
from utils.errors import UserError

_AGENTS = {'fb': fb_iql, 'hilp': hilp_iql}
# Settings that the representation takes from InFOM; its others, HILP's expectile and all LayerNorms of critics among
# them, are its own.
_SHARED = (
    'lr', 'actor_lr', 'actor_tau', 'batch_size', 'actor_hidden_dims', 'value_hidden_dims', 'actor_layer_norm',
    'latent_dim', 'discount', 'tau', 'const_std', 'encoder',
)  # fmt: skip


def validate_config(config):
    """Raises UserError for unknown ablations, and for an extraction that the intentions do not allow."""
    encoder, extraction = config.intention_encoder, config.policy_extraction
    common.require_choice(config, 'intention_encoder', ('variational', 'none', *_AGENTS))
    common.require_choice(config, 'policy_extraction', ('implicit_gpi', 'gpi', 'one_step'))
    if (encoder == 'none' and extraction == 'gpi') or (encoder in _AGENTS and extraction == 'one_step'):
        raise UserError(
            f'agent.policy_extraction={extraction} with agent.intention_encoder={encoder}: one_step is without '
            'intentions, gpi the maximum over several'
        )


def origin(config) -> str:
    """Where z comes from: `config.intention_encoder`, but `none` for the one-step extraction, which has no z."""
    return 'none' if config.policy_extraction == 'one_step' else config.intention_encoder


def latent_dim(config) -> int:
    """Z; 0 without intentions."""
    return 0 if origin(config) == 'none' else config.latent_dim


def create(key, example_batch, config):
    """The fresh agent whose representation gives z, of InFOM's sizes and rates; None where `intention_encoder` asks for
    none."""
    if config.intention_encoder not in _AGENTS:
        return None
    module = _AGENTS[config.intention_encoder]
    own = module.get_config()
    own.update({name: config[name] for name in _SHARED})
    own.update({name: config.value_hidden_dims for name in own if name == 'repr_hidden_dims'})
    return module.AGENT.create(key, example_batch, own)


def needs(representation) -> frozenset:
    """What the representation must find in a batch."""
    return frozenset() if representation is None else representation.needs


def infer(representation, batch):
    """z (B, Z) of a batch's transitions, of norm √Z and without gradient: B̂(s') of FB, the direction of φ₁(s') − φ₁(s)
    of HILP; (B, 0) where there is no representation."""
    if representation is None:
        return jnp.zeros((batch['actions'].shape[0], 0))
    if isinstance(representation, fb_iql.AGENT):
        return lax.stop_gradient(representation.backward(representation.params, batch['next_observations']))
    return common.to_sphere(representation.displacements(representation.params, batch))


def prior(representation, key, shape):
    """z (…, Z) that the critic draws: N(0, I), or with a representation uniform on the sphere of radius √Z."""
    return jax.random.normal(key, shape) if representation is None else common.sphere_latents(key, shape)


def update(representation, batch, key):
    """One step of the representation alone; returns (representation, metrics)."""
    if representation is None:
        return None, {}
    if isinstance(representation, fb_iql.AGENT):
        # With its policy, which F and B are about; V and Q, which are not, rest in pre-training.
        representation, metrics = representation.pretrain(batch, key)
    else:
        representation, metrics = representation.pretrain_representation(batch)
    return representation, {f'representation_{name}': value for name, value in metrics.items()}
