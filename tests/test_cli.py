"""How commands start: lists of numbers as flags, positional arguments, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMAND = """
from absl import flags
from utils import cli
cli.define_numbers('seeds', [0], 'Seeds.')
cli.define_numbers('rates', [0.5, 1], 'Rates.', minimum=0.1, kind=float)
cli.run(lambda _: print(flags.FLAGS.seeds, flags.FLAGS.rates, flags.FLAGS['rates'].serialize()))
"""


def run(*arguments):
    return subprocess.run([sys.executable, '-c', COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_numbers_are_a_rising_list_that_holds_each_once():
    assert run().stdout.split('\n')[0] == '[0] [0.5, 1.0] --rates=0.5,1.0'
    assert run('--seeds=3,0,3', '--rates=7').stdout.split('\n')[0] == '[0, 3] [7.0] --rates=7.0'


@pytest.mark.parametrize(
    ('argument', 'expected'),
    [
        ('--seeds=0,-1', 'expected numbers from 0 up, separated by commas'),
        ('--seeds=0.5', 'expected numbers from 0 up'),
        ('--seeds=', 'expected numbers from 0 up'),
        ('--rates=0.01', 'expected numbers from 0.1 up'),
        ('--rates=nan', 'expected numbers from 0.1 up'),
        ('--rates=1,inf', 'expected numbers from 0.1 up'),
        ('more', "unexpected argument 'more'"),
    ],
)
def test_what_a_flag_cannot_be_gets_one_line_and_exit_code_2(argument, expected):
    result = run(argument)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith('error: ') and expected in line


@pytest.mark.parametrize('module', ['utils.demo', 'utils.task_table', 'benchmarks.suite', 'benchmarks.techniques'])
def test_a_home_folder_is_looked_up_before_anything_is_done(module):
    """The shell leaves --output=~/x as it is."""
    command = [sys.executable, '-m', module, '--output=~no-such-user/x']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith('error: ~no-such-user/x: the home folder'), result.stderr


@pytest.mark.parametrize('module', ['benchmarks.occupancy', 'benchmarks.occupancy_limit', 'benchmarks.frozen_targets'])
def test_the_wrong_name_of_a_run_makes_no_folder(module, tmp_path):
    command = [sys.executable, '-m', module, tmp_path / 'typo']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith('error: ') and 'typo' in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())
