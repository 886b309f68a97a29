"""Shapes, initial ranges and clipping of the modules in `utils/networks.py`; what they compute is compared with NumPy
in `test_infom_losses.py`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from utils import devices, networks
from utils.encoders import make_encoder
from utils.networks import (
    MLP,
    ContrastiveCritic,
    GaussianActor,
    IntentionEncoder,
    LayerNorm,
    ScalarHead,
    gaussian_log_prob,
)

KEY = jax.random.key(0)


def leaves_named(params, name):
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == name]


def glorot_bound(kernel, scale=1.0):
    fan_in, fan_out = kernel.shape[-2:]
    return np.sqrt(6 * scale / (fan_in + fan_out))


def test_mlp_applies_gelu_then_norm_and_ends_in_a_plain_dense():
    mlp = MLP((16, 8), 3, layer_norm=True)
    x = jax.random.normal(KEY, (5, 4))
    params = mlp.init(KEY, x)['params']
    assert sorted(params) == ['Dense_0', 'Dense_1', 'Dense_2', 'LayerNorm_0', 'LayerNorm_1']
    assert mlp.apply({'params': params}, x).shape == (5, 3)
    features = MLP((16, 8), layer_norm=True).apply({'params': {k: v for k, v in params.items() if k != 'Dense_2'}}, x)
    # The norm comes last: hidden features have mean 0 and variance 1 over the layer.
    np.testing.assert_allclose(features.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(features.var(-1), 1, atol=1e-3)


def test_layer_norm_and_its_gradients_are_flax_s():
    """Parameters of the one are the other's; off-centre inputs, so that mean and variance both matter."""
    x = 3 * jax.random.normal(KEY, (2, 5, 16)) + jnp.linspace(-2, 4, 16)
    weights = jnp.sin(jnp.arange(x.size)).reshape(x.shape)
    params = {'scale': jnp.linspace(0.5, 2, 16), 'bias': jnp.linspace(-1, 1, 16)}
    theirs = nn.LayerNorm(epsilon=networks.LAYER_NORM_EPSILON)
    assert jax.tree.map(jnp.shape, theirs.init(KEY, x)) == jax.tree.map(jnp.shape, LayerNorm().init(KEY, x))

    def value_and_gradients(module):
        return jax.value_and_grad(lambda p, x: (module.apply({'params': p}, x) * weights).sum(), (0, 1))(params, x)

    (value, gradients), (expected, expected_gradients) = value_and_gradients(LayerNorm()), value_and_gradients(theirs)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-5), gradients, expected_gradients)


def test_rounded_parameters_are_those_that_products_read():
    """Biases and scales stay, and so does everything at any precision but bfloat16."""
    params = MLP((16, 8), 3, layer_norm=True).init(KEY, jnp.ones((1, 4)))['params']
    with jax.default_matmul_precision(devices.BFLOAT16):
        kept = networks.rounded(params)
        with devices.host_precision():
            assert networks.rounded(params) is params
    assert networks.rounded(params) is params
    types = {path[-1].key: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(kept)}
    assert types == {'kernel': jnp.bfloat16, 'bias': jnp.float32, 'scale': jnp.float32}


def test_products_with_a_rounded_kernel_round_the_other_side_and_add_up_in_float32():
    mlp = MLP((64,), 3, layer_norm=True)
    x = jax.random.normal(KEY, (5, 512))
    params = mlp.init(KEY, x)['params']
    with jax.default_matmul_precision(devices.BFLOAT16):
        kept = networks.rounded(params)
    output = mlp.apply({'params': kept}, x)

    def product(x, layer):  # In float64, of values with bfloat16's seven bits of mantissa.
        x, kernel = (np.asarray(jnp.asarray(v, jnp.bfloat16), np.float64) for v in (x, params[layer]['kernel']))
        return x @ kernel + np.asarray(params[layer]['bias'], np.float64)

    hidden = LayerNorm().apply({'params': params['LayerNorm_0']}, nn.gelu(jnp.float32(product(x, 'Dense_0'))))
    assert output.dtype == jnp.float32
    np.testing.assert_allclose(output, product(hidden, 'Dense_1'), atol=2e-3)  # A hidden value may round the other way.
    # In float32 it is another number.
    assert np.abs(output - mlp.apply({'params': params}, x)).max() > 5e-3


@pytest.mark.parametrize('avx512', [False, True])
def test_gradients_of_a_product_are_the_same_on_every_processor(avx512, monkeypatch):
    monkeypatch.setattr(networks, 'has_avx512', lambda: avx512)
    x, kernel = jax.random.normal(KEY, (2, 5, 4)), jax.random.normal(jax.random.key(1), (4, 3))

    def gradients(product):
        return jax.grad(lambda x, kernel: jnp.sin(product(x, kernel)).sum(), (0, 1))(x, kernel)

    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6),
        gradients(networks.matmul),
        gradients(jnp.matmul),
    )


def test_kernels_are_glorot_uniform_and_biases_zero():
    params = MLP((256, 128), 64).init(KEY, jnp.zeros((1, 32)))['params']
    for kernel in leaves_named(params, 'kernel'):
        bound = glorot_bound(kernel)
        assert 0.98 * bound < jnp.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.05)
    assert not any(bias.any() for bias in leaves_named(params, 'bias'))


def test_ensemble_members_differ_and_do_not_mix():
    critic = ScalarHead((32, 32), num_ensembles=2)
    s, a = jax.random.normal(KEY, (6, 4)), jnp.zeros((6, 2))
    params = critic.init(KEY, s, a)['params']
    values = critic.apply({'params': params}, s, a)
    assert values.shape == (2, 6)
    assert jnp.abs(values[0] - values[1]).min() > 1e-4
    for kernel in leaves_named(params, 'kernel'):
        assert not jnp.allclose(kernel[0], kernel[1])
        # Fans are those of one member, not of the stack.
        assert 0.8 * glorot_bound(kernel) < jnp.abs(kernel).max() <= glorot_bound(kernel)
    only_second = jax.tree.map(lambda p: p.at[0].set(0.0), params)
    np.testing.assert_array_equal(critic.apply({'params': only_second}, s, a)[1], values[1])


def test_single_head_drops_the_last_axis_only():
    head = ScalarHead((8,))
    x = jax.random.normal(KEY, (6, 3, 4))
    params = head.init(KEY, x[:, 0])['params']
    values = head.apply({'params': params}, x)
    assert values.shape == (6, 3)
    np.testing.assert_allclose(values[:, 1], head.apply({'params': params}, x[:, 1]), rtol=1e-5, atol=1e-6)


def test_actor_starts_near_zero():
    actor = GaussianActor(5, (64, 64))
    s = jax.random.normal(KEY, (7, 10))
    params = actor.init(KEY, s)['params']
    means, stds = actor.apply({'params': params}, s)
    assert means.shape == stds.shape == (7, 5)
    assert jnp.all(stds == 1)
    assert 'log_std' not in params
    kernel = params['mean']['kernel']
    bound = glorot_bound(kernel, scale=0.01)
    assert 0.9 * bound < jnp.abs(kernel).max() <= bound
    assert not any('LayerNorm' in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))


@pytest.mark.parametrize(('log_std', 'expected'), [(-9.0, -5.0), (0.5, 0.5), (7.0, 2.0)])
def test_learned_actor_std_is_clipped_and_state_independent(log_std, expected):
    actor = GaussianActor(3, (8,), const_std=False)
    s = jax.random.normal(KEY, (4, 2))
    params = actor.init(KEY, s)['params']
    assert params['log_std'].shape == (3,) and not params['log_std'].any()
    _, stds = actor.apply({'params': {**params, 'log_std': jnp.full(3, log_std)}}, s)
    np.testing.assert_allclose(stds, np.full((4, 3), np.exp(expected)), rtol=1e-5)


def test_intention_encoder_clips_log_std():
    encoder = IntentionEncoder(6, (16,))
    s, a = jax.random.normal(KEY, (50, 3)), jax.random.normal(KEY, (50, 2))
    params = encoder.init(KEY, s, a)['params']
    means, log_stds = encoder.apply({'params': params}, s, a)
    assert means.shape == log_stds.shape == (50, 6)
    params['log_std']['kernel'] = params['log_std']['kernel'] * 1e4
    _, log_stds = encoder.apply({'params': params}, s, a)
    assert log_stds.min() == -10 and log_stds.max() == 2


def test_gaussian_log_prob_sums_over_dimensions():
    rng = np.random.default_rng(0)
    x, means, stds = rng.normal(size=(3, 4)), rng.normal(size=(3, 4)), rng.uniform(0.5, 2, (3, 4))
    expected = scipy.stats.norm(means, stds).logpdf(x).sum(-1)
    np.testing.assert_allclose(gaussian_log_prob(means, stds, x), expected, rtol=1e-5)


def test_states_and_goals_of_a_contrastive_critic_have_encoders_of_their_own():
    critic = ContrastiveCritic(4, (8,), encoder=make_encoder('impala_debug'), goal_encoder=make_encoder('impala_debug'))
    images = jnp.zeros((1, 8, 8, 3), jnp.uint8)
    params = jax.eval_shape(critic.init, KEY, images, jnp.zeros((1, 2)), images)['params']
    assert params.keys() == {'encoder', 'goal_encoder', 'state_action_head', 'goal_head'}
