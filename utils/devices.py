"""The devices of a run: a mesh with the axes seed and batch, and how the run's arrays are spread over it.

On one device there is no mesh (None): nothing is placed or constrained, and the compiled programs are those without
this file. Several processes, each with devices of its own, are `processes.py`'s business.
"""

import contextlib

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from utils.errors import UserError
from utils.intervals import largest_divisor

AXES = 'seed', 'batch'
BFLOAT16 = 'BF16_BF16_F32'  # As JAX names the algorithm.


def set_matmul_precision(precision: str, backend: str | None = None) -> None:
    """Sets the precision of matrix products: `highest`, `tensorfloat32` or `bfloat16`, as `--precision` has them.

    backend: what programs are compiled for, as `jax.default_backend` names it, which is the default.

    On an accelerator bfloat16 is asked for as an algorithm: JAX's level of that name means TensorFloat-32 on a GPU.
    Convolutions know levels only, and keep the device's default. A CPU computes in float32 at every level, and cannot
    do all products by that algorithm: what runs on the host beside an accelerator has `host_precision`.
    """
    on_cpu = (backend or jax.default_backend()) == 'cpu'
    algorithm = BFLOAT16 if precision == 'bfloat16' and not on_cpu else precision
    jax.config.update('jax_default_matmul_precision', algorithm)


def host_precision():
    """A context for computations on the host's processor, in this thread: float32, whatever the accelerator's is."""
    return jax.default_matmul_precision('highest')


def make_mesh(num_seeds: int, batch_size: int, mesh_seeds: int = 0, mesh_batch: int = 0) -> Mesh | None:
    """A mesh of mesh_seeds × mesh_batch devices, or None for one device.

    0 chooses: as many devices as divide the seeds evenly, and one for each batch. Batches are shared only on demand,
    for these networks do not make up for the messages, or where several processes leave no device out.

    Raises:
        UserError: numbers that do not divide, too few devices, or processes with a device left over.
    """
    devices = jax.devices()
    if jax.process_count() > 1 and not (mesh_seeds or mesh_batch):
        whole = [s for s in range(1, len(devices) + 1) if len(devices) % s == 0]
        fitting = [s for s in whole if num_seeds % s == 0 and batch_size % (len(devices) // s) == 0]
        mesh_seeds = max(fitting, default=0)
        mesh_batch = len(devices) // mesh_seeds if mesh_seeds else 0
    mesh_seeds = mesh_seeds or largest_divisor(num_seeds, 1, max(len(devices) // max(mesh_batch, 1), 1))
    if not mesh_batch:
        rest = max(len(devices) // mesh_seeds, 1)
        mesh_batch = largest_divisor(batch_size, 1, rest) if jax.process_count() > 1 else 1
    used = mesh_seeds * mesh_batch
    for flag, size, name, number in (
        ('mesh_seeds', mesh_seeds, 'num_seeds', num_seeds),
        ('mesh_batch', mesh_batch, 'agent.batch_size', batch_size),
    ):
        if number % size:
            raise UserError(f'--{flag}={size} does not divide --{name}={number}: use a divisor, or leave it out')
    if used > len(devices):
        raise UserError(
            f'--mesh_seeds={mesh_seeds} --mesh_batch={mesh_batch} takes {used} devices, there are {len(devices)}'
        )
    if jax.process_count() > 1 and used < len(devices):
        raise UserError(
            f'{num_seeds} seeds and batches of {batch_size} leave {len(devices) - used} of {len(devices)} devices '
            f'without work: choose --num_seeds and --agent.batch_size that these divide, or start fewer processes'
        )
    return None if used == 1 else Mesh(np.array(devices[:used]).reshape(mesh_seeds, mesh_batch), AXES)


def describe(mesh: Mesh | None) -> str:
    """One line for the log; says so where devices are idle."""
    used = 1 if mesh is None else mesh.size
    shape = 'one' if mesh is None else ' × '.join(f'{size} ({axis})' for axis, size in mesh.shape.items())
    idle = jax.device_count() - used
    return f'{shape} of {jax.default_backend()}' + (f'; {idle} idle (see --mesh_seeds, --mesh_batch)' if idle else '')


def mesh_of(tree) -> Mesh | None:
    """The mesh that `place` put a pytree on."""
    sharding = getattr(jax.tree.leaves(tree)[0], 'sharding', None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def place(tree, mesh: Mesh | None, *axes: str | None):
    """The arrays of a pytree on the mesh, their first axes spread over `axes`; on the first device without one.

    Every process gives the whole arrays.
    """
    if mesh is None:
        # Named, for what is on the host's processor would stay there, and an accelerator's work would follow it.
        return jax.device_put(tree, jax.local_devices()[0])
    sharding = NamedSharding(mesh, P(*axes))

    def spread(x):
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(spread(jax.random.key_data(x)))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(spread, tree)


def fetch(x) -> np.ndarray:
    """A copy of an array in the host's memory, whichever processes hold it; all of them must ask."""
    # np.array, not np.asarray: on a CPU that may be a view of the device's buffer.
    return multihost_utils.process_allgather(x, tiled=True) if _is_elsewhere(x) else np.array(x)


def gather(tree):
    """The pytree with what other processes hold as NumPy arrays; all of them must ask."""
    return jax.tree.map(lambda x: fetch(x) if _is_elsewhere(x) else x, tree)


def _is_elsewhere(x) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated


# --------------------------------------------------------------------------------------------- while tracing programs


def tracing(mesh: Mesh | None):
    """A context in which programs are traced for the mesh: `spread` and `seed_axis` are about this one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def spread(tree, *axes: str | None):
    """Has the arrays' first axes spread over `axes`; the identity where programs are traced for one device."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P(*axes)), tree)


def seed_axis() -> str | None:
    """What `jax.vmap` over seeds takes as `spmd_axis_name`."""
    return None if jax.sharding.get_abstract_mesh().empty else 'seed'
