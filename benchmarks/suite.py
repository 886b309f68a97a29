"""Throughput of several agents, sizes and seeds: one process each, one table for all.

    python -m benchmarks.suite [--only=iql,visual] [--jobs=8] [--output=results/throughput]

Runs `benchmarks.throughput` for every entry of the device's kind, one after the other, so that each has the machine and
its memory to itself; with `--jobs` so many share the memory and are compiled side by side, which is most of the time on
an accelerator, before they are measured one after the other. Leaves `throughput.jsonl` (a line for each entry, machine
and versions included; another device's lines are kept) and `README.md` (the table) in the output folder, written anew
after every entry: an interrupted suite keeps what it has.
"""

import contextlib
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from tqdm import tqdm

import agents
from utils import cli, runs
from utils.errors import UserError, expanded, last_line

FLAGS = flags.FLAGS

COMPILED = 'compiled'  # What a measurement says before it waits for its turn.

BASELINES = [agent for agent in agents.available() if agent != 'infom']
CUBE = 'cube-single-play-singletask-task1-v0'
# Flags of `benchmarks.throughput` for each entry.
CPU_LENGTH = {'updates': 8, 'finetuning_updates': 4, 'repeats': 5}
ENTRIES = {
    'cpu': [
        {'agent': 'infom', **CPU_LENGTH},
        *({'agent': agent, **CPU_LENGTH} for agent in BASELINES),
        {'agent': 'infom', 'preset': 'small', 'updates': 100, 'finetuning_updates': 40, 'repeats': 5},
        {'agent': 'infom', 'preset': 'small', 'num_seeds': 4, 'updates': 40, 'finetuning_updates': 20, 'repeats': 5},
        {
            # A whole batch of 256 takes seconds here: convolutions, four fifths of them in gradients.
            'agent': 'infom', 'env_name': f'visual-{CUBE}', 'preset': 'small', 'batch_size': 32, 'rows': 2_000,
            'updates': 4, 'finetuning_updates': 4, 'repeats': 5,
        },
    ],
    'gpu': [
        *({'agent': 'infom', 'num_seeds': n, 'updates': 500, 'finetuning_updates': 200} for n in (1, 4, 8, 16)),
        *(
            {'agent': 'infom', 'num_seeds': n, 'precision': 'bfloat16', 'updates': 500, 'finetuning_updates': 200}
            for n in (1, 8)
        ),
        *({'agent': agent, 'updates': 500, 'finetuning_updates': 200} for agent in BASELINES),
        {
            'agent': 'infom', 'env_name': f'visual-{CUBE}', 'rows': 20_000, 'updates': 100, 'finetuning_updates': 40,
        },
    ],
}  # fmt: skip
COLUMNS = ('agent', 'shapes', 'preset', 'batch', 'seeds', 'precision', 'phase', 'ms/update', 'seed-updates/s',
           'compile s', 'GFLOP', 'of matmul', 'MB', 'host loop ÷ ours')  # fmt: skip


def command(entry) -> list[str]:
    return [sys.executable, '-m', 'benchmarks.throughput', *(f'--{name}={value}' for name, value in entry.items())]


def measure(entries) -> Iterator[dict]:
    """The JSON line of each entry. They are compiled side by side, and measured one after the other when all are.

    Raises UserError with the last line of its errors if one fails.
    """
    with contextlib.ExitStack() as stack:
        # Several share a GPU's memory, so that none may take it all at the start.
        sharing = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} if len(entries) > 1 else {}
        running = []
        for entry in entries:
            errors = stack.enter_context(tempfile.TemporaryFile('w+'))
            pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': errors}
            process = subprocess.Popen([*command(entry), '--wait'], env=os.environ | sharing, text=True, **pipes)
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append((entry, process, errors))
        for entry, process, errors in running:
            if process.stdout.readline().strip() != COMPILED:
                raise _failed(entry, process, errors)
        for entry, process, errors in running:
            output, _ = process.communicate('\n')
            if process.returncode:
                raise _failed(entry, process, errors)
            report = json.loads(output.splitlines()[-1])
            yield {'date': datetime.datetime.now(datetime.UTC).date().isoformat(), 'flags': entry, **report}


def _failed(entry, process, errors) -> UserError:
    process.wait()
    errors.seek(0)
    return UserError(f'{" ".join(command(entry)[1:])}: {last_line(errors.read()) or "no message"}')


def place(report) -> tuple:
    """The machine that a line is of."""
    return report['device'], report['processor'], report['cores']


def same_place(report, other, entry=('agent', 'env_name', 'preset', 'batch_size', 'num_seeds', 'precision')) -> bool:
    """Whether two lines are of one entry on one machine; `entry`: the keys that tell entries apart."""
    return place(report) == place(other) and all(report[key] == other[key] for key in entry)


def rows(report) -> list[list[str]]:
    """The table's two rows of one line, one for each phase."""
    table = []
    for phase, name in (('pretrain', 'pre-training'), ('finetune', 'fine-tuning')):
        values = {key.removeprefix(f'{phase}_'): value for key, value in report.items() if key.startswith(phase)}
        ratio = ''
        if 'ratio' in values:
            ratio = f'{values["ratio"]:.2f} ({values["ratio_min"]:.2f}–{values["ratio_max"]:.2f})'
        share = f'{values["matmul_share"]:.0%}' if 'matmul_share' in values else ''
        table.append([
            report['agent'], 'images' if report['env_name'].startswith('visual-') else 'states', report['preset'],
            str(report['batch_size']), str(report['num_seeds']), report['precision'], name,
            f'{values["ms"]:.1f}', f'{values["seed_updates_per_second"]:.1f}',
            f'{values["compile_seconds"]:.1f}', f'{values.get("gflop", 0):.2f}', share,
            f'{values.get("megabytes", 0):.0f}', ratio,
        ])  # fmt: skip
    return table


def markdown(reports) -> str:
    """One table for each device, in the order of measurement."""
    lines = [
        '# Throughput',
        '',
        'Written by `python -m benchmarks.suite` (`make bench`): synthetic data of the task’s shapes, median over',
        'turns. GFLOP: arithmetic of the matrix products in one update of one seed. Of matmul: that arithmetic over',
        'the time, as a share of the rate of plain matrix products (256 × 512 by 512 × 512) in the same run. MB: the',
        'program with its data. Precision: of an accelerator’s matrix products; a CPU’s are always float32. Last',
        'column: time of the plain host loop over ours, median and range over pairs.',
    ]
    for machine in dict.fromkeys(map(place, reports)):
        here = [report for report in reports if place(report) == machine]
        device, processor, cores = machine
        versions = ', '.join(f'{name} {version}' for name, version in here[0]['versions'].items())
        rates = [report['matmul_gflops'] for report in here]
        dates = sorted({report['date'] for report in here})
        lines += [
            '',
            f'## {device}: {cores} cores of {processor}',
            '',
            f'{", ".join(dates)}; {versions}; plain matrix products at {min(rates):.0f} to {max(rates):.0f} GFLOP/s.',
            '',
            '| ' + ' | '.join(COLUMNS) + ' |',
            '| ' + ' | '.join('---' for _ in COLUMNS) + ' |',
            *('| ' + ' | '.join(row) + ' |' for report in here for row in rows(report)),
        ]
    return '\n'.join(lines) + '\n'


def read(path: Path) -> list[dict]:
    """The lines of an earlier measurement, if there was one."""
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []


def write(path: Path, reports, page: str, text: str) -> None:
    """The lines, and `text` as the page beside them, each atomically."""
    lines = ''.join(json.dumps(report) + '\n' for report in reports)
    for name, content in ((path.name, lines), (page, text)):
        with runs.atomic_path(path.with_name(name)) as temporary:
            temporary.write_text(content, encoding='utf-8')


def chosen(entries, only: list[str]) -> list[dict]:
    """The entries of an agent in `only`, or of a task with a part of its name there; all if it is empty. Raises
    UserError where that leaves none."""
    found = [
        entry
        for entry in entries
        if not only or entry['agent'] in only or any(word in entry.get('env_name', '') for word in only)
    ]
    if not found:
        raise UserError(f'--only={",".join(only)}: no entry of the suite has such an agent or task')
    return found


def main(_):
    directory = runs.require_writable(expanded(FLAGS.output))
    # Asked for in a process of its own: some accelerators serve one process at a time.
    ask = [sys.executable, '-c', 'import jax; print(jax.default_backend())']
    backend = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[-1]
    kind = 'cpu' if backend == 'cpu' else 'gpu'
    entries = chosen(ENTRIES[kind], FLAGS.only)
    path = directory / 'throughput.jsonl'
    reports = read(path)
    groups = [entries[first : first + FLAGS.jobs] for first in range(0, len(entries), FLAGS.jobs)]
    for report in tqdm(itertools.chain.from_iterable(map(measure, groups)), 'suite', len(entries), unit='entry'):
        reports = [other for other in reports if not same_place(report, other)] + [report]
        write(path, reports, 'README.md', markdown(reports))
    print(markdown(reports))


if __name__ == '__main__':
    flags.DEFINE_list('only', [], 'Agents to measure, or parts of the names of tasks, as in visual; empty for all.')
    flags.DEFINE_integer('jobs', 1, 'Entries compiled side by side, for accelerators.', lower_bound=1)
    flags.DEFINE_string('output', 'results/throughput', 'Folder of throughput.jsonl and README.md.')
    cli.run(main)
