"""A profile of a few warm chunks of training, for TensorBoard and Perfetto: `--profile`. docs/performance.md says how
to read it."""

from pathlib import Path

import jax
from absl import logging

WARM_UP_CHUNKS = 2  # The first ones move data and fill caches.


class Profile:
    """Records the device's and the host's work on the first warm chunks, until `updates` of them are done.

    Writes `<directory>/plugins/profile/<time>/`, with `perfetto_trace.json.gz` among its files. updates: 0 records
    nothing.
    """

    def __init__(self, directory: Path, updates: int):
        self._directory, self._updates = directory, updates
        self._chunks = self._recorded = 0
        self._recording = False

    def before_chunk(self, agents, n: int) -> None:
        """Begins or ends the recording where this is the place: before a chunk of `n` updates is dispatched."""
        if not self._updates:
            return
        if self._recording and self._recorded >= self._updates:
            jax.block_until_ready(agents)
            self.close()
        if self._chunks == WARM_UP_CHUNKS:
            jax.block_until_ready(agents)  # What was dispatched before is no part of the profile.
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Each call of a Python function would be an event, and slow.
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True, profiler_options=options)
            self._recording = True
        self._chunks += 1
        if self._recording:
            self._recorded += n

    def close(self) -> None:
        """Ends the recording, with the phase at the latest; warns where the phase was too short for one."""
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
            logging.info('a profile of %d updates is in %s', self._recorded, self._directory)
        elif self._updates and not self._recorded:
            logging.warning('no profile: one begins after %d chunks of a phase', WARM_UP_CHUNKS)
