"""Figures of collected runs: what is drawn, at which heights, and the command as a process."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_runs import CUBE, write_run
from utils import figures, plots, results
from utils.collected_runs import collect

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def runs(tmp_path):
    """InFOM and IQL on two tasks, variants of InFOM in a number and in a choice on one of them."""
    base = {'agent.num_flow_goals': 16, 'agent.intention_encoder': 'variational'}
    write_run(tmp_path, 'g/a', {0: [0.0, 0.2, 0.2, 0.2], 1: [0.0, 0.6, 0.6, 0.6]}, settings=base)
    write_run(tmp_path, 'g/b', {0: [0.0, 0.9, 0.9, 0.9]}, settings=base, env_name=CUBE.format(2))
    write_run(tmp_path, 'g/c', {0: [0.0, 0.3, 0.3, 0.3], 1: [0.1, 0.1, 0.1, 0.1]}, agent='iql')
    write_run(tmp_path, 'g/d', {0: [0.0, 9.0, 9.0]}, agent='iql', env_name='walker_flip')
    for key, value in (('agent.num_flow_goals', 4), ('agent.intention_encoder', 'fb')):
        write_run(tmp_path, f'v/{value}', {0: [0.0, 0.5, 0.5, 0.5]}, settings={**base, key: value}, explicit=[key])
    return tmp_path


@pytest.fixture
def opened():
    """Figures to be closed when the test is over."""
    made = []
    yield made
    for figure in made:
        plots.close(figure)


def lines_of(axis):
    """{label: (x, y)} of the lines that have one."""
    return {
        line.get_label(): (line.get_xdata(), line.get_ydata())
        for line in axis.get_lines()
        if not line.get_label().startswith('_')
    }


def test_seeds_are_averaged_where_all_have_evaluations(opened):
    figure, (axis,) = plots.panels(1, columns=4, size=(3, 2))
    opened.append(figure)
    long, short = (np.array([0, 10, 20, 30]), np.array([1.0, 2, 3, 4])), (np.array([0, 20]), np.array([3.0, 7]))
    plots.draw_band(axis, [long, short], color='black', label='x')
    steps, means = lines_of(axis)['x']
    assert list(steps) == [0, 20]
    assert list(means) == [2, 5]
    (alone,) = [line for line in axis.get_lines() if line.get_label() != 'x']
    assert list(alone.get_xdata()) == [20, 30]  # what the longer one has beyond
    band = axis.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(5 + np.sqrt(8))  # standard deviation of 3 and 7, with n − 1
    other, (axis,) = plots.panels(1, columns=4, size=(3, 2))
    opened.append(other)
    plots.draw_band(axis, [long], color='black', label='x')
    assert not axis.collections, 'one seed has no band'


def test_no_common_step_is_no_mean(opened):
    figure, (axis,) = plots.panels(1, columns=4, size=(3, 2))
    opened.append(figure)
    plots.draw_band(axis, [(np.array([0, 10]), np.ones(2)), (np.array([5, 15]), np.ones(2))], color='black', label='x')
    assert 'x' not in lines_of(axis)


def test_bars_show_means_over_tasks_beside_the_published(runs, opened):
    figure = figures.domain_bars(figures.without_variants(collect(runs).curves))
    opened.append(figure)
    walker, cube = figure.axes
    assert cube.get_title() == 'cube-single (2 tasks)'
    # InFOM: 40 and 90. IQL lacks a task: no bar, but its published figure.
    assert [bar.get_height() for bar in cube.patches] == pytest.approx([65])
    assert sorted(y[0] for y in (line.get_ydata() for line in cube.get_lines()) if len(y) == 1) == [44.4, 77.7]
    assert [bar.get_height() for bar in walker.patches] == pytest.approx([6])


def test_own_data_have_panels_and_negative_bars(tmp_path, opened):
    settings = {'dataset': '/far/away/sorting.npz'}
    write_run(tmp_path, 'g/a', {0: [-4.0, -3.0, -2.0]}, env_name='Sorter-v0', settings=settings)
    write_run(tmp_path, 'g/b', {0: [0.0, 0.4, 0.5]})
    curves = collect(tmp_path).curves
    figure = figures.domain_bars(curves)
    opened.append(figure)
    cube, own = figure.axes
    assert own.get_title() == 'custom-sorting (1 task)' and own.get_ylim()[0] <= -3
    assert cube.get_ylim()[0] == 0
    files = {path.name for path in figures.draw_all(curves, tmp_path, ['png'])}
    assert files == {'domain_bars.png', 'curves_ogbench.png', 'curves_custom.png'}


def test_learning_curves_have_a_panel_for_each_task(runs, opened):
    figure = figures.learning_curves(collect(runs).curves)
    opened.append(figure)
    assert [axis.get_title() for axis in figure.axes] == ['walker flip', 'cube-single task1', 'cube-single task2']
    lines = lines_of(figure.axes[1])
    assert set(lines) == {'InFOM', 'InFOM num_flow_goals=4', 'InFOM intention_encoder=fb', 'IQL'}
    assert list(lines['InFOM'][1]) == pytest.approx([0, 40, 40, 40])
    assert list(lines['IQL'][1]) == pytest.approx([5, 20, 20, 20])


def test_variants_are_told_by_what_differs(runs):
    curves = collect(runs).curves
    assert {curve.method for curve in figures.without_variants(curves)} == {'InFOM', 'IQL'}
    ((agent, variants),) = figures.ablations(curves)
    assert agent == 'infom'
    assert {(curve.method, curve.env_name) for curve in variants} == {
        ('InFOM', CUBE.format(1)),
        ('InFOM intention_encoder=fb', CUBE.format(1)),
    }
    ((agent, setting, variants),) = figures.sensitivities(curves)
    assert (agent, setting) == ('infom', 'agent.num_flow_goals')
    assert {curve.settings[setting] for curve in variants} == {4, 16}
    assert {curve.env_name for curve in variants} == {CUBE.format(1)}


def test_a_sensitivity_is_over_the_same_other_settings_at_each_value(tmp_path):
    """Of a grid with a hole: α = 3 was not run with an expectile of 0.95, so that no mean has it at another α."""
    for alpha, expectile in ((3, 0.9), (10, 0.9), (10, 0.95), (30, 0.95), (30, 0.9)):
        settings = {'agent.alpha': alpha, 'agent.expectile': expectile}
        name = f'g/{alpha}-{expectile}'
        write_run(tmp_path, name, {0: [0.1, 0.1, 0.1]}, settings=settings, explicit=list(settings))
    shown = {setting: curves for _, setting, curves in figures.sensitivities(collect(tmp_path).curves)}
    assert [curve.run for curve in shown['agent.alpha']] == ['g/10-0.9', 'g/3-0.9', 'g/30-0.9']
    assert len(shown['agent.expectile']) == 4, 'both expectiles, at α = 10 and at α = 30'


@pytest.mark.parametrize('without', [{'agent.num_new': None}, {}])
def test_runs_without_a_number_that_others_have_are_variants_off_its_axis(tmp_path, opened, without):
    """Because it is None there, or because their code did not have it; the same from results.csv."""
    write_run(tmp_path, 'g/without', {0: [0.2, 0.2, 0.2]}, settings=without)
    for value in (4, 16):
        settings = {'agent.num_new': value}
        write_run(tmp_path, f'g/{value}', {0: [0.5, 0.5, 0.5]}, settings=settings, explicit=list(settings))
    collection = collect(tmp_path)
    results.write_results(collection, tmp_path / 'results.csv', ['*'])
    for curves in (collection.curves, results.load_curves(tmp_path / 'results.csv')):
        ((agent, setting, related),) = figures.sensitivities(curves)
        assert [curve.run for curve in related] == ['g/16', 'g/4']
        figure = figures.sensitivity_panels(agent, [(setting, related)])
        opened.append(figure)
        assert list(figure.axes[0].get_xticks()) == [4, 16]
        ((_, shown),) = figures.ablations(curves)
        assert {curve.run for curve in shown} == {'g/without', 'g/4', 'g/16'}


def test_a_training_under_several_names_counts_once_in_a_sensitivity(tmp_path):
    """Each sweep holds the default of the others under its own name."""
    base = {'agent.latent_dim': 512, 'agent.num_flow_goals': 16}
    for key, values in (('agent.latent_dim', (64, 512)), ('agent.num_flow_goals', (4, 16))):
        for value in values:
            settings = {**base, key: value}
            write_run(tmp_path, f'{key}/{value}', {0: [0.1] * 3, 1: [0.2] * 3}, settings=settings, explicit=[key])
    curves = collect(tmp_path).curves
    assert len(curves) == 8
    for _, setting, related in figures.sensitivities(curves):
        low, high = (64, 512) if setting == 'agent.latent_dim' else (4, 16)
        assert sorted((curve.settings[setting], curve.seed) for curve in related) == [
            (low, 0), (low, 1), (high, 0), (high, 1),
        ]  # fmt: skip
    assert list(figures.other_variants(curves)) == [], 'shown under one of its names'


def test_no_bar_for_other_tasks(tmp_path, opened):
    """Two methods with as many tasks, but not the same ones."""
    for agent, tasks in (('infom', (1, 2)), ('iql', (2, 3)), ('rebrac', (1, 2, 3))):
        for task in tasks:
            write_run(tmp_path, f'{agent}/{task}', {0: [0.5, 0.5]}, agent=agent, env_name=CUBE.format(task))
    figure = figures.domain_bars(collect(tmp_path).curves)
    opened.append(figure)
    assert figure.axes[0].get_title() == 'cube-single (3 tasks)'
    assert len(figure.axes[0].patches) == 1


def test_a_variant_in_a_number_and_a_choice_at_once_is_shown_with_the_others(runs):
    assert list(figures.other_variants(collect(runs).curves)) == []
    both = {'agent.num_flow_goals': 4, 'agent.intention_encoder': 'hilp'}
    write_run(runs, 'v/both', {0: [0.0, 0.5, 0.5, 0.5]}, settings=both, explicit=list(both), env_name=CUBE.format(3))
    ((agent, shown),) = figures.other_variants(collect(runs).curves)
    assert agent == 'infom'
    assert {'g/a', 'v/both', 'v/4', 'v/fb'} <= {curve.run for curve in shown}


def test_a_sensitivity_panel_by_hand(runs, opened):
    ((agent, setting, variants),) = figures.sensitivities(collect(runs).curves)
    figure = figures.sensitivity_panels(agent, [(setting, variants)])
    opened.append(figure)
    (axis,) = figure.axes
    (container,) = axis.containers
    assert list(container.lines[0].get_xdata()) == [4, 16]
    assert list(container.lines[0].get_ydata()) == pytest.approx([50, 40])


def test_colours_and_styles_tell_21_lines_apart():
    assert len({(plots.color(position), plots.style(position)) for position in range(21)}) == 21


def command(*arguments):
    return subprocess.run(
        [sys.executable, '-m', 'utils.figures', *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize('number', [1, 2, 5])
def test_a_legend_stays_inside_its_figure(number, opened):
    figure, (axis,) = plots.panels(1, columns=4, size=(3, 2.5))
    opened.append(figure)
    height = figure.get_size_inches()[1]
    for i in range(number):
        axis.plot([0, 1], [0, i], label=f'variant {i} (value_layer_norm=False, next_actions_across_episodes=True)')
    plots.legend(figure, [axis])
    figure.canvas.draw()
    (box,) = (legend.get_window_extent() for legend in figure.legends)
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    assert box.y0 >= 0 and box.height <= (figure.get_size_inches()[1] - height) * figure.dpi * 1.1


def test_the_command_writes_vector_and_png_files(runs, tmp_path):
    result = command(runs, f'--output={tmp_path / "out"}', '--formats=svg,png,pdf')
    assert result.returncode == 0, result.stderr
    assert 'Warning' not in result.stderr
    names = ('ablation_infom', 'curves_exorl', 'curves_ogbench', 'domain_bars', 'sensitivity_infom')
    files = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert files == sorted(f'{name}.{form}' for name in names for form in ('pdf', 'png', 'svg'))
    for form, magic in (('pdf', b'%PDF'), ('png', b'\x89PNG'), ('svg', b'<?xml')):
        assert (tmp_path / 'out' / f'domain_bars.{form}').read_bytes().startswith(magic)


def test_bad_input_ends_with_one_line_and_exit_code_2(runs, tmp_path):
    results.write_results(collect(runs), tmp_path / 'cut.csv', ['*'])
    (tmp_path / 'cut.csv').write_bytes((tmp_path / 'cut.csv').read_bytes()[:-30])
    (tmp_path / 'empty').mkdir()
    for arguments, message in (
        ([tmp_path / 'empty'], 'no run in'),
        ([tmp_path / 'cut.csv'], 'cut.csv is cut off inside its last line'),
        ([tmp_path, '--formats=bmp'], '--formats=bmp: expected some of pdf, svg, png'),
        ([tmp_path / 'absent.csv'], 'absent.csv is not a directory'),
    ):
        result = command(*arguments)
        assert result.returncode == 2
        assert result.stderr.count('\n') == 1
        assert message in result.stderr
