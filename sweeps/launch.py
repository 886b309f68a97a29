"""Runs a sweep file without wandb.

    python -m sweeps.launch sweeps/infom_ogbench.yaml --backend=print
    python -m sweeps.launch sweeps/infom_ogbench.yaml --jobs=4 --gpus=0,1 --set=preset=small --set=num_seeds=3
    python -m sweeps.launch sweeps/reproduction.yaml --backend=slurm --slurm=slurm_partition=gpu --slurm=gpus_per_node=1

The same command again skips what is finished and resumes what is not. Exit code 1 if a run failed; the last line says
which and why.
"""

import re
import shlex
import signal
from pathlib import Path

from absl import flags

from sweeps import local, slurm
from sweeps.sweep_files import Run, expand, parse_flags
from utils import cli
from utils.errors import UserError, expanded

FLAGS = flags.FLAGS


def main(argv):
    path = Path(argv[1])
    overrides = parse_flags(FLAGS.set)
    overrides |= {name: FLAGS[name].value for name in ('save_dir', 'dataset_dir') if FLAGS[name].value is not None}
    try:
        only = re.compile(FLAGS.only)
    except re.error as error:
        raise UserError(f'--only={FLAGS.only} is no regular expression: {error}') from error
    runs = [run for run in expand(path, overrides) if only.search(run.flags['run_name'])]
    if not runs:
        raise UserError(f'--only={FLAGS.only} matches no run of {path}: --backend=print lists them')
    if FLAGS.backend == 'print':
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends a list without a traceback.
        for run in runs:
            print(shlex.join(run.command('python')))
        return None
    require_program(runs)
    if FLAGS.backend == 'slurm':
        return launch_on_slurm(runs)
    outcome = local.launch(runs, FLAGS.jobs, FLAGS.gpus)
    if outcome.interrupted:
        print('interrupted: the same command resumes', flush=True)
    print(outcome.summary(), flush=True)
    return cli.INTERRUPTED_CODE if outcome.interrupted else int(bool(outcome.failed))


def require_program(runs: list[Run]) -> None:
    """Raises `UserError` where the program to run is not in the current folder."""
    if not Path(runs[0].program).is_file():
        raise UserError(f'there is no {runs[0].program} here: start in the folder of the project')


def launch_on_slurm(runs: list[Run]) -> int:
    """Submits what is not finished. Returns the exit code: 1 if a run is in the way of another of its name."""
    done, waiting, failed = local.sort_by_status(runs)
    for label, reason in failed.items():
        print(f'failed: {label}: {reason}')
    if not waiting:
        print(f'{len(done)} of {len(runs)} runs are finished, nothing to submit')
        return int(bool(failed))
    folder = expanded(waiting[0].flags['save_dir']) / '.submitit' / '%j'
    submitted = slurm.submit(waiting, folder, FLAGS.jobs, parse_flags(FLAGS.slurm))
    for run, job in zip(waiting, submitted, strict=True):
        print(f'{job.job_id}  {run.label}')
    print(f'{len(submitted)} submitted, {len(done)} finished before; logs: launch.log in each run')
    return int(bool(failed))


if __name__ == '__main__':
    flags.DEFINE_enum('backend', 'local', ['local', 'slurm', 'print'], 'Where the runs go; print: only show them.')
    flags.DEFINE_integer('jobs', 1, 'Runs at a time.', lower_bound=1)
    flags.DEFINE_list('gpus', [], 'Devices that local jobs take in turn, as CUDA_VISIBLE_DEVICES names them.')
    flags.DEFINE_string('save_dir', None, 'For all runs, as main.py has it.')
    flags.DEFINE_string('dataset_dir', None, 'For all runs, as main.py has it.')
    flags.DEFINE_multi_string('set', [], 'A flag of main.py for all runs, name=value, in place of the sweep file’s.')
    flags.DEFINE_string('only', '', 'Only the runs whose name this regular expression finds.')
    flags.DEFINE_multi_string('slurm', [], 'A parameter of submitit, name=value, as in timeout_min=600.')
    cli.run(main, positional=('sweep file',))
