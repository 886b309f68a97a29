"""How much arithmetic an update is, and how much of it a device does in a second: the two halves of a share of peak."""

import math
import time

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval

RATE_ROWS, RATE_WIDTH, RATE_PRODUCTS = 256, 512, 40  # The products of paper-size networks.


def matmul_flops(function, *arguments) -> float:
    """Floating-point operations, 2 for a multiply-add, of matrix products and convolutions in `function(*arguments)`.

    Counted in the traced program, loops as often as they run; of a choice between branches (by platform, say) the one
    with the most, and nothing for what no output depends on. XLA's own count takes the body of a loop once.
    Elementwise work is left out: it is what a share of the device's matmul rate is meant to show.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _jaxpr_flops(live)


def _jaxpr_flops(jaxpr) -> float:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == 'conv_general_dilated':
        kernel, layout = equation.invars[1].aval.shape, params['dimension_numbers'].rhs_spec
        per_output = math.prod(kernel) / kernel[layout[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output
    inner = [_jaxpr_flops(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == 'cond':
        return max(inner)
    return sum(inner) * (params['length'] if name == 'scan' else 1)


def _inner_jaxprs(params):
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def measure_matmul_rate(repeats: int = 9) -> float:
    """Matrix products' floating-point operations per second of the default device, at the shapes of a paper-size layer
    and at the precision that is set; the best of `repeats` runs."""
    kernel = jnp.eye(RATE_WIDTH) + 1e-3

    @jax.jit
    def products(x):
        return jax.lax.scan(lambda x, _: (x @ kernel, None), x, None, length=RATE_PRODUCTS)[0]

    x = jax.random.normal(jax.random.key(0), (RATE_ROWS, RATE_WIDTH))
    jax.block_until_ready(products(x))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(products(x))
        seconds.append(time.perf_counter() - began)
    return matmul_flops(products, x) / min(seconds)
