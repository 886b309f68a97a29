"""Flax modules that the agents are made of: MLPs, Gaussian heads, ensembled critics and the flow's vector field.

Only parameters and forward passes live here; losses belong to `agents/`, ODE integration to `utils/flows.py`, image
encoders to `utils/encoders.py`. Shapes in comments: B batch, N samples per row, D state features, A action dimensions,
Z latent dimensions, H hidden width.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from utils import devices
from utils.processor import has_avx512

LAYER_NORM_EPSILON = 1e-6


def kernel_init(scale: float = 1.0):
    """Glorot uniform (variance scaling, fan average), the initialiser of every kernel; `scale` 0.01 is the actor's
    mean head."""
    return nn.initializers.variance_scaling(scale, 'fan_avg', 'uniform')


def rounded(params):
    """Parameters for passes without gradient, in which a layer's output feeds nothing but the next product: at the
    precision bfloat16 with all kernels in bfloat16, else `params` themselves.

    `matmul` then rounds a layer's output before it is stored, not on its way into the product, which rounds nothing
    else and halves what travels through an accelerator's memory.
    """
    if jax.config.jax_default_matmul_precision != devices.BFLOAT16:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(jnp.bfloat16) if path[-1].key == 'kernel' else x, params
    )


@jax.custom_vjp
def matmul(x, kernel):
    """x (…, I) @ kernel (I, O), with a gradient of the kernel that is fast on CPUs, too; a kernel in bfloat16
    (`rounded`) has x rounded as well, sums are float32."""
    return jnp.matmul(x.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)


def _matmul_forward(x, kernel):
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals, gradient):
    x, kernel = residuals
    rows, row_gradients = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])

    def folded(rows, row_gradients):
        return rows.T @ row_gradients

    def transposed_first(rows, row_gradients):
        return jax.lax.optimization_barrier(rows.T) @ row_gradients

    # XLA folds a transposition into the product, but on a CPU with AVX2 a product whose left side is stored transposed
    # takes 1.6 times as long as transposing it first. Accelerators, and CPUs with AVX-512, fold for free.
    on_cpu = folded if has_avx512() else transposed_first
    kernel_gradient = jax.lax.platform_dependent(rows, row_gradients, cpu=on_cpu, default=folded)
    return gradient @ kernel.T, kernel_gradient


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def gradient_through(product, x, kernel):
    """`product` unchanged, with the gradient to x (…, I) that x @ kernel (I, O), one of its summands, would pass on.

    For a product that was computed with x as a constant; the kernel has its gradient from there and gets none here.
    """
    del x, kernel
    return product


gradient_through.defvjp(
    lambda product, x, kernel: (product, kernel), lambda kernel, gradient: (gradient, gradient @ kernel.T, None)
)


class Dense(nn.Module):
    """nn.Dense with this file's initialiser (`scale` as in `kernel_init`) and `matmul`, of a kernel as it is given."""

    features: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', kernel_init(self.scale), (x.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        return matmul(x, kernel) + bias


@jax.custom_vjp
def layer_norm(x, scale, bias):
    """LayerNorm (arXiv 1607.06450) of x (…, H) over its last axis, then `scale` and `bias` (H,)."""
    return _layer_norm_forward(x, scale, bias)[0]


def _layer_norm_forward(x, scale, bias):
    # The variance of what is centred, not E x² − (E x)²: of this chain XLA makes one kernel on a GPU.
    mean = x.mean(axis=-1, keepdims=True)
    centred = x - mean
    inverse_std = jax.lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
    return centred * inverse_std * scale + bias, (x, mean, inverse_std, scale)


def _layer_norm_backward(residuals, gradient):
    # In closed form: what automatic differentiation derives stores arrays of x's shape that hold one number a row.
    x, mean, inverse_std, scale = residuals
    # Held in memory: on a GPU XLA would compute it anew for each of its uses, in kernels of their own.
    normalized = jax.lax.optimization_barrier((x - mean) * inverse_std)
    # Centred first, then without its part along `normalized`, whose mean is 0: a chain, and one kernel, as above.
    scaled = gradient * scale
    centred = scaled - scaled.mean(axis=-1, keepdims=True)
    across = centred - normalized * (centred * normalized).mean(axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return inverse_std * across, (gradient * normalized).sum(axis=rows), gradient.sum(axis=rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """nn.LayerNorm, its parameters' names included, by `layer_norm`, whose gradient takes less time."""

    @nn.compact
    def __call__(self, x):
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
        bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x, scale, bias)


class MLP(nn.Module):
    """Dense → GELU → (LayerNorm) for each hidden layer; with `output_dim`, one plain Dense on top."""

    hidden_dims: Sequence[int]
    output_dim: int | None = None
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for width in self.hidden_dims:
            x = nn.gelu(Dense(width)(x))
            if self.layer_norm:
                x = LayerNorm()(x)
        if self.output_dim is not None:
            x = Dense(self.output_dim)(x)
        return x


def joined(encoder: nn.Module | None, observations, *inputs):
    """Observations, behind an image encoder if there is one, and other inputs side by side: (B, …)."""
    if encoder is not None:
        observations = encoder(observations)
    return jnp.concatenate([observations, *inputs], axis=-1)


def ensemble_of_mlps(size: int):
    """`MLP` for a size of 1; else a module of `size` of them with separate parameters, on the same input, whose output
    gains a leading axis (size, …)."""
    if size == 1:
        return MLP
    return nn.vmap(
        MLP, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=None, out_axes=0, axis_size=size
    )


class ScalarHead(nn.Module):
    """A function of concatenated inputs to one number per row, behind an optional image encoder on the first input.

    With `num_ensembles` ≥ 2 the MLPs are vmapped modules with separate parameters and the output gains a leading axis:
    (num_ensembles, B); the encoder in front is shared by the members. With `num_ensembles` 1 the output is (B,).
    """

    hidden_dims: Sequence[int]
    layer_norm: bool = True
    num_ensembles: int = 1
    encoder: nn.Module | None = None

    @nn.compact
    def __call__(self, observations, *inputs):
        x = joined(self.encoder, observations, *inputs)
        return ensemble_of_mlps(self.num_ensembles)(self.hidden_dims, 1, self.layer_norm)(x).squeeze(-1)


class VectorHead(nn.Module):
    """A function of concatenated inputs to a vector per row, behind an optional image encoder on the first input.

    As `ScalarHead`: with `num_ensembles` ≥ 2 the output is (num_ensembles, B, output_dim), from MLPs with separate
    parameters behind one shared encoder; with 1 it is (B, output_dim).
    """

    output_dim: int
    hidden_dims: Sequence[int]
    layer_norm: bool = True
    num_ensembles: int = 1
    encoder: nn.Module | None = None

    @nn.compact
    def __call__(self, observations, *inputs):
        x = joined(self.encoder, observations, *inputs)
        return ensemble_of_mlps(self.num_ensembles)(self.hidden_dims, self.output_dim, self.layer_norm)(x)


class GaussianActor(nn.Module):
    """Gaussian policy π(a | s, …) with a state-independent standard deviation: mean and std, both (B, A).

    `const_std` fixes the standard deviation at 1; otherwise log std is a learned vector clipped to [−5, 2].
    """

    action_dim: int
    hidden_dims: Sequence[int]
    layer_norm: bool = False
    const_std: bool = True
    encoder: nn.Module | None = None

    @nn.compact
    def __call__(self, observations, *inputs):
        features = MLP(self.hidden_dims, layer_norm=self.layer_norm)(joined(self.encoder, observations, *inputs))
        means = Dense(self.action_dim, 0.01, name='mean')(features)
        if self.const_std:
            return means, jnp.ones_like(means)
        log_stds = self.param('log_std', nn.initializers.zeros, (self.action_dim,))
        return means, jnp.broadcast_to(jnp.exp(jnp.clip(log_stds, -5.0, 2.0)), means.shape)


class IntentionEncoder(nn.Module):
    """q(z | s', a'): a diagonal Gaussian over latent intentions; returns mean and log std, both (B, Z).

    log std is clipped to [−10, 2] so that the KL term cannot overflow.
    """

    latent_dim: int
    hidden_dims: Sequence[int]
    layer_norm: bool = True
    encoder: nn.Module | None = None

    @nn.compact
    def __call__(self, observations, actions):
        features = MLP(self.hidden_dims, layer_norm=self.layer_norm)(joined(self.encoder, observations, actions))
        means = Dense(self.latent_dim, name='mean')(features)
        log_stds = Dense(self.latent_dim, name='log_std')(features)
        return means, jnp.clip(log_stds, -10.0, 2.0)


class VectorField(nn.Module):
    """The flow's velocity v(x_t, t, s, a, z): an MLP on the concatenation [x_t, t, s, a, z], evaluated in two parts.

    Its first layer is linear in its input, so the [s, a, z] part, constant along the ODE and over the samples of a
    row, is computed once by `condition` and added at every evaluation. The parameters and the function are exactly
    those of the plain concatenated MLP (`tests/test_flows.py`): `first_kernel` has the rows of x_t (D), t (1), then s,
    a, z (`condition_dim`).
    """

    output_dim: int
    condition_dim: int
    hidden_dims: Sequence[int]
    layer_norm: bool = True

    def setup(self):
        input_dim = self.output_dim + 1 + self.condition_dim
        self.first_kernel = self.param('first_kernel', kernel_init(), (input_dim, self.hidden_dims[0]))
        self.first_bias = self.param('first_bias', nn.initializers.zeros, (self.hidden_dims[0],))
        if self.layer_norm:
            self.first_norm = LayerNorm()
        self.rest = MLP(self.hidden_dims[1:], self.output_dim, self.layer_norm)

    def condition(self, *conditions):
        """The first layer's constant part for conditions s, a, (z), each (B, ·): (B, H)."""
        kernel = self.first_kernel[self.output_dim + 1 :]
        return matmul(jnp.concatenate(conditions, axis=-1), kernel) + self.first_bias

    def through_last(self, condition, last):
        """`condition` of constants, with the gradient to the last of them, `last` (B, Z), restored.

        Where one condition serves with and without that gradient, its product and its kernel's gradient are computed
        once.
        """
        return gradient_through(condition, last, self.first_kernel[self.first_kernel.shape[0] - last.shape[-1] :])

    def __call__(self, x, times, condition):
        """Velocity at x (…, D) and times (…, 1) or a scalar, given `condition` (…, H), broadcast against x."""
        kernel = self.first_kernel
        h = matmul(x, kernel[: self.output_dim]) + times * kernel[self.output_dim] + condition
        h = nn.gelu(h)
        if self.layer_norm:
            h = self.first_norm(h)
        return self.rest(h)

    def init_all(self, x, times, *conditions):
        """Runs both parts, so that one `init` creates every parameter."""
        return self(x, times, self.condition(*conditions))


def gaussian_log_prob(means, stds, x):
    """log N(x; means, diag stds²), summed over the last axis: (…, A) → (…)."""
    return jax.scipy.stats.norm.logpdf(x, means, stds).sum(axis=-1)


def tanh_gaussian_log_prob(means, stds, actions):
    """log density at actions in (−1, 1) of tanh(u), u ~ N(means, diag stds²), summed over the last axis: (…, A) → (…).

    Subtracts log(1 − a²), the log derivative of tanh, written so that it stays exact near ±1 (SAC, arXiv 1812.05905,
    appendix C).
    """
    log_derivatives = jnp.log1p(actions) + jnp.log1p(-actions)
    return gaussian_log_prob(means, stds, jnp.arctanh(actions)) - log_derivatives.sum(axis=-1)


class ContrastiveCritic(nn.Module):
    """The representations φ_e(s, a) and ψ_e(g) whose inner products are contrastive logits: each (E, B, Z).

    The two are apart, so that one set of goals meets several of states and actions; each has an encoder of its own.
    """

    latent_dim: int
    hidden_dims: Sequence[int]
    layer_norm: bool = True
    num_ensembles: int = 2
    encoder: nn.Module | None = None
    goal_encoder: nn.Module | None = None

    def setup(self):
        sizes = (self.latent_dim, self.hidden_dims, self.layer_norm, self.num_ensembles)
        self.state_action_head = VectorHead(*sizes, encoder=self.encoder)
        self.goal_head = VectorHead(*sizes, encoder=self.goal_encoder)

    def state_actions(self, observations, actions):
        return self.state_action_head(observations, actions)

    def goals(self, goals):
        return self.goal_head(goals)

    def __call__(self, observations, actions, goals):
        return self.state_actions(observations, actions), self.goals(goals)
