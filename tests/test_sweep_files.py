"""The sweep files: valid for wandb, every combination a run that main.py accepts, the published values all there; and
how a file expands.

The schema is that of wandb's package `sweeps`, whose name our folder shares: it is read as a file, and never imported.
"""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from absl import flags

import agents
import envs
from sweeps import run as sweep_run
from sweeps.sweep_files import LONGEST_NAME, expand, parse_flags, read_sweep, run_name
from utils.errors import UserError
from utils.flags import define_flags, resolve_settings
from utils.presets import published_table
from utils.run_config import flag_fields

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / 'sweeps').glob('*.yaml'))
SCHEMA = json.loads(
    Path(importlib.metadata.distribution('sweeps').locate_file('sweeps/config/schema.json')).read_text()
)
SUITES = {True: 'ogbench', False: 'exorl'}  # by whether the task's name has 'singletask'


def every_file(test):
    return pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)(test)


# ------------------------------------------------------------------------------------------------------- the files


@every_file
def test_wandb_takes_the_file(path):
    content = yaml.safe_load(path.read_text())
    jsonschema.Draft7Validator(SCHEMA).validate(content)
    assert content['name'] == path.stem
    assert content['command'][-2:] == ['${args}', '--wandb_mode=online']
    assert content['command'][2:4] == ['-m', 'sweeps.run']


def test_the_schema_refuses_what_wandb_would():
    content = yaml.safe_load(FILES[0].read_text())
    for damage in ({'method': 'gird'}, {'parameters': {'seed': {'valeus': [1]}}}, {'parameters': {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft7Validator(SCHEMA).validate(content | damage)


@every_file
def test_every_run_is_one_that_main_accepts(path):
    """Each flag exists, with a value that the run's agent and task take: each value of the grid once."""
    runs = expand(path)
    assert len({run.label for run in runs}) == len(runs)
    seen = set()
    for run in runs:
        new = {(run.flags['agent'], key, value) for key, value in run.flags.items() if key != 'run_name'} - seen
        if not new:
            continue
        seen |= new
        values = flags.FlagValues()
        argv = run.command()[1:]
        define_flags(values, argv)
        values(argv)
        config = resolve_settings(values)
        assert str(config.run_dir) == str(run.directory)
        assert all(config.agent[key.removeprefix('agent.')] == value for key, value in run.flags.items() if '.' in key)


def test_the_metric_is_one_that_runs_log():
    for path in FILES:
        assert read_sweep(path)['metric'] in (
            {'name': f'evaluation/episode.{name}', 'goal': 'maximize'} for name in ('success', 'return')
        )


@pytest.mark.parametrize('suite', SUITES.values())
@pytest.mark.parametrize('agent', agents.available())
def test_a_tuning_grid_has_every_published_value_of_its_suite(agent, suite):
    parameters = read_sweep(ROOT / 'sweeps' / f'{agent}_{suite}.yaml')['parameters']
    domains = {envs.task_spec(task).domain for task in parameters['env_name']['values']}
    assert len(domains) == len(parameters['env_name']['values']) == 4
    for name, parameter in parameters.items():
        if name.startswith('agent.'):
            published = {
                row[name.removeprefix('agent.')]
                for (row_agent, task), row in published_table().items()
                if row_agent == agent and SUITES['singletask' in task] == suite and not task.startswith('visual-')
                and name.removeprefix('agent.') in row
            }  # fmt: skip
            assert published and published <= set(parameter['values']), name


def test_the_reproduction_is_every_agent_on_every_task():
    runs = [run for name in ('', '_visual') for run in expand(ROOT / 'sweeps' / f'reproduction{name}.yaml')]
    pairs = {(Path(run.flags['agent']).stem, run.flags['env_name']): run.flags['num_seeds'] for run in runs}
    visual = {task for task in envs.TASKS if task.startswith('visual-')}
    assert set(pairs) == {
        (agent, task) for agent in agents.available() for task in envs.TASKS
        if not (agent == 'mbpo_rebrac' and task in visual)  # which is for states only
    }  # fmt: skip
    assert len(runs) == len(pairs) == 36 * 9 + 4 * 8
    assert all(count == (4 if task in visual else 8) for (_, task), count in pairs.items())
    assert {run.flags['run_group'] for run in runs} == {'reproduction'}


# ------------------------------------------------------------------------------------------------------- expanding


@pytest.fixture
def sweep(tmp_path):
    """sweep(**top-level keys) → a file with two tasks and two values of α."""

    def write(**keys):
        content = {
            'name': 'tiny',
            'method': 'grid',
            'parameters': {
                'env_name': {'values': ['walker_run', 'walker_flip']},
                'agent.alpha': {'values': [1, 30.0]},
                'seed': {'value': 2},
            },
        }
        path = tmp_path / 'file.yaml'
        path.write_text(yaml.safe_dump(content | keys, sort_keys=False))
        return path

    return write


def test_a_grid_expands_in_order_with_stable_names(sweep):
    runs = expand(sweep())
    assert [run.label for run in runs] == [
        'tiny/walker_run_infom_alpha=1_sd2',
        'tiny/walker_run_infom_alpha=30_sd2',
        'tiny/walker_flip_infom_alpha=1_sd2',
        'tiny/walker_flip_infom_alpha=30_sd2',
    ]
    assert runs[0].command('python')[:5] == [
        'python', 'main.py', '--env_name=walker_run', '--agent.alpha=1', '--seed=2'
    ]  # fmt: skip


def test_overrides_replace_and_merge(sweep):
    runs = expand(sweep(), parse_flags(['--agent.alpha=3', 'preset=small', 'save_dir=elsewhere', 'num_seeds=4']))
    assert [str(run.directory) for run in runs] == [
        'elsewhere/tiny/walker_run_infom_alpha=3,preset=small_sd2-5',
        'elsewhere/tiny/walker_flip_infom_alpha=3,preset=small_sd2-5',
    ]


def test_the_name_is_in_the_settings_alone():
    flags_of_run = {'env_name': 'walker_run', 'agent': 'agents/iql.py', 'agent.alpha': 3.0, 'preset': 'small'}
    name = run_name(flags_of_run)
    assert name == 'walker_run_iql_alpha=3,preset=small_sd0'
    assert run_name(dict(reversed(flags_of_run.items())) | {'save_dir': 'x', 'wandb_mode': 'online'}) == name
    assert run_name(flags_of_run | {'agent.alpha': 3}) == name
    assert run_name(flags_of_run | {'agent.alpha': 4}) != name
    long = [
        run_name(flags_of_run | {f'agent.{"x" * 200}': value, 'seed': seed}) for value in (1, 2) for seed in (0, 11)
    ]
    assert {len(name) for name in long} == {LONGEST_NAME}
    assert len(set(long)) == 4
    assert [name.rpartition('_')[2] for name in long] == ['sd0', 'sd11', 'sd0', 'sd11']  # --only='sd0$' finds them.


def test_numbers_are_numbers_however_they_are_written(sweep):
    """YAML takes 1e-3 for text."""
    (run,) = expand(sweep(parameters={'agent.lr': {'values': ['1e-3']}}))
    assert run.flags['agent.lr'] == parse_flags(['agent.lr=1e-3'])['agent.lr'] == 0.001
    assert run.flags['run_name'] == 'infom_lr=0.001_sd0'


def test_folders_may_have_numbers_for_names(sweep):
    parameters = {'env_name': {'value': 'walker_run'}, 'run_name': {'values': [7, '1e3']}, 'dataset_dir': {'value': 8}}
    runs = expand(sweep(name=20261128, parameters=parameters | {'save_dir': {'value': 3}}))
    assert [str(run.directory) for run in runs] == ['3/20261128/7', '3/20261128/1e3']
    assert runs[0].flags['dataset_dir'] == '8'
    overrides = parse_flags(['run_group=007', '--save_dir=20261128']) | {'dataset_dir': '9'}
    (run, _) = expand(sweep(parameters=parameters), overrides)
    assert (str(run.directory), run.flags['dataset_dir']) == ('20261128/007/7', '9')


def test_runs_that_restore_other_checkpoints_have_other_names(sweep):
    runs = expand(sweep(parameters={'restore_path': {'values': ['exp/a', 'exp/b']}}))
    assert [run.flags['run_name'] for run in runs] == ['infom_restore_path=exp-a_sd0', 'infom_restore_path=exp-b_sd0']


def test_wandb_runs_have_the_names_of_the_launcher(sweep):
    run = expand(sweep())[1]
    # As wandb's agent hands them on: sorted, numbers as its server gives them back.
    line = sweep_run.command(['--agent.alpha=30', '--env_name=walker_run', '--seed=2', '--wandb_mode=online'])
    assert line[1] == 'main.py'
    assert line[-1] == f'--run_name={run.flags["run_name"]}'


def test_wandb_may_write_booleans_without_a_value():
    given = ['--agent.clip_flow_goals', '--noagent.value_layer_norm', '--eval_async', '--env_name=walker_run']
    line = sweep_run.command(given)
    assert line[2:-1] == given
    assert line[-1] == '--run_name=walker_run_infom_clip_flow_goals=True,value_layer_norm=False_sd0'
    assert not any(name.startswith('no') for name in flag_fields())  # Which '--noname' would take for False.


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('foo', "error: 'foo' is no setting: expected name=value, as in preset=small"),
        ('--num_seeds=two', 'error: --num_seeds=two: expected one whole number'),
        ('--num_seeds', 'error: --num_seeds=True: expected one whole number'),
    ],
)
def test_bad_input_from_wandb_is_one_line_and_exit_code_2(argument, message):
    command = [sys.executable, '-m', 'sweeps.run', '--env_name=walker_run', argument]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(message)
    assert result.stderr.count('\n') == 1


@pytest.mark.parametrize(
    ('keys', 'message'),
    [
        ({'parameters': {'agent.alhpa': {'value': 1}}}, '--agent.alhpa is no flag of main.py'),
        ({'parameters': {'sede': {'value': 1}}}, '--sede is no flag of main.py'),
        ({'parameters': {'agent': {'value': 'agents/imfom.py'}}}, 'did you mean infom'),
        ({'parameters': {'seed': {'min': 0, 'max': 1}}}, 'parameter seed is'),
        ({'parameters': {'seed': {'values': []}}}, 'has no list of values'),
        ({'parameters': None}, 'is no sweep file'),
        ({'parameters': {3: {'value': 3}}}, 'has a parameter 3: expected the name of a flag'),
        ({'parameters': {'run_group': {'value': None}}}, 'parameter run_group has no value'),
        ({'parameters': {'save_dir': {'values': ['exp', None]}}}, 'parameter save_dir has no value'),
        ({'program': ['main.py']}, "has program ['main.py']: expected the name of a file"),
        ({'method': 'bayes'}, "method 'bayes': only grids"),
        ({'parameters': {'seed': {'value': '0,1'}}}, '--seed=0,1: expected one whole number'),
        ({'parameters': {'num_seeds': {'value': 'three'}}}, '--num_seeds=three: expected one whole number'),
        ({'parameters': {'run_name': {'value': 'x'}, 'seed': {'values': [0, 1]}}}, 'differ in --seed are all called'),
    ],
)
def test_a_file_that_is_no_grid_of_flags_is_refused(sweep, keys, message):
    with pytest.raises(UserError) as error:
        expand(sweep(**keys))
    assert message in str(error.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match='cannot read'):
        read_sweep(tmp_path / 'absent.yaml')
    (tmp_path / 'broken.yaml').write_text('a: [')
    with pytest.raises(UserError, match='cannot read'):
        read_sweep(tmp_path / 'broken.yaml')
    with pytest.raises(UserError, match="'seed' is no setting"):
        parse_flags(['seed'])


def test_printing_needs_no_simulator_and_no_data():
    result = subprocess.run(
        [sys.executable, '-m', 'sweeps.launch', 'sweeps/infom_gpi.yaml', '--backend=print', '--set=preset=small'],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert all(line.startswith('python main.py --') and '--preset=small' in line for line in lines)


def test_printing_into_a_pipe_that_closes_ends_without_a_word():
    command = [sys.executable, '-m', 'sweeps.launch', 'sweeps/infom_gpi.yaml', '--backend=print']
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b''
