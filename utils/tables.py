"""Tables of collected runs, in Markdown and LaTeX: scores per domain beside the published ones, stability, and
aggregates over tasks with intervals."""

import csv
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import envs
from envs import custom
from utils import statistics
from utils.collected_runs import AGENT_TITLES, Curve, domain_of, method_title, suite_of, task_position

PUBLISHED_PATH = Path(__file__).with_name('published_results.csv')
PUBLISHED_SETUP = 'InFOM (arXiv 2506.08902): 8 seeds (images: 4), full size; averages read off bar charts'
NOTHING = '–'


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, what there is to say of it, the names of the columns, and rows of finished cells."""

    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.header, ['---', *['---:'] * (len(self.header) - 1)], *self.rows]
        body = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
        return f'## {self.title}\n\n{self.caption}\n\n{body}\n'

    def latex(self) -> str:
        """For the package booktabs."""
        lines = [' & '.join(map(_latex_cell, line)) + r' \\' for line in (self.header, *self.rows)]
        return '\n'.join(
            [
                r'\begin{table}', r'\centering',
                rf'\caption{{{_latex_cell(self.title)}. {_latex_cell(self.caption)}}}',
                rf'\begin{{tabular}}{{l{"r" * (len(self.header) - 1)}}}', r'\toprule', lines[0], r'\midrule',
                *lines[1:], r'\bottomrule', r'\end{tabular}', r'\end{table}', '',
            ]
        )  # fmt: skip


_LATEX = {
    '&': r'\&', '%': r'\%', '_': r'\_', '#': r'\#', '±': r'$\pm$', '–': '--', '−': '$-$', '>': '$>$', '<': '$<$',
    '÷': r'$\div$',
}  # fmt: skip


def _latex_cell(text: str) -> str:
    return ''.join(_LATEX.get(character, character) for character in text)


@functools.cache
def published() -> dict[tuple[str, tuple[str, ...], str], tuple[float, float | None]]:
    """(agent, variant of one setting or none, task or domain) → (score, standard deviation or None), in the units of
    `Curve.unit`."""
    with PUBLISHED_PATH.open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    return {
        (row['agent'], (row['variant'],) if row['variant'] else (), row['name']): (
            float(row['score']),
            float(row['std']) if row['std'] else None,
        )
        for row in rows
    }


def scores_by_task(curves: Sequence[Curve]) -> dict[str, dict[str, np.ndarray]]:
    """{method: {task: (seeds,) final-three scores}}, methods and tasks in the order in which they are reported."""
    collected: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for curve in sorted(curves, key=reporting_order):
        collected[curve.method][curve.env_name].append(curve.score)
    return {method: {task: np.array(scores) for task, scores in tasks.items()} for method, tasks in collected.items()}


def reporting_order(curve: Curve) -> tuple:
    agents = list(AGENT_TITLES)
    agent = agents.index(curve.agent) if curve.agent in agents else len(agents)
    return agent, curve.method, task_position(curve.env_name), curve.seed


def all_tables(curves: Sequence[Curve]) -> list[Table]:
    """Every table that the curves support."""
    scores = scores_by_task(curves)
    reported = sorted({task for tasks in scores.values() for task in tasks}, key=task_position)
    domains = list(dict.fromkeys(map(domain_of, reported)))
    tables = [domain_table(domain, curves) for domain in domains]
    tables.append(stability_table(curves, domains))
    if len(scores) > 1 or any(len(tasks) > 1 for tasks in scores.values()):
        tables += aggregate_tables(scores)
    return tables


def domain_table(domain: str, curves: Sequence[Curve]) -> Table:
    """Rows: methods, each followed by its published figures where there are any. Columns: tasks, and their average."""
    curves = [curve for curve in curves if curve.domain == domain]
    scores = scores_by_task(curves)
    tasks = sorted({task for of_method in scores.values() for task in of_method}, key=task_position)
    rows = []
    first_of = {curve.method: curve for curve in reversed(curves)}
    shown = set()  # Published rows: the variants of an agent share one.
    for method, of_method in scores.items():
        cells = [_mean_and_std(of_method[task]) if task in of_method else NOTHING for task in tasks]
        average = NOTHING
        if set(of_method) == set(tasks):
            spreads = [statistics.standard_deviation(values) for values in of_method.values()]
            average = _plus_minus(
                float(statistics.mean(list(of_method.values()))), None if None in spreads else float(np.mean(spreads))
            )
        rows.append([method, *cells, average])
        row = _published_row(first_of[method].agent, first_of[method].variant, tasks, domain)
        if row is not None and row[0] not in shown:
            shown.add(row[0])
            rows.append(row)
    return Table(
        title=f'{domain} ({curves[0].unit})',
        caption=(
            'Mean of the last three evaluations; ± is the standard deviation over seeds (number in brackets), in the '
            f'average its mean over tasks. Published: {PUBLISHED_SETUP}, over all tasks of the domain.'
        ),
        header=['', *map(_short_name, tasks), 'average'],
        rows=rows,
    )


def _published_row(agent: str, variant: Sequence[str], tasks: Sequence[str], domain: str) -> list[str] | None:
    """The published figures of a method: of the agent with the one setting of its variant that was published, else of
    the agent alone."""
    known = {key[:2] for key in published()}
    settings = tuple(setting for setting in variant if (agent, (setting,)) in known)
    if len(settings) > 1:  # Two of them at once were not published.
        settings = ()
    cells = [published().get((agent, settings, name)) for name in (*tasks, domain)]
    if not any(cells):
        return None
    title = method_title(agent, settings)
    return [f'{title} (published)', *(_plus_minus(*cell) if cell else NOTHING for cell in cells)]


def stability_table(curves: Sequence[Curve], domains: Sequence[str]) -> Table:
    """Whether the end of training is as good as its best evaluation, by method and domain."""
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for curve in sorted(curves, key=reporting_order):
        groups[curve.method, curve.domain].append(curve.scores)
    rows = []
    for domain in domains:
        for method in dict.fromkeys(method for method, where in groups if where == domain):
            scores = groups[method, domain]
            ratios = [score['stability'] for score in scores if score['stability'] is not None]
            rows.append(
                [
                    method,
                    domain,
                    *(f'{np.mean([score[key] for score in scores]):.1f}' for key in ('final_three', 'best', 'drop')),
                    f'{np.mean(ratios):.2f}' if ratios else NOTHING,
                    str(len(scores)),
                ]
            )
    return Table(
        title='Stability',
        caption=(
            'Means over tasks and seeds of: the last three evaluations, the best one, the drop from it, and their '
            'ratio (of runs whose best score is above 0).'
        ),
        header=['', 'domain', 'final three', 'best', 'drop', 'final three ÷ best', 'runs'],
        rows=rows,
    )


def aggregate_tables(scores: dict[str, dict[str, np.ndarray]]) -> list[Table]:
    """Over all tasks that every method has, on one scale; and each method against the first one."""
    normalised = {
        method: {task: values * _to_per_cent(task) for task, values in tasks.items()}
        for method, tasks in scores.items()
    }
    shared_by_all = set.intersection(*map(set, normalised.values()))
    common = sorted((task for task in shared_by_all if suite_of(task) != custom.SUITE), key=task_position)
    tables = []
    if common:
        rows = []
        for method, tasks in normalised.items():
            shared = [tasks[task] for task in common]
            cells = [
                _with_interval(aggregate, shared)
                for aggregate in (statistics.interquartile_mean, statistics.median, statistics.mean)
            ]
            rows.append([method, *cells, str(sum(map(len, shared)))])
        tables.append(
            Table(
                title='Overall',
                caption=(
                    f'Over the tasks that every method has ({len(common)}), in per cent of the largest possible: '
                    'success rate (OGBench), return ÷ length of the episode (ExORL). Interquartile mean over runs; '
                    f'median and mean over tasks. {_INTERVALS}'
                ),
                header=['', 'interquartile mean', 'median', 'mean', 'runs'],
                rows=rows,
            )
        )
    first, *others = normalised
    rows = []
    for other in others:
        shared = [task for task in normalised[first] if task in normalised[other]]
        if shared:
            ours, theirs = ([normalised[method][task] for task in shared] for method in (first, other))
            cell = _with_interval(statistics.probability_of_improvement, ours, theirs, digits=2)
            rows.append([f'{first} > {other}', cell, str(len(shared))])
    if rows:
        tables.append(
            Table(
                title='Probability of improvement',
                caption=(
                    'That a seed of the first method scores above a seed of the second on the same task (a tie counts '
                    f'half), averaged over the tasks that both have. {_INTERVALS}'
                ),
                header=['', 'probability', 'tasks'],
                rows=rows,
            )
        )
    return tables


_INTERVALS = f'In brackets: {statistics.CONFIDENCE:.0%} stratified bootstrap interval over seeds.'


# --- Pieces ---


def _short_name(task: str) -> str:
    """'task1' or 'run_backward'; image tasks keep their domain."""
    if suite_of(task) == custom.SUITE:
        return task.removeprefix(custom.PREFIX)
    if task.startswith('visual-'):
        return task.removesuffix('-play-singletask-task1-v0')
    if '-singletask' in task:
        return task.removesuffix('-v0').rsplit('-', 1)[-1]
    return task.partition('_')[2]


def _to_per_cent(task: str) -> float:
    """From the unit of a task's scores to per cent of the largest possible: ExORL's rewards are at most 1 a step. Of a
    user's own data the largest is not known: their scores stay as they are, and out of what mixes tasks."""
    return 100.0 / envs.EXORL_EPISODE_LENGTHS[domain_of(task)] if suite_of(task) == 'exorl' else 1.0


def _plus_minus(mean: float, std: float | None) -> str:
    return f'{mean:.1f}' if std is None else f'{mean:.1f} ± {std:.1f}'


def _mean_and_std(values: np.ndarray) -> str:
    return f'{_plus_minus(float(np.mean(values)), statistics.standard_deviation(values))} ({len(values)})'


def _with_interval(statistic: Callable[..., np.ndarray], *methods: statistics.Scores, digits: int = 1) -> str:
    point = f'{float(statistic(*methods)):.{digits}f}'
    interval = statistics.bootstrap_interval(statistic, *methods)
    return point if interval is None else f'{point} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]'
