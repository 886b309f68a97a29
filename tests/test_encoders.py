"""Output shapes, scaling and structure of every named image encoder."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import infom_reference as reference
from tests import tiny
from utils.encoders import ImpalaEncoder, ResNetEncoder, make_encoder, same_convolution
from utils.errors import UserError

KEY = jax.random.key(0)
OUTPUT_DIMS = {
    'impala': 512,
    'impala_small': 512,
    'impala_large': 1024,
    'impala_debug': 512,
    'resnet_34': 512,
    'mlp': 512,
}
NUM_CONVOLUTIONS = {
    'impala': 3 * (1 + 2 * 2),
    'impala_small': 3 * (1 + 2 * 1),
    'impala_large': 3 * (1 + 2 * 2),
    'impala_debug': 2 * (1 + 2 * 1),
    # The first, two a block, and the projections where stages 2 to 4 begin.
    'resnet_34': 1 + 2 * (3 + 4 + 6 + 3) + 3,
}


def abstract_params(encoder, observations):
    return jax.eval_shape(encoder.init, KEY, observations)['params']


def kernels(params):
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == 'kernel']


@pytest.mark.parametrize('name', list(OUTPUT_DIMS))
@pytest.mark.parametrize('frames', [1, 3])
def test_output_shape(name, frames):
    encoder = make_encoder(name)
    observations = jnp.zeros((2, 28)) if name == 'mlp' else jnp.zeros((2, 64, 64, 3 * frames), jnp.uint8)
    output, _ = jax.eval_shape(encoder.init_with_output, KEY, observations)
    assert output.shape == (2, OUTPUT_DIMS[name])
    assert output.dtype == jnp.float32


@pytest.mark.parametrize('name', list(NUM_CONVOLUTIONS))
def test_number_of_convolutions(name):
    params = abstract_params(make_encoder(name), jnp.zeros((1, 64, 64, 3), jnp.uint8))
    assert sum(kernel.ndim == 4 for kernel in kernels(params)) == NUM_CONVOLUTIONS[name]


def test_impala_widths_and_pooling():
    params = abstract_params(make_encoder('impala_large'), jnp.zeros((1, 64, 64, 9), jnp.uint8))
    first = [params[f'ImpalaStack_{i}']['Conv_0']['kernel'].shape for i in range(3)]
    assert first == [(3, 3, 9, 64), (3, 3, 64, 128), (3, 3, 128, 128)]
    # 64 → 32 → 16 → 8 pixels by pooling alone.
    dense = [kernel.shape for kernel in kernels(params) if kernel.ndim == 2]
    assert dense == [(8 * 8 * 128, 1024)]


def test_only_group_norm_in_resnet_and_no_norm_in_impala():
    images = jnp.zeros((1, 32, 32, 3), jnp.uint8)
    assert 'Norm' not in str(jax.tree.structure(abstract_params(make_encoder('impala'), images)))
    resnet = str(jax.tree.structure(abstract_params(make_encoder('resnet_34'), images)))
    assert 'GroupNorm' in resnet and 'BatchNorm' not in resnet and 'LayerNorm' not in resnet


def test_impala_sees_pixels_from_0_to_1():
    """Without a stack, against the last layer by hand."""
    images = jax.random.randint(KEY, (2, 4, 4, 3), 0, 256).astype(jnp.uint8)
    encoder = ImpalaEncoder((), 1, 8)
    params = encoder.init(KEY, images)['params']
    (kernel,) = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    expected = jax.nn.gelu(images.reshape(2, -1) / 255 @ kernel)
    np.testing.assert_allclose(encoder.apply({'params': params}, images), expected, rtol=1e-4, atol=1e-6)


def test_impala_is_what_its_layers_say():
    """Two stacks of one block, off their initial values, in float64 NumPy."""
    images = jax.random.randint(KEY, (2, 8, 8, 3), 0, 256).astype(jnp.uint8)
    encoder = ImpalaEncoder((2, 3), 1, 4)
    params = tiny.perturb(encoder.init(KEY, images)['params'], seed=1, scale=0.5)

    def convolved(layer, x):
        padded, size = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), x.shape[1]
        shifted = (padded[:, i : i + size, j : j + size] @ layer['kernel'][i, j] for i, j in np.ndindex(3, 3))
        return sum(shifted) + layer['bias']

    def pooled(x):  # Of an even size: the third row of the last window is beyond the edge.
        padded, size = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=-np.inf), x.shape[1]
        return np.max([padded[:, i : i + size : 2, j : j + size : 2] for i, j in np.ndindex(3, 3)], axis=0)

    def relu(x):
        return np.maximum(x, 0)

    layers, x = reference.float64(params), np.float64(images) / 255
    for stack in (layers['ImpalaStack_0'], layers['ImpalaStack_1']):
        x = pooled(convolved(stack['Conv_0'], x))
        x = x + convolved(stack['Conv_2'], relu(convolved(stack['Conv_1'], relu(x))))
    assert (x < 0).any()
    expected = reference.gelu(reference.dense(layers['MLP_0']['Dense_0'], relu(x).reshape(2, -1)))
    np.testing.assert_allclose(encoder.apply({'params': params}, images), expected, rtol=1e-4, atol=1e-5)


def test_resnet_sees_pixels_from_minus_1_to_1_and_where_they_are():
    images = jax.random.randint(KEY, (2, 8, 8, 3), 0, 256).astype(jnp.uint8)
    encoder = ResNetEncoder((1,))
    params = encoder.init(KEY, images)['params']
    _, state = encoder.apply(
        {'params': params}, images, capture_intermediates=lambda module, _: module.name == 'Conv_0'
    )
    (found,) = state['intermediates']['Conv_0']['__call__']
    places = np.stack(np.meshgrid(np.linspace(-1, 1, 8), np.linspace(-1, 1, 8), indexing='ij'), axis=-1)
    seen = np.concatenate([np.asarray(images) / 127.5 - 1, np.broadcast_to(places, (2, 8, 8, 2))], axis=-1)
    kernel = params['Conv_0']['kernel']
    layout = ('NHWC', 'HWIO', 'NHWC')
    expected = jax.lax.conv_general_dilated(jnp.float32(seen), kernel, (2, 2), 'SAME', dimension_numbers=layout)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_impala_takes_pixels_of_any_type():
    encoder = make_encoder('impala_debug')
    images = jax.random.randint(KEY, (2, 16, 16, 3), 0, 256).astype(jnp.uint8)
    params = encoder.init(KEY, images)['params']
    apply = jax.jit(encoder.apply)
    features = apply({'params': params}, images)
    np.testing.assert_allclose(apply({'params': params}, images.astype(jnp.float32)), features, rtol=1e-6)
    # Biases start at zero, so without the last GELU features are homogeneous in the pixels.
    zero = apply({'params': params}, jnp.zeros_like(images))
    assert not zero.any()
    assert features.shape == (2, 512) and jnp.isfinite(features).all() and features.std() > 1e-3


def test_impala_is_shift_sensitive_and_per_image():
    encoder = ImpalaEncoder((4,), 1, 32)
    images = jax.random.randint(KEY, (3, 16, 16, 3), 0, 256).astype(jnp.uint8)
    params = encoder.init(KEY, images)['params']
    apply = jax.jit(encoder.apply)
    together = apply({'params': params}, images)
    alone = jnp.stack([apply({'params': params}, image[None])[0] for image in images])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert not np.allclose(together, apply({'params': params}, jnp.roll(images, 3, axis=2)), atol=1e-3)


def test_resnet_has_two_coordinate_channels():
    encoder = ResNetEncoder(stage_sizes=(1,))
    images = jax.random.randint(KEY, (1, 16, 16, 3), 0, 256).astype(jnp.uint8)
    params = encoder.init(KEY, images)['params']
    assert params['Conv_0']['kernel'].shape == (7, 7, 3 + 2, 64)
    features = encoder.apply({'params': params}, images)
    assert features.shape == (1, 64) and jnp.isfinite(features).all()


def test_convolutions_are_glorot_uniform():
    params = ImpalaEncoder((32, 32), 1, 16).init(KEY, jnp.zeros((1, 8, 8, 3), jnp.uint8))['params']
    kernel = params['ImpalaStack_1']['Conv_1']['kernel']
    bound = np.sqrt(6 / (9 * 32 + 9 * 32))
    assert 0.98 * bound < jnp.abs(kernel).max() <= bound


def test_names():
    assert make_encoder(None) is None
    with pytest.raises(UserError, match=r'impala_tiny.*impala_small'):
        make_encoder('impala_tiny')


@pytest.mark.parametrize('size', [3, 5])
@pytest.mark.parametrize('seeds', [1, 2])
def test_gradients_of_the_convolution(size, seeds):
    """Against those that JAX derives, alone and over seeds, on images that are not square."""

    def value(convolution, images, kernel):
        return jnp.sin(convolution(images, kernel)).sum()

    def plain(images, kernel):
        return jax.lax.conv_general_dilated(images, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    images = jax.random.normal(KEY, (seeds, 2, 9, 6, 4))
    kernel = jax.random.normal(jax.random.key(1), (seeds, size, size, 4, 3))
    with jax.default_matmul_precision('highest'):
        np.testing.assert_allclose(same_convolution(images[0], kernel[0]), plain(images[0], kernel[0]), atol=1e-5)
        ours = jax.vmap(jax.grad(functools.partial(value, same_convolution), (0, 1)))(images, kernel)
        expected = jax.vmap(jax.grad(functools.partial(value, plain), (0, 1)))(images, kernel)
    for gradient, right in zip(ours, expected):
        np.testing.assert_allclose(gradient, right, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='a matter of the CPU backend')
@pytest.mark.parametrize('seeds', [1, 2])
def test_convolutions_of_a_training_loop_are_in_the_layout_of_fast_kernels(seeds):
    encoder = make_encoder('impala_debug')
    images = jnp.zeros((2, 64, 64, 3), jnp.uint8)
    params = jax.vmap(lambda key: encoder.init(key, images))(jax.random.split(KEY, seeds))

    def train(params):
        gradient = jax.vmap(jax.grad(lambda params: (encoder.apply(params, images) ** 2).sum()))

        def descend(params, _):
            return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient(params)), None

        return jax.lax.scan(descend, params, length=2)

    program = jax.jit(train).lower(params).compile().as_text()
    layouts = re.findall(r' convolution\(.*dim_labels=(\S+?),? ', program)
    assert ' while(' in program
    assert len(layouts) >= 3 * NUM_CONVOLUTIONS['impala_debug'] - 1  # The first needs no gradient for the images.
    assert set(layouts) == {'b01f_01io->b01f'}
