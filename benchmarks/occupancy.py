"""How well runs know the future over training: the energy distance at every checkpoint that they kept.

    python pretrain.py --env_name=… --keep_interval=5000 --run_group=occupancy --run_name=ours_sd0
    python -m benchmarks.occupancy exp/occupancy [--num_states=256] [--output=exp/occupancy/results]

For every run under a directory, each of its seeds and kept checkpoints: `utils.occupancy.occupancy_report` on the
held-out file of its first phase, with the same random numbers for all. Writes `occupancy.csv` and `occupancy.png`, runs
that differ only in their seed (`_sd<seed>` at the end of the name) as one line with a band of one standard deviation,
and prints a Markdown table of their means. Runs without an occupancy model are named and left out; so is what keeps
distances from comparing: other held-out states, other units.
"""

import re
import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from utils import cli, plots
from utils.collected_runs import find_runs
from utils.errors import UserError, expanded
from utils.inspect import open_run
from utils.runs import require_writable, write_csv

FLAGS = flags.FLAGS

NUM_FUTURES = 128
# Drawn and printed: what the critic's targets take, and what a random state of the data would score.
SHOWN = ('flow, z from the prior', 'marginal')
COLUMNS = ('run', 'seed', 'phase', 'step', 'predictor', 'energy_distance', 'energy_distance_error')


def label_of(run: str) -> str:
    """A run's name without its seeds."""
    return re.sub(r'_sd\d+(-\d+)?(?=(_pretraining|_finetuning)?$)', '', run)


def score_run(directory: Path, name: str, num_states: int, dataset_dir: str | None = None) -> tuple[list, set]:
    """(a row of `COLUMNS` for each seed, kept checkpoint and predictor of one run, in that order; the units and states
    of its distances, more than one where its checkpoints differ in them).

    Raises:
        UserError: it is no run, or its agent has no occupancy model.
    """
    rows, units, key = [], set(), jax.random.key(0)
    look = open_run(directory, dataset_dir=dataset_dir)
    look.load()
    for seed in range(look.config['seed'], look.config['seed'] + look.config['num_seeds']):
        look.seed = seed
        for meta, report in look.score_occupancy(key, num_states, NUM_FUTURES):
            units.add(look.units(meta))
            rows += report_rows(name, seed, meta['phase'], meta['step'], report)
    return rows, units


def report_rows(name: str, seed: int, phase: str, step: int, report: dict) -> list[tuple]:
    """One `occupancy_report` as rows of `COLUMNS`."""
    return [
        (name, seed, phase, step, predictor, scores['energy_distance'], scores['energy_distance_error'])
        for predictor, scores in report.items()
    ]


def lines(rows, predictor: str) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """{label: (steps, energy distances) of each of its seeds}."""
    curves: dict[str, dict] = {}
    for run, seed, _, step, which, distance, _ in rows:
        if which == predictor:
            curves.setdefault(label_of(run), {}).setdefault((run, seed), []).append((step, distance))
    return {label: [tuple(np.array(x) for x in zip(*c)) for c in of.values()] for label, of in curves.items()}


def table(rows) -> str:
    """Markdown: a row for each label and predictor shown, a column for each step; mean ± standard deviation over
    seeds."""
    steps = sorted({row[3] for row in rows})
    head = ['run', 'predictor', *(f'{step:,}' for step in steps)]
    output = [head, ['---'] * len(head)]
    for predictor in SHOWN:
        for label, curves in lines(rows, predictor).items():
            cells = []
            for step in steps:
                values = [y[x == step][0] for x, y in curves if (x == step).any()]
                spread = f' ± {np.std(values, ddof=1):.3f}' if len(values) > 1 else ''
                cells.append(f'{np.mean(values):.3f}{spread}' if values else '')
            output.append([label, predictor, *cells])
    return '\n'.join(f'| {" | ".join(row)} |' for row in output)


def draw(rows, path: Path) -> None:
    """The predictors shown over training; the marginal, which hardly moves, dotted."""
    figure, (axis,) = plots.panels(1, columns=1, size=(6.0, 3.4))
    for predictor, style in zip(SHOWN, ('-', ':')):
        for position, (label, curves) in enumerate(lines(rows, predictor).items()):
            name = label if style == '-' else f'{label}: random states'
            plots.draw_band(axis, curves, color=plots.color(position), style=style, label=name)
    axis.set_xlabel('updates')
    axis.set_ylabel('energy distance')
    axis.set_ylim(bottom=0)
    plots.count_in_thousands(axis)
    plots.legend(figure, [axis])
    plots.save(figure, path)
    plots.close(figure)


def require_runs(directory: Path) -> list[Path]:
    """The runs at or under a directory. Raises UserError where there is none."""
    runs = sorted(find_runs(directory))
    if not runs:
        raise UserError(f'no run in {directory}: expected directories that main.py or pretrain.py made')
    return runs


def score_runs(directory: Path, num_states: int, dataset_dir: str | None = None) -> tuple[list, set, list]:
    """(rows, units) of all runs at or under a directory, as `score_run` gives them for one, and why others are left
    out.

    Raises:
        UserError: no run, or none that can be scored.
    """
    runs = require_runs(directory)
    rows, units, left_out = [], set(), []
    for run in tqdm(runs, unit='run'):
        name = str(run.relative_to(directory)) if run != directory else run.resolve().name
        try:
            scored, its_units = score_run(run, name, num_states, dataset_dir)
        except UserError as error:
            left_out.append(f'{name}: {error}')
            continue
        rows += scored
        units |= its_units
    if not rows:
        raise UserError('; '.join(left_out))
    return rows, units, left_out


def main(argv):
    directory = expanded(argv[1])
    require_runs(directory)  # Before a folder is made for what they score.
    output = expanded(FLAGS.output) if FLAGS.output else directory / 'results'
    require_writable(output)
    rows, units, left_out = score_runs(directory, FLAGS.num_states, FLAGS.dataset_dir)
    for reason in left_out:
        print(f'left out: {reason}', file=sys.stderr)
    if len(units) > 1:
        print('Mind: these distances are of several held-out files or in several units:', file=sys.stderr)
        print('\n'.join(sorted(units)), file=sys.stderr)
    write_csv(output / 'occupancy.csv', COLUMNS, rows)
    draw(rows, output / 'occupancy.png')
    print(table(rows))


if __name__ == '__main__':
    flags.DEFINE_string('dataset_dir', None, 'Folder of the data files (default: where the runs had them).')
    flags.DEFINE_string('output', None, 'Where the CSV and the figure go (default: results/ in the directory).')
    flags.DEFINE_integer('num_states', 256, 'Held-out states.', lower_bound=1)
    cli.run(main, positional=('directory of runs',))
