"""The figures of `utils/inspect.py`: arrays in, one PNG file each out. Nothing is computed here that a table holds."""

import contextlib
import math

import numpy as np

from utils import plots
from utils.plots import COLORS
from utils.runs import atomic_path

REALISED = '#444444'  # What really came, in every figure.
KINDS = {  # of metrics in learning curves
    'evaluation': (COLORS[0], '-'),
    'training': (COLORS[0], '-'),
    'validation': (COLORS[1], '--'),
    'diagnostics': (COLORS[2], '-'),
}


@contextlib.contextmanager
def figure_file(path, rows, columns, width, height, **options):
    """A figure of rows × columns axes (each width × height inches), given as a 2-D array, and written to `path`."""
    figure, axes = plots.pyplot().subplots(
        rows, columns, figsize=(columns * width, rows * height), squeeze=False, constrained_layout=True, **options
    )
    try:
        yield figure, axes
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=100)
    finally:
        plots.close(figure)


def draw_curves(path, rows, columns=4):
    """Every metric of one seed's log rows over the updates: evaluations first, then training (line) beside validation
    (dashed), diagnostics last, on a logarithmic scale where values are positive and span two decades."""
    panels = {}
    for row in rows:
        for name, value in row.items():
            kind, _, metric = name.partition('/')
            known = kind in KINDS and isinstance(value, (int, float))
            if not known or (kind == 'evaluation' and metric.endswith('_std')):
                continue
            panel = panels.setdefault(metric if kind in ('training', 'validation') else name, {})
            panel.setdefault(kind, []).append((row['step'], value))
    order = {'evaluation': 0, 'diagnostics': 2}
    panels = dict(sorted(panels.items(), key=lambda item: (order.get(item[0].partition('/')[0], 1), item[0])))
    phase_ends = [row['step'] for row in rows if row['phase'] == 'pretraining']
    finetuned = any(row['phase'] == 'finetuning' for row in rows)
    if not panels:
        return False
    with figure_file(path, math.ceil(len(panels) / columns), columns, 3.4, 2.4) as (_, axes):
        for axis, (metric, curves) in zip(axes.flat, panels.items()):
            for kind, (color, style) in KINDS.items():
                if kind in curves:
                    axis.plot(*zip(*curves[kind]), style, color=color, linewidth=1.3, label=kind)
            values = np.array([value for curve in curves.values() for _, value in curve])
            if values.min() > 0 and values.max() > 100 * values.min():
                axis.set_yscale('log')
            if phase_ends and finetuned:
                axis.axvline(max(phase_ends), color='#999999', linewidth=0.8)
            axis.set_title(metric.removeprefix('evaluation/').removeprefix('diagnostics/'), fontsize=9)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        axes.flat[min(len(panels) - 1, 3)].legend(fontsize=7, frameon=False)
    return True


def draw_futures(path, panels, state, trajectory, truth, samples, names):
    """One state's sampled futures on each of `panels` (`envs.state_views`).

    state (d,); trajectory (T, d): the states that followed it; truth (N, d): those of them at geometric times; samples
    (K, N, d): futures under K intentions called `names`. All in the simulator's units.
    """
    with figure_file(path, 1, len(panels), 3.9, 3.6) as (figure, axes):
        for axis, panel in zip(axes.flat, panels):
            axis.plot(panel.x.of(trajectory), panel.y.of(trajectory), color=REALISED, linewidth=0.7, alpha=0.4)
            axis.scatter(
                panel.x.of(truth), panel.y.of(truth), s=20, marker='x', color=REALISED, lw=1, label='what came'
            )
            for color, name, futures in zip(COLORS, names, samples):
                axis.scatter(panel.x.of(futures), panel.y.of(futures), s=9, color=color, alpha=0.6, label=name, lw=0)
            axis.plot(panel.x.of(state), panel.y.of(state), '*', color='black', markersize=13, label='the state')
            axis.set(xlabel=panel.x.label, ylabel=panel.y.label, title=panel.title)
            axis.grid(alpha=0.3)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=len(labels), fontsize=8, frameon=False)


def draw_strip(path, state_image, images, distances, names):
    """Pictures of sampled futures: images[k][m] (H, W, 3) under intention `names[k]`, with the distance from the sample
    to the state that is shown in its place."""
    columns = 1 + max(len(row) for row in images)
    with figure_file(path, len(images), columns, 1.75, 1.95) as (_, axes):
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[], frame_on=False)
        axes[0, 0].imshow(state_image)
        axes[0, 0].set_title('the state', fontsize=8)
        for row, color, name, pictures, away in zip(axes, COLORS, names, images, distances):
            for axis, picture, distance in zip(row[1:], pictures, away):
                axis.imshow(picture)
                axis.set_title(f'distance {distance:.1f}', fontsize=7)
            row[1].set_ylabel(name, color=color, fontsize=8)


def draw_intentions(path, points, explained, behaviour, episodes):
    """Intentions in the plane, points (B, 2), coloured by behaviour (`envs.state_views.Behaviour` of these rows) and by
    episode (B,); `explained` (2,): shares of the variance."""
    from matplotlib.ticker import MaxNLocator

    with figure_file(path, 1, 2, 5.6, 4.6, sharex=True, sharey=True) as (figure, axes):
        left, right = axes.flat
        if behaviour is None:
            left.set_axis_off()
        elif behaviour.names is None:
            mapped = left.scatter(*points.T, c=behaviour.values, s=8, cmap='viridis')
            figure.colorbar(mapped, ax=left, label=behaviour.title)
        else:
            for index in range(-1, len(behaviour.names)):
                # A puzzle has more objects than there are colours that everyone can tell apart.
                color = COLORS[index] if len(behaviour.names) < len(COLORS) else plots.pyplot().cm.tab20(index + 1)
                chosen = behaviour.values == index
                name = 'nothing more' if index < 0 else behaviour.names[index]
                if chosen.any():
                    left.scatter(*points[chosen].T, s=8, color=color, label=name, alpha=0.7)
            left.set_title(behaviour.title)
            left.legend(fontsize=8, markerscale=2)
        mapped = right.scatter(*points.T, c=episodes, s=8, cmap='cividis')
        figure.colorbar(mapped, ax=right, label='episode', ticks=MaxNLocator(integer=True))
        for axis in (left, right):
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.set(xlabel=f'first component ({explained[0]:.0%})', ylabel=f'second ({explained[1]:.0%})')


def draw_occupancy(path, steps, reports, metric, label):
    """One metric of `occupancy_report`s over the updates at which their checkpoints were saved."""
    with figure_file(path, 1, 1, 6.4, 3.8) as (_, axes):
        axis = axes[0, 0]
        for color, predictor in zip(COLORS, reports[0]):
            values = np.array([report[predictor][metric] for report in reports])
            errors = [report[predictor][f'{metric}_error'] for report in reports]
            style = 'o-' if predictor.startswith('flow') else 's:'
            axis.errorbar(steps, values, errors, fmt=style, color=color, capsize=3, label=predictor)
        axis.set(xlabel='updates', ylabel=label, ylim=(0, None), xticks=steps)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)


def draw_values(path, steps, rewards, curves, bands):
    """Values along an episode: curves {label: (T,)}, bands {label: (low (T,), high (T,))} around the curve of the same
    label; the rewards (T,) below."""
    with figure_file(path, 2, 1, 9.0, 2.6, sharex=True, height_ratios=(3, 1)) as (_, axes):
        axis, below = axes.flat
        colors = iter(COLORS)
        for label, values in curves.items():
            realised = label.startswith('realised')
            color = REALISED if realised else next(colors)
            axis.plot(steps, values, '--' if 'success' in label else '-', color=color, linewidth=1.4, label=label)
            if label in bands:
                axis.fill_between(steps, *bands[label], color=color, alpha=0.2, linewidth=0)
        axis.set_ylabel('discounted return')
        axis.legend(fontsize=8)
        below.plot(steps, rewards, color=REALISED, linewidth=1)
        below.set(xlabel='step of the episode', ylabel='reward')
        for each in (axis, below):
            each.grid(alpha=0.3)
