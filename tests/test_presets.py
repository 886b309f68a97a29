"""Presets and the table of published settings, and the registry of agents that they are looked up with."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

import agents
import envs
from utils import presets
from utils.errors import UserError
from utils.run_config import check_agent, check_flags, flag_fields

ROOT = Path(__file__).resolve().parent.parent
BASELINES = ('crl_infonce', 'dino_rebrac', 'fb_iql', 'hilp_iql', 'infom', 'iql', 'mbpo_rebrac', 'rebrac', 'td_infonce')
STATES_ONLY = ('mbpo_rebrac',)
SCENE = 'scene-play-singletask-task1-v0'
VISUAL = 'visual-scene-play-singletask-task1-v0'

# ------------------------------------------------------------------------------------------------------- the table


def test_table_holds_every_cell_of_the_file_and_the_later_of_two_rows():
    with presets.TABLE_PATH.open(newline='') as file:
        rows = list(csv.reader(file))
    header, *body = rows
    assert header == ['agent', 'env_name', *presets.COLUMN_TYPES]
    last = {tuple(row[:2]): dict(zip(header[2:], row[2:], strict=True)) for row in body}
    assert len(last) < len(body)
    table = presets.published_table()
    assert table.keys() == last.keys()
    for key, cells in last.items():
        filled = {name: text for name, text in cells.items() if text}
        assert table[key].keys() == filled.keys()
        for name, text in filled.items():
            value = table[key][name]
            assert type(value) is presets.COLUMN_TYPES[name]
            assert (
                value == float(text) if isinstance(value, (int, float)) and text != str(value) else str(value) == text
            )


def test_table_covers_the_tasks_of_every_agent():
    state_tasks = [name for name in envs.TASKS if not name.startswith('visual-')]
    table = presets.published_table()
    assert {agent for agent, _ in table} == set(BASELINES)
    assert {task for _, task in table} == set(envs.TASKS)
    for agent in BASELINES:
        assert {(agent, task) for task in state_tasks} <= table.keys()


def test_spot_values():
    """Values read off the published table by eye."""
    settings, task = presets.published_settings('infom', 'cube-single-play-singletask-task3-v0')
    assert task == 'cube-single-play-singletask-task3-v0'
    assert settings == {
        'obs_norm_type': 'normal',
        'alpha': 30.0,
        'expectile': 0.95,
        'kl_weight': 0.05,
        'latent_dim': 512,  # the later row; the earlier one says 64
        'num_flow_goals': 16,
        'clip_flow_goals': True,
        'critic_latent_type': 'prior',
        'value_layer_norm': True,
    }
    assert presets.published_settings('infom', 'puzzle-4x4-play-singletask-task5-v0')[0]['clip_flow_goals'] is False
    assert 'clip_flow_goals' not in presets.published_settings('infom', 'quadruped_jump')[0]
    assert presets.published_settings('rebrac', 'walker_walk')[0] == {
        'obs_norm_type': 'normal',
        'alpha_actor': 0.1,
        'alpha_critic': 10.0,
    }


@pytest.mark.parametrize(('domain', 'task'), presets.DEFAULT_TASKS.items())
def test_a_name_without_a_number_takes_the_default_task_of_the_simulator(domain, task):
    import gymnasium
    import ogbench  # noqa: F401  registers the environments

    name = f'{domain}-play-singletask-v0'
    numbered = f'{domain}-play-singletask-task{task}-v0'
    assert presets.task_with_number(name) == numbered
    assert presets.published_settings('fb_iql', name) == presets.published_settings('fb_iql', numbered)
    env = gymnasium.make(envs.task_spec(name).env_id)
    assert env.unwrapped._reward_task_id == task
    env.close()


def test_names_without_a_row():
    assert presets.published_settings('infom', 'my-own-task-v0') == ({}, '')
    assert presets.published_settings('hilp_iql', VISUAL) == ({}, '')
    assert presets.task_with_number('walker_run') == 'walker_run'
    # Image domains: the default task's number has no row, task 1 has.
    assert presets.published_settings('infom', 'visual-cube-double-play-singletask-v0')[1].endswith('task1-v0')


# --------------------------------------------------------------------------------------------------------- presets


def resolved_config(agent_name, env_name, preset):
    """(flags, agent config) as a run gets them, through the agent's own types."""
    settings = presets.resolve(agent_name, env_name, preset)
    config = agents.load(agent_name).get_config()
    config.lock()
    config.update(settings.agent)  # An unknown key or another type raises here.
    return settings, config


@pytest.mark.parametrize('preset', presets.PRESETS)
@pytest.mark.parametrize('agent_name', agents.available())
def test_every_row_fits_its_agent(agent_name, preset):
    defaults = {name: field.default for name, field in flag_fields().items()}
    for env_name in envs.TASKS:
        settings, config = resolved_config(agent_name, env_name, preset)
        row, _ = presets.published_settings(agent_name, env_name)
        assert set(row) - set(presets.RUN_COLUMNS) <= set(config)
        assert settings.source.keys() == settings.flags.keys() | {f'agent.{key}' for key in settings.agent}
        check_flags(defaults | settings.flags, envs.task_spec(env_name))
        check_agent(config)
        if env_name.startswith('visual-') and agent_name in STATES_ONLY:
            with pytest.raises(UserError, match='states, not on images'):
                agents.load(agent_name).validate_config(config)
            continue
        agents.load(agent_name).validate_config(config)
        frequency = config.get('actor_freq', 1)
        for name in ('pretraining_steps', 'finetuning_steps', 'eval_interval', 'save_interval'):
            assert settings.flags[name] % settings.flags['log_interval'] == 0
        assert settings.flags['log_interval'] % frequency == 0


def test_paper():
    settings, config = resolved_config('infom', SCENE, 'paper')
    assert settings.flags['pretraining_steps'] == 1_000_000
    assert settings.flags['eval_episodes'] == 50
    assert (config.alpha, config.expectile, config.kl_weight, config.latent_dim) == (300.0, 0.99, 0.2, 128)
    assert config.value_hidden_dims == (512,) * 4
    assert settings.source['agent.alpha'] == f'published table, infom on {SCENE}'
    assert settings.source['pretraining_steps'] == 'published protocol, states'
    assert 'agent.value_hidden_dims' not in settings.source


def test_paper_on_images():
    settings, config = resolved_config('infom', VISUAL, 'paper')
    expected = {'pretraining_steps': 250_000, 'finetuning_steps': 100_000, 'eval_interval': 10_000, 'p_aug': 0.5}
    assert settings.flags | expected == settings.flags
    assert (settings.flags['frame_stack'], settings.flags['obs_norm_type']) == (3, 'none')
    assert (config.encoder, config.clip_flow_goals, config.alpha) == ('impala_small', False, 300.0)


def test_small_keeps_the_published_coefficients():
    settings, config = resolved_config('infom', SCENE, 'small')
    assert (config.alpha, config.expectile) == (300.0, 0.99)
    assert config.latent_dim == presets.PRESETS['small'].agent['latent_dim']
    assert settings.source['agent.latent_dim'] == settings.source['pretraining_steps'] == 'preset small'
    widths = {key: value for key, value in config.items() if key.endswith('hidden_dims')}
    assert set(widths.values()) == {(256, 256)}
    assert len(widths) >= 4


def test_a_preset_may_set_one_agent_apart():
    """InFOM's targets follow faster than those of the others."""
    taus = {name: resolved_config(name, SCENE, 'small')[1].tau for name in ('infom', 'iql', 'fb_iql')}
    assert taus == {'infom': 0.05, 'iql': 0.02, 'fb_iql': 0.02}
    assert resolved_config('infom', VISUAL, 'small')[1].tau == 0.05
    assert resolved_config('crl_infonce', SCENE, 'small')[1].reward_weight_decay == 1.0
    assert resolved_config('crl_infonce', SCENE, 'paper')[1].reward_weight_decay == 0.0


def test_smoke_is_tiny():
    settings, config = resolved_config('infom', VISUAL, 'smoke')
    assert settings.flags['pretraining_steps'] + settings.flags['finetuning_steps'] <= 100
    assert all(value == (64, 64) for key, value in config.items() if key.endswith('hidden_dims'))
    assert (config.encoder, config.batch_size) == ('impala_debug', 32)


def test_settings_that_an_agent_lacks_are_passed_over():
    settings = presets.resolve('iql', SCENE, 'small', agent_keys=('alpha', 'expectile', 'actor_hidden_dims'))
    assert settings.agent == {'alpha': 1.0, 'expectile': 0.99, 'actor_hidden_dims': (256, 256)}


def test_a_task_outside_the_table_gets_the_protocol():
    settings = presets.resolve('infom', 'my-own-task-v0')
    assert settings.flags == presets.STATE_PROTOCOL
    assert settings.agent == {}


def test_unknown_preset():
    with pytest.raises(UserError, match=r"unknown preset 'tiny': expected one of paper, published, small, smoke"):
        presets.resolve('infom', SCENE, 'tiny')


def test_command_prints_values_and_sources():
    command = [sys.executable, '-m', 'utils.presets', '--agent=infom', f'--env_name={SCENE}', '--agent.tau=0.01']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=2) for line in result.stdout.splitlines() if line.count(' ') > 1]
    table = {line[0]: line[1:] for line in lines}
    assert table['agent.alpha'] == ['300.0', f'published table, infom on {SCENE}']
    assert table['agent.tau'] == ['0.01', 'command line']
    assert table['agent.discount'] == ['0.99', 'default']
    assert table['finetuning_steps'] == ['500000', 'published protocol, states']
    assert flag_fields().keys() <= {line.split()[0] for line in result.stdout.splitlines()}


# -------------------------------------------------------------------------------------------------------- registry


def test_agents_are_found_by_name_and_path():
    assert 'infom' in agents.available()
    assert 'common' not in agents.available(), 'what agents share is no agent'
    for spelling in ('infom', 'infom.py', 'agents/infom.py', './agents/infom.py', str(ROOT / 'agents' / 'infom.py')):
        assert agents.resolve(spelling) == 'infom'
        assert agents.load(spelling).get_config().agent_name == 'infom'


def test_published_names_are_aliases(monkeypatch, tmp_path):
    folder = tmp_path / 'agents'
    folder.mkdir()
    for name in ('fb_iql', 'hilp_iql'):
        (folder / f'{name}.py').write_text('def get_config():\n    return None\n')
    monkeypatch.setattr(agents, 'FOLDER', folder)
    assert (agents.resolve('fb_repr'), agents.resolve('agents/hilp.py')) == ('fb_iql', 'hilp_iql')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('infmo', 'did you mean infom'),
        ('agents/nope.py', 'expected one of .*infom'),
        ('elsewhere/infom.py', 'nowhere else.*did you mean infom'),
        ('infom.txt', 'did you mean infom'),
        ('', 'expected one of'),
    ],
)
def test_unknown_agents(name, message):
    with pytest.raises(UserError, match=message):
        agents.resolve(name)


def test_the_registry_imports_no_agent():
    code = 'import sys, agents; agents.available(); sys.exit("jax" in sys.modules or "agents.infom" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)
