"""The hoisted vector field equals the plain concatenated MLP; Euler integration and its clipping against fields with
known solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import perturb
from utils import flows
from utils.flows import clipping_bounds, euler_integrate, map_rows
from utils.networks import MLP, VectorField

STATE_DIM, ACTION_DIM, LATENT_DIM, BATCH_SIZE, SAMPLES = 7, 3, 6, 12, 4
HIDDEN_DIMS = (64, 48, 32)


def make_field(layer_norm):
    """A field with all parameters off their initial values, its conditions, and the parameters of the plain MLP of the
    same function."""
    field = VectorField(STATE_DIM, STATE_DIM + ACTION_DIM + LATENT_DIM, HIDDEN_DIMS, layer_norm)
    widths = (STATE_DIM, ACTION_DIM, LATENT_DIM)
    keys = jax.random.split(jax.random.key(1), len(widths))
    conditions = [jax.random.normal(key, (BATCH_SIZE, width)) for key, width in zip(keys, widths, strict=True)]
    params = field.init(jax.random.key(0), conditions[0], jnp.zeros(()), *conditions, method='init_all')['params']
    params = perturb(params, seed=5, scale=0.1)
    # The plain MLP's layers are numbered from 0; the field's `rest` from its second layer.
    plain = {'Dense_0': {'kernel': params['first_kernel'], 'bias': params['first_bias']}}
    if layer_norm:
        plain['LayerNorm_0'] = params['first_norm']
    for name, layer in params['rest'].items():
        kind, index = name.split('_')
        plain[f'{kind}_{int(index) + 1}'] = layer
    return field, params, conditions, plain


@pytest.mark.parametrize('layer_norm', [True, False])
def test_hoisted_field_is_the_plain_mlp(layer_norm):
    field, params, conditions, plain = make_field(layer_norm)
    x = jax.random.normal(jax.random.key(2), (BATCH_SIZE, STATE_DIM))
    times = jax.random.uniform(jax.random.key(3), (BATCH_SIZE, 1))
    condition = field.apply({'params': params}, *conditions, method='condition')
    hoisted = field.apply({'params': params}, x, times, condition)
    mlp = MLP(HIDDEN_DIMS, STATE_DIM, layer_norm)
    expected = mlp.apply({'params': plain}, jnp.concatenate([x, times, *conditions], axis=-1))
    assert hoisted.shape == (BATCH_SIZE, STATE_DIM)
    assert jnp.abs(hoisted - expected).max() < 1e-5


def test_one_condition_serves_all_samples_and_scalar_times():
    field, params, conditions, plain = make_field(layer_norm=True)
    x = jax.random.normal(jax.random.key(2), (BATCH_SIZE, SAMPLES, STATE_DIM))
    condition = field.apply({'params': params}, *conditions, method='condition')
    hoisted = field.apply({'params': params}, x, 0.3, condition[:, None])
    times = jnp.full((BATCH_SIZE, 1), 0.3)
    for k in range(SAMPLES):
        inputs = jnp.concatenate([x[:, k], times, *conditions], axis=-1)
        expected = MLP(HIDDEN_DIMS, STATE_DIM, True).apply({'params': plain}, inputs)
        assert jnp.abs(hoisted[:, k] - expected).max() < 1e-5


def test_first_kernel_starts_as_a_dense_layer_would():
    """Glorot uniform over the whole concatenated input: splitting the layer must not change its fan-in."""
    field = VectorField(STATE_DIM, STATE_DIM + ACTION_DIM + LATENT_DIM, (256, 32))
    inputs = [jnp.zeros((1, width)) for width in (STATE_DIM, STATE_DIM, ACTION_DIM, LATENT_DIM)]
    x, *conditions = inputs
    params = field.init(jax.random.key(0), x, jnp.zeros(()), *conditions, method='init_all')['params']
    fan_in = 2 * STATE_DIM + 1 + ACTION_DIM + LATENT_DIM
    bound = np.sqrt(6 / (fan_in + 256))
    assert params['first_kernel'].shape == (fan_in, 256)
    assert 0.98 * bound < jnp.abs(params['first_kernel']).max() <= bound
    assert not params['first_bias'].any()


def test_euler_uses_left_end_points_and_equal_steps():
    """dx/dt = 2t from 0: the sum over left end points is Σ 2(k/n)/n = 1 − 1/n, while the exact solution is 1."""
    for steps in (1, 5, 10):
        result = euler_integrate(lambda x, t: jnp.full_like(x, 2 * t), jnp.zeros((3, 2)), steps)
        np.testing.assert_allclose(result, 1 - 1 / steps, rtol=1e-6)


def test_euler_on_linear_growth():
    """dx/dt = x: (1 + 1/n)^n."""
    x = jnp.asarray([[1.0, -2.0]])
    np.testing.assert_allclose(euler_integrate(lambda x, t: x, x, 10), x * 1.1**10, rtol=1e-6)


def test_euler_transports_noise_to_a_point():
    """The exact field towards one point, (g − x)/(1 − t), ends in g after any number of steps."""
    goal = jnp.asarray([0.5, -3.0])
    noise = jax.random.normal(jax.random.key(0), (100, 2))
    result = euler_integrate(lambda x, t: (goal - x) / (1 - t), noise, 10)
    np.testing.assert_allclose(result, jnp.broadcast_to(goal, result.shape), atol=1e-5)


def test_euler_clips_after_every_step():
    """A field that leaves the box and turns back inside: clipping after each step differs from clipping the end."""
    bounds = (jnp.asarray([-1.0]), jnp.asarray([1.0]))

    def velocity(x, t):
        return jnp.where(t < 0.5, 10.0, -2.0) * jnp.ones_like(x)

    result = euler_integrate(velocity, jnp.zeros((1, 1)), 10, bounds)
    np.testing.assert_allclose(result, [[0.0]], atol=1e-5)  # 1 after the first half, then −1.
    free = euler_integrate(velocity, jnp.zeros((1, 1)), 10)
    np.testing.assert_allclose(jnp.clip(free, *bounds), [[1.0]])


def test_clipping_bounds_leave_constant_features_alone():
    minimum = jnp.asarray([-2.0, 0.5, 0.0, 0.0])
    maximum = jnp.asarray([3.0, 0.5, 1e-6, 1e-3])
    lower, upper = clipping_bounds(minimum, maximum)
    np.testing.assert_allclose(lower, [-2 + 1e-5, -np.inf, -np.inf, 1e-5], rtol=1e-6)
    np.testing.assert_allclose(upper, [3 - 1e-5, np.inf, np.inf, 1e-3 - 1e-5], rtol=1e-6)
    x = jnp.asarray([[10.0, 10.0, 10.0, 10.0], [-10.0, -10.0, -10.0, -10.0]])
    clipped = euler_integrate(lambda x, t: jnp.zeros_like(x), x, 1, (lower, upper))
    assert jnp.array_equal(clipped[:, 1:3], x[:, 1:3])
    assert jnp.all(clipped[:, 0] < 3) and jnp.all(clipped[:, 0] > -2)


@pytest.mark.parametrize('rows, samples_per_row', [(13, 3), (13, 5), (12, 1), (13, 40), (1, 3)])
def test_mapping_rows_in_blocks_is_mapping_them_at_once(rows, samples_per_row, monkeypatch):
    """In blocks that do not divide the rows, all in one block, one row at a time where a row fills a block by itself,
    and a row that has no halves."""
    monkeypatch.setattr(flows, 'CPU_BLOCK', 20)
    noise = jax.random.normal(jax.random.key(0), (rows, samples_per_row, 4))
    condition = jax.random.normal(jax.random.key(1), (rows, 4))

    def function(noise, condition):
        return jnp.tanh(noise * condition).sum(axis=-1)

    def mapped(noise, condition):
        return map_rows(function, noise, condition, samples_per_row=samples_per_row)

    expected = jax.vmap(function)(noise, condition)
    np.testing.assert_allclose(jax.jit(mapped)(noise, condition), expected, rtol=1e-5, atol=1e-6)
    two_seeds = jax.jit(jax.vmap(mapped))(jnp.stack([noise, -noise]), jnp.stack([condition, condition]))
    np.testing.assert_allclose(two_seeds, jnp.stack([expected, -expected]), rtol=1e-5, atol=1e-6)
