"""Whether rnd explores: how much of each ExORL domain its data visit, beside random and Ornstein–Uhlenbeck actions.

    python -m benchmarks.exploration [--domains=cheetah,walker] [--num_transitions=50000] [--seeds=0,1,2] \
        [--exorl_dir=…] [--output=results/exploration]

Collects, with `envs.collect_exorl`, what is not there yet into `<exorl_dir>/seed_<n>`: an interrupted run goes on where
it stopped. Coverage is the share of cells that were visited of a fixed grid of three coordinates (`envs/coverage.py`):
it compares policies and amounts of data within a domain, not domains. Writes `coverage.csv` (a line for each episode),
`coverage.png` and `README.md` (the table, which it also prints, and the command).
"""

from pathlib import Path

import numpy as np
from absl import flags

from envs import EXORL_TASKS, collect_exorl, coverage, exorl_episodes, worker_pool
from utils import cli, plots, runs, statistics
from utils.errors import UserError, expanded

FLAGS = flags.FLAGS
COLUMNS = ('domain', 'policy', 'seed', 'transitions', 'coverage')


def coverage_curve(buffer: Path, domain: str, num_transitions: int) -> tuple[np.ndarray, np.ndarray]:
    """(transitions, coverage), each (episodes,): the share of the domain's cells that the first episodes of a folder
    visit, after each of as many as hold no more than `num_transitions`, at least one."""
    paths = exorl_episodes.list_episodes(buffer)
    steps = exorl_episodes.common_steps(paths)
    cells: set[int] = set()
    visited = []
    for path in paths[: max(1, num_transitions // steps)]:
        cells.update(collect_exorl.visited_cells(path, domain).tolist())
        visited.append(len(cells) / coverage.grid_size(domain))
    return steps * np.arange(1, len(visited) + 1), np.array(visited)


def draw(curves: dict, path: Path) -> None:
    """curves: {domain: {policy: [(transitions, coverage) of each seed]}}. A panel for each domain."""
    figure, axes = plots.panels(len(curves), columns=4, size=(2.8, 2.4))
    for axis, (domain, policies) in zip(axes, curves.items(), strict=True):
        for position, (policy, members) in enumerate(policies.items()):
            members = [(steps, 100 * values) for steps, values in members]
            plots.draw_band(axis, members, color=plots.color(position), style=plots.style(position), label=policy)
        axis.set_title(domain)
        axis.set_xlabel('transitions')
        axis.set_ylabel('visited cells, %')
        axis.set_ylim(bottom=0)
        plots.count_in_thousands(axis)
    plots.legend(figure, axes)
    plots.save(figure, path)
    plots.close(figure)


def table(curves: dict) -> str:
    """The coverage at the end, a row for each domain, mean ± standard deviation over seeds."""
    policies = list(next(iter(curves.values())))
    lines = [f'| visited cells, % | {" | ".join(policies)} |', '| --- ' * (1 + len(policies)) + '|']
    for domain, of_domain in curves.items():
        cells = []
        for policy in policies:
            ends = [100 * values[-1] for _, values in of_domain[policy]]
            spread = statistics.standard_deviation(ends)
            cells.append(f'{np.mean(ends):.2f}' + (f' ± {spread:.2f}' if spread is not None else ''))
        coordinates = ', '.join(name for name, *_ in coverage.GRIDS[domain])
        lines.append(f'| {domain} ({coordinates}; {coverage.grid_size(domain):,} cells) | {" | ".join(cells)} |')
    return '\n'.join(lines)


def main(_):
    domains, seeds = FLAGS.domains, FLAGS.seeds
    if not domains:
        raise UserError(f'--domains is empty: expected some of {", ".join(EXORL_TASKS)}')
    for domain in domains:
        exorl_episodes.require_domain(domain)
    output = runs.require_writable(expanded(FLAGS.output))
    curves: dict = {}
    for domain in domains:
        curves[domain] = {policy: [] for policy in collect_exorl.POLICIES}
        for policy, members in curves[domain].items():
            for seed in seeds:
                folder = expanded(FLAGS.exorl_dir) / f'seed_{seed}'
                buffer = collect_exorl.collect(
                    domain, policy, FLAGS.num_transitions, seed, FLAGS.workers, folder, num_envs=FLAGS.num_envs
                )
                members.append(coverage_curve(buffer, domain, FLAGS.num_transitions))
    rows = (
        (domain, policy, seed, int(steps), f'{value:.6g}')
        for domain, policies in curves.items()
        for policy, members in policies.items()
        for seed, curve in zip(seeds, members, strict=True)
        for steps, value in zip(*curve, strict=True)
    )
    runs.write_csv(output / 'coverage.csv', COLUMNS, rows)
    draw(curves, output / 'coverage.png')
    settings = {
        'domains': ','.join(domains),
        'seeds': ','.join(map(str, seeds)),
        'num_transitions': FLAGS.num_transitions,
        'num_envs': FLAGS.num_envs,
    }
    command = ['python', '-m', 'benchmarks.exploration', *(f'--{name}={value}' for name, value in settings.items())]
    over = f'± the standard deviation over {len(seeds)} seeds' if len(seeds) > 1 else 'one seed'
    with runs.atomic_path(output / 'README.md') as temporary:
        temporary.write_text(
            f'# Exploration\n\nShare of a fixed grid that {FLAGS.num_transitions:,} transitions visit, '
            f'{over} (`benchmarks/exploration.py`).\n\n{table(curves)}\n\n'
            f'![coverage](coverage.png)\n\n`{" ".join(command)}`\n'
        )
    print(table(curves))


if __name__ == '__main__':
    flags.DEFINE_list('domains', list(EXORL_TASKS), 'Domains to explore.')
    flags.DEFINE_integer('num_transitions', 50_000, 'Transitions of each policy and seed.', lower_bound=1)
    cli.define_numbers('seeds', [0, 1, 2], 'Seeds; each has a folder of its own.')
    flags.DEFINE_integer('workers', worker_pool.available_cores(), 'Processes that simulate.', lower_bound=1)
    flags.DEFINE_integer('num_envs', 8, 'Episodes of rnd side by side.', lower_bound=1)
    flags.DEFINE_string('exorl_dir', 'exp/exploration', 'Where the episodes go.')
    flags.DEFINE_string('output', 'results/exploration', 'Where the figure and the numbers go.')
    cli.run(main)
