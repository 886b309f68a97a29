"""Several processes that train one run together (`--distributed`), each with devices of its own.

Every process runs the same program on the same data. The first one alone writes files and steps environments. How the
arrays lie on the devices of all of them is `devices.py`'s business.
"""

import itertools

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from utils.errors import ProcessLost, UserError

# Seconds without a sign of life after which a process counts as lost. JAX then ends those that wait for it.
HEARTBEAT_TIMEOUT = 30
START_TIMEOUT = 300  # Seconds for all processes to appear.
PATIENCE = 24 * 3600  # Seconds that processes wait for one that evaluates or saves, as long as it is alive.

_meetings = itertools.count()


def join(coordinator_address: str | None, num_processes: int, process_id: int) -> None:
    """Joins the other processes of this run; before JAX is used in any other way.

    None, 0 and −1 leave the values to what SLURM, Open MPI or a TPU pod say.

    Raises:
        UserError: neither the arguments nor the environment tell, or the processes do not find each other.
    """
    jax.config.update('jax_enable_preemption_service', False)  # It would take SIGTERM, which `Experiment` handles.
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes=num_processes or None,
            process_id=process_id if process_id >= 0 else None,
            initialization_timeout=START_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except ValueError as error:
        raise UserError(
            f'--distributed: {error} Outside of SLURM, Open MPI and TPU pods give every process '
            '--coordinator_address=<host of process 0>:<port> --num_processes=<n> --process_id=<0 to n-1>'
        ) from error
    except RuntimeError as error:
        reason = str(error).strip().split('\n')[0]
        raise UserError(
            f'--distributed: the processes did not find each other at {coordinator_address}: {reason}'
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes files and evaluates."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Returns once every process has come to this call; collectives would give up on one that takes its time."""
    if jax.process_count() > 1:
        everyone = set(range(jax.process_count()))
        ocp.multihost.sync_global_processes(f'infom_{next(_meetings)}', timeout=PATIENCE, processes=everyone)


def agree(number: int) -> int:
    """The largest number that a process gives, on all of them; all must ask."""
    return number if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(number))))


def explain(error: BaseException | None, checkpoint) -> None:
    """Raises `ProcessLost` for the error that the loss of another process shows as; returns for any other.

    checkpoint: the last one that was written, or None.
    """
    ours = isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' not in str(error)
    if not ours or jax.process_count() == 1:
        return
    logging.error('process %d: %s', jax.process_index(), error, exc_info=error)  # It may be this device's own.
    start = 'nothing was saved yet' if checkpoint is None else f'the last checkpoint is {checkpoint}'
    raise ProcessLost(
        f'process {jax.process_index()} of {jax.process_count()} lost touch with the others and ends; {start}, from '
        f'which the same command resumes, with as many processes as there are then '
        f'({str(error).strip().splitlines()[0][:200]})'
    ) from error


class Nothing:
    """Stands for what only the first process has: a log, a writer. Takes every call, does nothing, returns None."""

    lines = 0

    def __getattr__(self, name):
        return lambda *_, **__: None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass
