"""The comparison of exploring policies: coverage by hand, and the command on real, short episodes."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import exploration
from envs import exorl_episodes

ROOT = Path(__file__).resolve().parents[1]
CHEETAH_CELLS = 20 * 16 * 14


def test_a_coverage_curve_by_hand(tmp_path):
    """Three episodes of four steps: one cell, the same and a second one, a third one that is beyond the limit."""
    for index, speeds in enumerate(([0.5] * 5, [0.5, 0.5, 1.5, 1.5, 1.5], [9.5] * 5)):
        observation = np.zeros((5, 17), np.float32)
        observation[:, 8] = speeds
        exorl_episodes.write_episode(tmp_path, index, {'observation': observation, 'physics': np.zeros((5, 18))})
    transitions, visited = exploration.coverage_curve(tmp_path, 'cheetah', 11)
    assert transitions.tolist() == [4, 8]
    np.testing.assert_allclose(visited * CHEETAH_CELLS, [1, 2])
    np.testing.assert_allclose(exploration.coverage_curve(tmp_path, 'cheetah', 12)[1] * CHEETAH_CELLS, [1, 2, 3])


def test_the_table_gives_means_and_spreads():
    curves = {'jaco': {'random': [(None, np.array([0.1, 0.2])), (None, np.array([0.1, 0.4]))]}}
    assert exploration.table(curves).splitlines() == [
        '| visited cells, % | random |',
        '| --- | --- |',
        '| jaco (pinch site x, m, pinch site y, m, pinch site z, m; 3,072 cells) | 30.00 ± 14.14 |',
    ]


def test_systems_that_cannot_say_which_cores_a_process_has():
    program = (
        "import os, runpy, sys; os.__dict__.pop('sched_getaffinity', None); sys.argv = ['exploration', '--help']; "
        "runpy.run_module('benchmarks.exploration', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_command_collects_once_and_writes_figure_and_numbers(tmp_path):
    command = [
        sys.executable, '-m', 'benchmarks.exploration', '--domains=jaco', '--seeds=0,1', '--num_transitions=250',
        '--num_envs=1', '--workers=1', f'--exorl_dir={tmp_path}/data', f'--output={tmp_path}/out',
    ]  # fmt: skip
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert first.returncode == 0, first.stderr
    with open(tmp_path / 'out' / 'coverage.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['policy'], row['seed'], row['transitions']) for row in rows] == [
        (policy, seed, '250') for policy in ('random', 'ou', 'rnd') for seed in '01'
    ]
    assert all(0 < float(row['coverage']) < 0.2 for row in rows)
    assert first.stdout.count('| jaco (') == 1 and '| jaco (' in (tmp_path / 'out' / 'README.md').read_text()
    figure = (tmp_path / 'out' / 'coverage.png').read_bytes()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / 'data').rglob('episode_*.npz')}
    assert len(made) == 6
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0 and (tmp_path / 'out' / 'coverage.png').read_bytes() == figure
    assert {path: path.stat().st_mtime_ns for path in made} == made
