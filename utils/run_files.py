"""What a run writes into its directory, and that only the first of its processes does.

The directory itself is `runs.py`'s business, checkpoints are `checkpoints.py`'s, the lines of metrics `run_log.py`'s.
"""

import contextlib

from absl import logging

from utils import checkpoints, processes, runs
from utils.wandb_sink import WandbSink


@contextlib.contextmanager
def opened(config):
    """(directory, `runs.MetricsLog`, `checkpoints.CheckpointWriter`) of the run, locked against other runs.

    The last two do nothing in all processes but the first, which has cleaned up when the others go on to read.
    """
    with contextlib.ExitStack() as resources:
        if processes.is_first():
            runs.make_run_directory(config.run_dir)
            lock = runs.lock_run_directory(config.run_dir)
            if lock is not None:
                resources.enter_context(lock)
            log = resources.enter_context(runs.MetricsLog(config.run_dir / 'metrics.jsonl'))
            writer = resources.enter_context(checkpoints.CheckpointWriter(config.run_dir / 'checkpoints'))
        else:
            log = writer = processes.Nothing()
        processes.wait_for_all()
        yield config.run_dir, log, writer


def open_wandb(directory, config):
    """The run's `WandbSink`; the caller finishes it."""
    if not processes.is_first():
        return processes.Nothing()
    return WandbSink(
        directory, config.wandb_mode, group=config.run_group, name=config.run_name, config=config.to_dict()
    )


def write_config(directory, config, **more):
    """`config.json`: the settings, `more`, and the machine."""
    if processes.is_first():
        runs.write_json(directory / 'config.json', {**config.to_dict(), **more, 'environment': runs.environment_info()})


def write_summary(directory):
    """`summary.json`; once it is there, every process may end."""
    if processes.is_first():
        runs.write_summary(directory)
        logging.info('done: %s', directory / 'summary.json')
    processes.wait_for_all()
