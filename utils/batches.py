"""Where the training loop's batches come from: the data set on the device, or batches drawn from it on the host.

Both draw with `training.draw`, so that a step's batch is the same wherever the data are. What is on disk, and what a
batch holds, is the business of `envs/` and `utils/datasets.py`.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from utils import devices, training
from utils.datasets import Dataset
from utils.intervals import largest_divisor

PREFETCHED_BYTES = 1 << 28  # Of the batches that a chunk takes; as much again waits for the next chunk.
DEVICE_SHARE = 0.6  # Data that would fill more of an accelerator's memory stay on the host.


def choose_location(dataset: Dataset, wanted: str) -> str:
    """'device' or 'host': what `wanted` says, or for 'auto' the device where the data leave it room to train."""
    if wanted != 'auto':
        return wanted
    statistics = jax.local_devices()[0].memory_stats() or {}  # None on a CPU.
    limit = statistics.get('bytes_limit')
    size = sum(array.nbytes for array in jax.tree.leaves(dataset))
    return 'host' if limit is not None and size > DEVICE_SHARE * limit else 'device'


class DeviceBatches:
    """The data set on the device; the compiled chunk draws from it by itself."""

    def __init__(self, dataset: Dataset, n: int, mesh=None):
        self.n, self._dataset = n, devices.place(dataset, mesh)

    def chunk(self, start: int):
        """What `train_chunk` takes its batches from for the updates after `start`."""
        del start
        return self._dataset

    def close(self):
        pass


class HostBatches:
    """The data set in the host's memory; a thread draws the batches of the next chunk while one is running.

    `n`: updates of a chunk, at most; fewer, and always whole blocks of `block`, where their batches would take more
    than `PREFETCHED_BYTES`. keys (S,): not yet placed on a mesh.
    """

    def __init__(self, dataset: Dataset, n: int, *, agents, keys, block: int):
        self._dataset, self._spec = on_host(dataset), training.batch_spec(agents)
        self._keys, self._mesh = on_host(keys), devices.mesh_of(agents)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix='batches')
        one = jax.eval_shape(lambda: self._draw(0, 1))
        bytes_of_update = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(one))
        self.n = largest_divisor(n, block, min(n, int(PREFETCHED_BYTES // bytes_of_update)))
        self._ready = {}  # {start: future}, one at most.

    def _draw(self, start, n):
        return training.draw_chunk(self._dataset, self._keys, jnp.int32(start), spec=self._spec, n=n)

    def _fetch(self, start):
        with jax.default_device(host_device()):
            drawn = self._draw(start, to_next_multiple(start, self.n))
        return jax.block_until_ready(devices.place(drawn, self._mesh, 'seed', None, 'batch'))

    def chunk(self, start: int):
        """The batches of the updates from `start` to the next multiple of `n`; those of the `n` after them are
        begun."""
        future = self._ready.pop(start, None) or self._thread.submit(self._fetch, start)
        batches = future.result()
        end = start + to_next_multiple(start, self.n)
        self._ready = {end: self._thread.submit(self._fetch, end)}
        return batches

    def close(self):
        self._thread.shutdown(cancel_futures=True)


def to_next_multiple(start: int, n: int) -> int:
    """Updates from `start` to the next multiple of `n`, where a chunk ends: `n` but after a start in between."""
    return n - start % n


def host_device():
    return jax.local_devices(backend='cpu')[0]


def on_host(tree):
    return jax.device_put(tree, host_device())
