"""The figures of collected runs, from one command: domain bars, learning curves, ablations, sensitivities.

    python -m utils.figures exp/infom_ogbench [--output=results/mine] [--formats=pdf,png]
    python -m utils.figures results/mine/results.csv

Draws what the runs support: `domain_bars` and `curves_<suite>` always, `ablation_<agent>` where variants of an agent
differ in a choice (a name, on or off), `sensitivity_<agent>` where they differ in a number, `variants_<agent>` with all
of them where one differs in both at once. The first two show each agent without its variants, where it was run without.
What counts as a run and as a method is the business of `utils/collected_runs.py`; colours and the drawing of curves, of
`utils/plots.py`.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from utils import cli, plots, statistics
from utils.collected_runs import SUITE_SCORES, Curve, method_title, suite_of, task_position
from utils.errors import UserError, expanded
from utils.results import load_curves
from utils.runs import require_writable
from utils.tables import published, reporting_order, scores_by_task

FLAGS = flags.FLAGS

FORMATS = ('pdf', 'svg', 'png')


def domain_bars(curves: Sequence[Curve]):
    """A panel for each domain, a bar for each method: the mean over tasks of the final-three scores.

    The error bar is the mean over tasks of the standard deviations over seeds, as published; the diamond is the
    published figure of the agent. Methods that lack tasks which others have get no bar: their mean is another thing.
    """
    domains = list(dict.fromkeys(curve.domain for curve in sorted(curves, key=task_order)))
    methods = list(scores_by_task(curves))
    of_method = {curve.method: curve for curve in curves}
    figure, axes = plots.panels(len(domains), columns=4, size=(max(2.6, 0.9 + 0.32 * len(methods)), 2.6))
    for axis, domain in zip(axes, domains):
        of_domain = [curve for curve in curves if curve.domain == domain]
        scores = scores_by_task(of_domain)
        tasks = set().union(*scores.values())
        for position, method in enumerate(methods):
            if method in scores and set(scores[method]) == tasks:
                of_tasks = list(scores[method].values())
                spreads = [statistics.standard_deviation(values) or 0.0 for values in of_tasks]
                height = float(statistics.mean(of_tasks))
                look = {
                    'color': plots.color(position),
                    'hatch': plots.hatch(position),
                    'edgecolor': 'white',
                    'linewidth': 0,
                }
                axis.bar(position, height, yerr=np.mean(spreads), error_kw={'linewidth': 1}, label=method, **look)
            reference = published().get((of_method[method].agent, (), domain))
            if reference and not of_method[method].variant:
                axis.plot(
                    position, reference[0], 'D', color='black', markerfacecolor='white', markersize=5, label='published'
                )
        axis.set_title(f'{domain} ({len(tasks)} task{"s" if len(tasks) > 1 else ""})')
        axis.set_ylabel(of_domain[0].unit)
        axis.set_xticks([])
        if min(curve.score for curve in of_domain) >= 0:  # Returns on a user's own data may be negative.
            axis.set_ylim(bottom=0)
    plots.legend(figure, axes)
    return figure


def learning_curves(curves: Sequence[Curve], columns: int = 5):
    """A panel for each task, a line for each method: mean over seeds, with a band of one standard deviation.

    Seeds are averaged at the steps that all of them have; where one goes on alone, its line is thin.
    """
    curves = sorted(curves, key=reporting_order)
    tasks = list(dict.fromkeys(curve.env_name for curve in sorted(curves, key=task_order)))
    methods = list(dict.fromkeys(curve.method for curve in curves))
    figure, axes = plots.panels(len(tasks), columns=columns, size=(2.8, 2.3))
    for axis, task in zip(axes, tasks):
        of_task = [curve for curve in curves if curve.env_name == task]
        for position, method in enumerate(methods):
            members = [(curve.steps, curve.values) for curve in of_task if curve.method == method]
            if members:
                plots.draw_band(axis, members, color=plots.color(position), style=plots.style(position), label=method)
        axis.set_title(task_title(task))
        axis.set_xlabel('fine-tuning updates')
        plots.count_in_thousands(axis)
        axis.set_ylabel(of_task[0].unit)
        if of_task[0].unit == 'success %':
            axis.set_ylim(-3, 103)
    plots.legend(figure, axes)
    return figure


def ablations(curves: Sequence[Curve]) -> Iterator[tuple[str, list[Curve]]]:
    """(agent, curves) for each agent with variants that differ in choices, with all numbers the same."""
    for agent, of_agent in sorted(_by_agent(curves).items()):
        varied = _varied(of_agent)
        choices = [key for key, values in varied.items() if not all(map(_is_number, values))]
        related = _related(of_agent, choices)
        if related:
            yield agent, related


def sensitivities(curves: Sequence[Curve]) -> Iterator[tuple[str, str, list[Curve]]]:
    """(agent, setting, curves) for each number in which variants of an agent differ with all else the same.

    Curves without the number (None) have no place on its axis. A training counts once, whatever its names.
    """
    for agent, of_agent in sorted(_by_agent(_each_training_once(curves)).items()):
        for setting, values in sorted(_varied(of_agent).items()):
            if not all(map(_is_number, values - {None})):
                continue
            numbers = [curve for curve in of_agent if _is_number(curve.settings.get(setting))]
            related = _related(numbers, [setting])
            if related:
                yield agent, setting, _balanced(related, setting)


def other_variants(curves: Sequence[Curve]) -> Iterator[tuple[str, list[Curve]]]:
    """(agent, all its curves) for each agent with a variant that neither ablations nor sensitivities show."""
    shown = [curve for _, related in ablations(curves) for curve in related]
    shown += [curve for *_, related in sensitivities(curves) for curve in related]
    trainings = {curve.training for curve in shown}
    shown = {curve.method for curve in curves if curve.training in trainings}
    for agent, of_agent in sorted(_by_agent(curves).items()):
        methods = {curve.method for curve in of_agent}
        if len(methods) > 1 and not methods <= shown | {method_title(agent)}:
            yield agent, of_agent


def sensitivity_panels(agent: str, panels: Sequence[tuple[str, list[Curve]]]):
    """A panel for each (setting, unit), a line for each task: mean score at each value, bars of one standard deviation.

    The dotted lines are the published trends, where there are any.
    """
    drawn = [
        (setting, unit, [curve for curve in curves if curve.unit == unit])
        for setting, curves in panels
        for unit in dict.fromkeys(curve.unit for curve in sorted(curves, key=task_order))
    ]
    tasks = list(dict.fromkeys(curve.env_name for _, _, curves in drawn for curve in sorted(curves, key=task_order)))
    figure, axes = plots.panels(len(drawn), columns=4, size=(3.0, 2.5))
    for axis, (setting, unit, curves) in zip(axes, drawn):
        for position, task in enumerate(tasks):
            scores: dict[float, list[float]] = defaultdict(list)
            for curve in curves:
                if curve.env_name == task:
                    scores[curve.settings[setting]].append(curve.score)
            if not scores:
                continue
            values = sorted(scores)
            means = [np.mean(scores[value]) for value in values]
            spreads = [statistics.standard_deviation(scores[value]) or 0.0 for value in values]
            color = plots.color(position)
            axis.errorbar(
                values, means, spreads, color=color, marker='o', markersize=4, capsize=2, label=task_title(task)
            )
            reference = _published_trend(agent, setting, task)
            if reference:
                axis.plot(*zip(*reference), ':', color=plots.color(position), linewidth=1)
                axis.plot([], [], ':', color='gray', linewidth=1, label='published')
        axis.set_xlabel(setting.removeprefix('agent.'))
        axis.set_ylabel(unit)
        values = sorted({curve.settings[setting] for curve in curves})
        places = np.array(values, np.float64)
        if values[0] > 0 and values[-1] / values[0] >= 8:
            axis.set_xscale('log')
            places = np.log(places)
        close = len(values) > 1 and np.diff(places).min() < 0.15 * (places[-1] - places[0])
        axis.set_xticks(values, [f'{value:g}' for value in values], rotation=90 if close else 0)
        axis.minorticks_off()
    figure.suptitle(method_title(agent))
    plots.legend(figure, axes)
    return figure


def draw_all(curves: Sequence[Curve], output: Path, formats: Sequence[str]) -> list[Path]:
    """Draws every figure that the curves support and returns the files."""
    compared = without_variants(curves)
    figures = {'domain_bars': lambda: domain_bars(compared)}
    for suite in SUITE_SCORES:
        of_suite = [curve for curve in compared if suite_of(curve.env_name) == suite]
        if of_suite:
            figures[f'curves_{suite}'] = lambda of_suite=of_suite: learning_curves(of_suite)
    for agent, variants in ablations(curves):
        figures[f'ablation_{agent}'] = lambda variants=variants: learning_curves(variants, columns=4)
    for agent, variants in other_variants(curves):
        figures[f'variants_{agent}'] = lambda variants=variants: learning_curves(variants, columns=4)
    panels: dict[str, list] = defaultdict(list)
    for agent, setting, related in sensitivities(curves):
        panels[agent].append((setting, related))
    for agent, of_agent in panels.items():
        figures[f'sensitivity_{agent}'] = lambda agent=agent, of_agent=of_agent: sensitivity_panels(agent, of_agent)
    files = []
    for name, draw in figures.items():
        figure = draw()
        files += [plots.save(figure, output / f'{name}.{form}') for form in formats]
        plots.close(figure)
    return files


# --- Pieces ---


def task_order(curve: Curve) -> tuple[int, str]:
    return task_position(curve.env_name)


def task_title(task: str) -> str:
    """'cube-single task1' or 'walker flip'."""
    return task.removesuffix('-v0').replace('-play-singletask-', ' ').replace('_', ' ')


def _by_agent(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = defaultdict(list)
    for curve in curves:
        groups[curve.agent].append(curve)
    return groups


def _each_training_once(curves: Sequence[Curve]) -> list[Curve]:
    """The first curve of each training: seeds are not to count again under another name."""
    first: dict[tuple, Curve] = {}
    for curve in curves:
        first.setdefault(curve.training, curve)
    return list(first.values())


def _varied(curves: Sequence[Curve]) -> dict[str, set]:
    """{setting: its values} of the settings that differ within a task."""
    values: dict[str, dict[str, set]] = defaultdict(lambda: defaultdict(set))
    for curve in curves:
        for key, value in curve.settings.items():
            values[key][curve.env_name].add(value)
    return {
        key: set.union(*of_tasks.values())
        for key, of_tasks in values.items()
        if any(len(of_task) > 1 for of_task in of_tasks.values())
    }


def _related(curves: Sequence[Curve], keys: Sequence[str]) -> list[Curve]:
    """The curves that have a partner on the same task with other values of some of the keys and all else the same."""
    return [curve for group in _alike_but(curves, keys) if len(_values_in(group, keys)) > 1 for curve in group]


def _balanced(curves: Sequence[Curve], setting: str) -> list[Curve]:
    """The curves whose other settings stand at every value of the setting that most of them do: the mean at each value
    is then over the same."""
    kept = []
    for task in dict.fromkeys(curve.env_name for curve in curves):
        groups = _alike_but([curve for curve in curves if curve.env_name == task], [setting])
        of_values = defaultdict(list)
        for group in groups:
            of_values[frozenset(_values_in(group, [setting]))] += group
        kept += of_values[max(of_values, key=lambda values: (len(values), len(of_values[values])))]
    return kept


def _alike_but(curves: Sequence[Curve], keys: Sequence[str]) -> list[list[Curve]]:
    """The curves in groups of one task and the same settings but for the keys."""
    groups: dict[tuple, list[Curve]] = defaultdict(list)
    for curve in curves:
        others = sorted((key, repr(value)) for key, value in curve.settings.items() if key not in keys)
        groups[curve.env_name, tuple(others)].append(curve)
    return list(groups.values())


def _values_in(curves: Sequence[Curve], keys: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(repr(curve.settings.get(key)) for key in keys) for curve in curves}


def without_variants(curves: Sequence[Curve]) -> list[Curve]:
    """Each agent's plain runs where it has some, else all of its variants."""
    plain = {curve.agent for curve in curves if not curve.variant}
    return [curve for curve in curves if curve.agent not in plain or not curve.variant]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _published_trend(agent: str, setting: str, task: str) -> list[tuple[float, float]]:
    prefix = f'{setting.removeprefix("agent.")}='
    return sorted(
        (float(variant[0].removeprefix(prefix)), score)
        for (of_agent, variant, name), (score, _) in published().items()
        if (of_agent, name) == (agent, task) and variant and variant[0].startswith(prefix)
    )


def main(argv):
    unknown = set(FLAGS.formats) - set(FORMATS)
    if unknown or not FLAGS.formats:
        raise UserError(f'--formats={",".join(FLAGS.formats)}: expected some of {", ".join(FORMATS)}')
    source = expanded(argv[1])
    curves = load_curves(source)
    beside = source.parent if source.is_file() else source / 'results'
    output = require_writable(expanded(FLAGS.output) if FLAGS.output else beside)
    for file in draw_all(curves, output, FLAGS.formats):
        print(file)


if __name__ == '__main__':
    flags.DEFINE_string('output', None, 'Where the figures go (default: beside the CSV, or results/ in the directory).')
    flags.DEFINE_list('formats', ['pdf', 'png'], f'File formats, of {", ".join(FORMATS)}.')
    cli.run(main, positional=('results.csv or save_dir',))
