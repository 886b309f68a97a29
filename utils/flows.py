"""Integrating a flow's vector field from noise (t = 0) to data (t = 1). No parameters, no losses."""

import jax
import jax.numpy as jnp

# Samples that a CPU takes through a flow at once: a layer of 512 units then makes 1 MB, which stays in its cache.
CPU_BLOCK = 512


def euler_integrate(velocity, noise, num_steps: int, bounds=None):
    """Euler method with `num_steps` equal steps and left end points, from t = 0 to 1 (TD flows, arXiv 2503.09817).

    `velocity(x, t)` maps x (…, D) and a scalar time to (…, D). `bounds` = (lower, upper), each (D,), clips after every
    step.
    The loop is unrolled: it is short, and an accelerator runs straight-line code faster than a WHILE.
    """
    x = noise
    for step in range(num_steps):
        x = x + velocity(x, jnp.asarray(step / num_steps, x.dtype)) / num_steps
        if bounds is not None:
            x = jnp.clip(x, *bounds)
    return x


def clipping_bounds(minimum, maximum, margin: float = 1e-5):
    """Per-feature bounds [min + margin, max − margin] for flow samples; features that do not vary are left unbounded.

    A constant feature has no room between the margins, and a value that later data bring there must not be clipped to
    the constant.
    """
    varies = maximum - minimum > 2 * margin
    return jnp.where(varies, minimum + margin, -jnp.inf), jnp.where(varies, maximum - margin, jnp.inf)


def map_rows(function, *arrays, samples_per_row: int = 1):
    """`jax.vmap(function)(*arrays)` over rows that hold `samples_per_row` samples each, on CPUs in cache-sized blocks.

    For long computations on many samples for each row of a batch, such as their flows: a CPU takes blocks of about
    `CPU_BLOCK` samples through all of `function`, in two thirds of the time that it needs for all at once, when every
    layer's activations travel through memory. A block is two independent halves, so that one half's elementwise
    work fills the cores that the other's leaves idle. Accelerators take all rows at once.
    """

    def in_blocks(*arrays):
        half = len(arrays[0]) // 2
        halves = [[x[:half] for x in arrays], [x[half : 2 * half] for x in arrays]]
        block = max(1, min(half, CPU_BLOCK // samples_per_row // 2))
        outputs = jax.lax.map(lambda rows: [function(*row) for row in rows], halves, batch_size=block)
        last = [jax.vmap(function)(*(x[2 * half :] for x in arrays))] if len(arrays[0]) % 2 else []
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs, *last)

    return jax.lax.platform_dependent(*arrays, cpu=in_blocks, default=jax.vmap(function))
