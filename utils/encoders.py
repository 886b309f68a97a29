"""Image encoders by name: uint8 images (…, height, width, channels) to feature vectors. `mlp` encodes states.

IMPALA residual networks (arXiv 1802.01561) and ResNet-34 (arXiv 1512.03385) with group norm and coordinate channels.
The agents receive them through `make_encoder`; nothing here knows about losses.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from utils.errors import UserError
from utils.networks import MLP, kernel_init


def _convolve(images, kernel, padding='SAME'):
    return lax.conv_general_dilated(images, kernel, (1, 1), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


@jax.custom_vjp
def same_convolution(images, kernel):
    """Convolution of stride 1 that keeps the size: (N, H, W, C) by (k, k, C, F), k odd, to (N, H, W, F).

    Its gradients on a CPU are convolutions in the layout of the forward pass. JAX's own have other layouts, which XLA
    translates for its fast kernels in the outermost part of a program alone: in a loop, where training runs, an
    encoder's gradient takes fifteen to twenty times as long.
    """
    return _convolve(images, kernel)


def _same_convolution_forward(images, kernel):
    return _convolve(images, kernel), (images, kernel)


def _same_convolution_backward(operands, cotangent):
    def on_cpu(images, kernel, cotangent):
        for_images = _convolve(cotangent, lax.rev(kernel, (0, 1)).swapaxes(2, 3))
        # The kernel's gradient at (i, j) is the product of the images, shifted by (i, j), and the cotangent, summed
        # over images and positions: a convolution with images in place of channels, and the cotangent as its kernel.
        padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
        for_kernel = _convolve(images.swapaxes(0, 3), cotangent.transpose(1, 2, 0, 3), padding)
        return for_images, for_kernel.transpose(1, 2, 0, 3)

    def elsewhere(images, kernel, cotangent):
        (for_images,) = jax.linear_transpose(lambda images: _convolve(images, kernel), images)(cotangent)
        (for_kernel,) = jax.linear_transpose(lambda kernel: _convolve(images, kernel), kernel)(cotangent)
        return for_images, for_kernel

    return lax.platform_dependent(*operands, cotangent, cpu=on_cpu, default=elsewhere)


same_convolution.defvjp(_same_convolution_forward, _same_convolution_backward)


class ImpalaStack(nn.Module):
    """3×3 convolution, 3×3 max-pool of stride 2, then `num_blocks` residual blocks of two 3×3 convolutions."""

    features: int
    num_blocks: int

    @nn.compact
    def __call__(self, x):
        def conv(inputs):
            return nn.Conv(
                self.features,
                (3, 3),
                kernel_init=nn.initializers.xavier_uniform(),
                conv_general_dilated=lambda images, kernel, *_, **__: same_convolution(images, kernel),
            )(inputs)

        x = nn.max_pool(conv(x), (3, 3), strides=(2, 2), padding='SAME')
        for _ in range(self.num_blocks):
            x = x + conv(nn.relu(conv(nn.relu(x))))
        return x


class ImpalaEncoder(nn.Module):
    """x/255 → stacks → ReLU → flatten → Dense + GELU; output (…, output_dim)."""

    stack_features: Sequence[int] = (16, 32, 32)
    num_blocks: int = 2
    output_dim: int = 512

    @nn.compact
    def __call__(self, observations):
        x = observations.astype(jnp.float32) / 255.0
        for features in self.stack_features:
            x = ImpalaStack(features, self.num_blocks)(x)
        x = nn.relu(x).reshape(*x.shape[:-3], -1)
        return MLP((self.output_dim,))(x)


class ResNetBlock(nn.Module):
    """Two 3×3 convolutions with group norm and swish; the shortcut is projected where shapes differ."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        def conv(inputs, kernel, stride):
            return nn.Conv(
                self.features, (kernel, kernel), (stride, stride), use_bias=False, kernel_init=kernel_init()
            )(inputs)

        y = nn.swish(nn.GroupNorm(num_groups=4)(conv(x, 3, self.stride)))
        y = nn.GroupNorm(num_groups=4)(conv(y, 3, 1))
        if x.shape != y.shape:
            x = nn.GroupNorm(num_groups=4)(conv(x, 1, self.stride))
        return nn.swish(x + y)


class ResNetEncoder(nn.Module):
    """ResNet on x/127.5 − 1 with two coordinate channels; global average pool; output (…, 512)."""

    stage_sizes: Sequence[int] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, observations):
        x = observations.astype(jnp.float32) / 127.5 - 1.0
        height, width = x.shape[-3:-1]
        rows, columns = jnp.meshgrid(jnp.linspace(-1, 1, height), jnp.linspace(-1, 1, width), indexing='ij')
        coordinates = jnp.broadcast_to(jnp.stack([rows, columns], axis=-1), (*x.shape[:-1], 2))
        x = jnp.concatenate([x, coordinates], axis=-1)
        x = nn.Conv(64, (7, 7), (2, 2), use_bias=False, kernel_init=kernel_init())(x)
        x = nn.max_pool(nn.swish(nn.GroupNorm(num_groups=4)(x)), (3, 3), strides=(2, 2), padding='SAME')
        for stage, num_blocks in enumerate(self.stage_sizes):
            for block in range(num_blocks):
                x = ResNetBlock(64 * 2**stage, 2 if stage > 0 and block == 0 else 1)(x)
        return x.mean(axis=(-3, -2))


_ENCODERS = {
    'impala': lambda: ImpalaEncoder(),
    'impala_small': lambda: ImpalaEncoder(num_blocks=1),
    'impala_large': lambda: ImpalaEncoder(stack_features=(64, 128, 128), output_dim=1024),
    'impala_debug': lambda: ImpalaEncoder(stack_features=(4, 4), num_blocks=1),
    'resnet_34': lambda: ResNetEncoder(),
    'mlp': lambda: MLP((512, 512, 512, 512), layer_norm=True),
}


def make_encoder(name: str | None, mlp_hidden_dims: Sequence[int] | None = None) -> nn.Module | None:
    """A fresh encoder module by name, or None for None; raises UserError for an unknown name.

    `mlp_hidden_dims`: the widths of `mlp`, in place of its own; the image encoders' are part of their names.
    """
    if name is None:
        return None
    if name == 'mlp' and mlp_hidden_dims is not None:
        return MLP(mlp_hidden_dims, layer_norm=True)
    if name not in _ENCODERS:
        raise UserError(
            f'unknown encoder {name!r}: expected one of {", ".join(_ENCODERS)}, or none for state observations'
        )
    return _ENCODERS[name]()
