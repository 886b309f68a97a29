"""How figures look: colours, panels, curves with bands, saving; and the learning curves of one task's runs.

Matplotlib is imported when a figure is drawn, with a backend that needs no display. Which figures there are for
collected runs is in `utils/figures.py`.
"""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.runs import atomic_path, read_metrics

# Okabe and Ito's colours, distinguishable with any colour vision.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
HANDLE_WIDTH, CHARACTER_WIDTH = 0.6, 0.09  # inches that a legend's entry takes
STYLES = ('-', '--', ':')  # one after the other when the colours are used up


def color(position: int) -> str:
    """The colour of the line or bar at a position, from 0."""
    return COLORS[position % len(COLORS)]


def style(position: int) -> str:
    """The line style at a position; with `color`, 21 positions can be told apart."""
    return STYLES[position // len(COLORS) % len(STYLES)]


def hatch(position: int) -> str | None:
    """The hatching of the bar at a position, one after the other when the colours are used up."""
    return (None, '///', '...')[position // len(COLORS) % 3]


def panels(count: int, columns: int, size: tuple[float, float]):
    """(figure, axes): `count` panels of `size` inches in rows of at most `columns`, without the upper and right
    spines."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure, grid = pyplot().subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows + 0.5), squeeze=False, constrained_layout=True
    )
    for axis in grid.flat[count:]:
        axis.set_visible(False)
    axes = list(grid.flat[:count])
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    return figure, axes


def draw_band(axis, curves: Sequence[tuple[np.ndarray, np.ndarray]], *, color, style='-', label=None, seeds=False):
    """Draws curves (steps, values) of several seeds as their mean with a band of one standard deviation.

    The mean is taken at the steps that all of them have; what one has beyond the last of these is a thin line of its
    own. seeds: draws every curve as a thin line.
    """
    common = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in curves)))
    end = common[-1] if common else -np.inf
    for steps, values in curves if len(curves) > 1 else []:
        chosen = np.ones(len(steps), bool) if seeds else steps >= end
        if chosen.sum() > 1:
            axis.plot(steps[chosen], values[chosen], style, color=color, alpha=0.3, linewidth=0.8)
    if not common:
        return
    stacked = np.stack([values[np.isin(steps, common)] for steps, values in curves])  # (seeds, steps)
    mean = stacked.mean(axis=0)
    axis.plot(common, mean, style, color=color, linewidth=2, label=label)
    if len(curves) > 1:
        std = stacked.std(axis=0, ddof=1)
        axis.fill_between(common, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)


def legend(figure, axes) -> None:
    """One legend for all panels, below them; each label once, in lines that fit the figure's width."""
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    width, height = figure.get_size_inches()
    fitting = int((width - HANDLE_WIDTH) / CHARACTER_WIDTH)
    labels = [textwrap.fill(label, fitting, break_on_hyphens=False) for label in entries]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=1)
    columns = max(1, min(len(entries), int(width / (HANDLE_WIDTH + CHARACTER_WIDTH * longest))))
    heights = [1 + label.count('\n') for label in labels]
    lines = max(sum(part) for part in np.array_split(heights, columns))  # As the legend fills its columns.
    figure.set_size_inches(width, height + 0.22 * lines)  # The panels keep their size.
    figure.legend(entries.values(), labels, loc='outside lower center', frameon=False, ncols=columns)


def count_in_thousands(axis) -> None:
    """Marks the horizontal axis as 100k, 200k, …, few enough to be read."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=''))


def save(figure, path: str | os.PathLike) -> Path:
    """Writes a figure in the format of its path's suffix, atomically; the same figure gives the same bytes."""
    path = Path(path)
    metadata = {'pdf': {'CreationDate': None}, 'svg': {'Date': None}}.get(path.suffix[1:], {})
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata=metadata)
    return path


def close(figure) -> None:
    """Frees a figure's memory."""
    pyplot().close(figure)


def pyplot():
    """Matplotlib's pyplot, with the backend that needs no display."""
    import matplotlib

    matplotlib.use('Agg')
    matplotlib.rcParams['svg.hashsalt'] = 'infom'
    import matplotlib.pyplot

    return matplotlib.pyplot


# --- One task's runs, as the demo shows them ---


def read_curve(run_directory, metric, seed):
    """(steps, values) of one metric of one seed, in the order of the log; rows without the metric are passed over."""
    rows = [
        (row['step'], row[metric])
        for row in read_metrics(Path(run_directory) / 'metrics.jsonl')
        if row['seed'] == seed and row.get(metric) is not None
    ]
    steps, values = zip(*rows, strict=True) if rows else ((), ())
    return np.array(steps), np.array(values, np.float64)


def draw_learning_curves(runs, path, title, reference=None):
    """Draws the learning curves of runs of one task into `path` (any format that matplotlib writes).

    runs: {label: list of (run directory, seed)}; each label is one colour, each seed a thin line, their mean a thick
    one, with a band of one standard deviation where there are several. Four panels: success and return at evaluation,
    flow loss on training and validation rows, Q against its targets. reference: {name: success} drawn as horizontal
    lines in the first panel.
    """
    figure, axes = panels(4, columns=4, size=(4.25, 3.3))
    shown = [
        ('success rate', {'evaluation/episode.success': '-'}),
        ('return', {'evaluation/episode.return': '-'}),
        ('flow loss (dashed: validation)', {'training/flow_loss': '-', 'validation/flow_loss': '--'}),
        ('Q (dashed: target)', {'training/q_mean': '-', 'training/q_target_mean': '--'}),
    ]
    for axis, (name, metrics) in zip(axes, shown, strict=True):
        for position, (label, members) in enumerate(runs.items()):
            for metric, line in metrics.items():
                curves = [read_curve(directory, metric, seed) for directory, seed in members]
                curves = [curve for curve in curves if len(curve[0])]
                if curves:
                    draw_band(
                        axis,
                        curves,
                        color=color(position),
                        style=line,
                        label=label if line == '-' else None,
                        seeds=True,
                    )
        axis.set_xlabel('updates')
        count_in_thousands(axis)
        axis.set_title(name)
    for position, (name, value) in enumerate((reference or {}).items(), start=3):
        axes[0].axhline(value, color=color(position), linestyle=':', label=name)
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].legend(frameon=False)
    axes[2].set_yscale('log')
    figure.suptitle(title)
    save(figure, path)
    close(figure)
