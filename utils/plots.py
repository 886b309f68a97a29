"""Figures from `metrics.jsonl` files. Matplotlib is imported when a figure is drawn, with a backend that needs no
display."""

from pathlib import Path

import numpy as np

from utils.runs import atomic_path, read_metrics

# Okabe and Ito's colours, distinguishable with any colour vision.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')


def read_curve(run_directory, metric, seed, phase=None):
    """(steps, values) of one metric of one seed, in the order of the log; rows without the metric are passed over."""
    rows = [
        (row['step'], row[metric])
        for row in read_metrics(Path(run_directory) / 'metrics.jsonl')
        if row['seed'] == seed and row.get(metric) is not None and phase in (None, row['phase'])
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
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(17, 3.8), constrained_layout=True)
    panels = [
        ('success rate', {'evaluation/episode.success': '-'}),
        ('return', {'evaluation/episode.return': '-'}),
        ('flow loss (dashed: validation)', {'training/flow_loss': '-', 'validation/flow_loss': '--'}),
        ('Q (dashed: target)', {'training/q_mean': '-', 'training/q_target_mean': '--'}),
    ]
    for axis, (name, metrics) in zip(axes, panels, strict=True):
        for color, (label, members) in zip(COLORS, runs.items(), strict=False):
            for metric, style in metrics.items():
                curves = [read_curve(directory, metric, seed) for directory, seed in members]
                curves = [curve for curve in curves if len(curve[0])]
                if not curves:
                    continue
                for steps, values in curves if len(curves) > 1 else []:
                    axis.plot(steps, values, style, color=color, alpha=0.3, linewidth=0.8)
                length = min(len(steps) for steps, _ in curves)
                stacked = np.stack([values[:length] for _, values in curves])
                steps, mean, std = curves[0][0][:length], stacked.mean(axis=0), stacked.std(axis=0)
                axis.plot(steps, mean, style, color=color, linewidth=2, label=label if style == '-' else None)
                if len(curves) > 1:
                    axis.fill_between(steps, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        axis.set_xlabel('updates')
        axis.set_title(name)
        axis.grid(alpha=0.3)
    for (name, value), color in zip((reference or {}).items(), COLORS[3:], strict=False):
        axes[0].axhline(value, color=color, linestyle=':', label=name)
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].legend(frameon=False)
    axes[2].set_yscale('log')
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
