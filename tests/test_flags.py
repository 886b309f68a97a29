"""Flags, presets and defaults becoming one checked run; intervals; JAX's set-up; the exit codes of a real process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import FrozenConfigDict

import agents
from utils.errors import UserError
from utils.flags import PHASES, append_xla_flags, avoid_crash_on_images, define_flags, resolve_settings, with_host
from utils.intervals import fit_intervals, largest_divisor
from utils.run_config import OPERATIONAL_FLAGS, flag_fields

ROOT = Path(__file__).resolve().parent.parent
TASK = 'cube-single-play-singletask-task1-v0'
VISUAL = 'visual-cube-single-play-singletask-task1-v0'


def parse(*arguments, env_name=TASK, phases=PHASES):
    """The run that a command line asks for."""
    values = flags.FlagValues()
    argv = ['main.py', *([f'--env_name={env_name}'] if env_name else []), *arguments]
    define_flags(values, argv)
    values(argv)
    return resolve_settings(values, phases)


# ------------------------------------------------------------------------------------------------------ what wins


def test_explicit_over_preset_over_published_over_default():
    config = parse('--preset=small', '--eval_episodes=7', '--agent.alpha=3', '--agent.latent_dim=16')
    assert (config.eval_episodes, config.sources['eval_episodes']) == (7, 'command line')
    assert (config.agent.alpha, config.sources['agent.alpha']) == (3.0, 'command line')
    assert (config.agent.latent_dim, config.sources['agent.latent_dim']) == (16, 'command line')
    assert (config.agent.num_flow_goals, config.sources['agent.num_flow_goals']) == (4, 'preset small')
    assert (config.agent.expectile, config.sources['agent.expectile']) == (0.95, f'published table, infom on {TASK}')
    assert (config.agent.discount, config.sources['agent.discount']) == (0.99, 'default')


def test_an_explicit_value_equal_to_the_default_is_explicit():
    """The default of latent_dim, 512, given by hand beats the preset's 64."""
    assert parse('--preset=small', '--agent.latent_dim=512').agent.latent_dim == 512


def test_every_value_has_a_source():
    config = parse()
    assert config.sources.keys() == flag_fields().keys() | {f'agent.{key}' for key in config.agent}
    assert config.preset == 'paper'
    assert config.pretraining_steps == 1_000_000


@pytest.mark.parametrize('spelling', ['(32, 16)', '[32, 16]', '32,16'])
def test_tuples(spelling):
    assert parse(f'--agent.actor_hidden_dims={spelling}').agent.actor_hidden_dims == (32, 16)


def test_other_types_of_agent_settings():
    config = parse(
        '--agent.actor_lr=1e-3', '--noagent.clip_flow_goals', '--agent.const_std=false', '--agent.q_agg=mean',
        '--agent.value_hidden_dims=32', '--agent.encoder=none',
    )  # fmt: skip
    assert (config.agent.actor_lr, config.agent.q_agg, config.agent.encoder) == (1e-3, 'mean', None)
    assert (config.agent.clip_flow_goals, config.agent.const_std) == (False, False)
    assert config.agent.value_hidden_dims == (32,)
    assert parse('--agent.encoder=impala', env_name=VISUAL).agent.encoder == 'impala'


@pytest.mark.parametrize('agent', agents.available())
def test_none_is_a_value_of_every_setting_whose_default_it_is(agent):
    config = agents.load(agent).get_config()
    names = [name for name, value in config.items() if value is None]
    values = flags.FlagValues()
    argv = ['main.py', f'--agent={agent}', *(f'--agent.{name}={none}' for none in ('none', 'None') for name in names)]
    define_flags(values, argv)
    values(argv)
    assert {'actor_lr', 'schedule_steps'} <= set(names)
    assert all(values[f'agent.{name}'].present and values[f'agent.{name}'].value is None for name in names)


def test_none_takes_the_place_of_a_published_value_or_a_presets():
    config = parse('--agent.num_critic_latents=None', '--agent.critic_layer_norm=none', '--agent.actor_lr=None')
    assert (config.agent.num_critic_latents, config.agent.critic_layer_norm, config.agent.actor_lr) == (None,) * 3
    assert config.sources['agent.critic_layer_norm'] == 'command line'
    assert parse('--agent.critic_layer_norm').agent.critic_layer_norm is True
    assert parse('--noagent.critic_layer_norm').agent.critic_layer_norm is False
    assert parse('--agent.critic_layer_norm=false').agent.critic_layer_norm is False


def test_the_order_of_flags_does_not_matter():
    assert parse('--agent.alpha=3', '--agent', 'infom').agent.alpha == 3.0
    assert parse('--agent=infom', '--agent.alpha=3', '--preset=smoke').agent.batch_size == 32


def test_flags_from_a_file(tmp_path):
    file = tmp_path / 'flags'
    file.write_text('--agent=agents/infom.py\n--agent.alpha=3\n--seed=4\n')
    config = parse(f'--flagfile={file}')
    assert (config.agent.alpha, config.seed) == (3.0, 4)


def test_images_take_their_own_protocol():
    config = parse(env_name=VISUAL)
    assert (config.frame_stack, config.p_aug, config.obs_norm_type) == (3, 0.5, 'none')
    assert (config.agent.encoder, config.agent.clip_flow_goals) == ('impala_small', False)


def test_encoders_fit_the_observations():
    for flag in ('--agent.encoder=none', '--agent.encoder=mlp'):
        with pytest.raises(UserError, match=r'has images.*impala_small'):
            parse(flag, env_name=VISUAL)
    for clip in (True, False):  # With which InFOM takes no encoder: not what is wrong here.
        with pytest.raises(UserError, match=r'has state observations; use for instance none$'):
            parse('--agent.encoder=impala', f'--agent.clip_flow_goals={clip}')
        with pytest.raises(UserError, match=r'has images; use for instance impala_small$'):
            parse('--agent.encoder=mlp', f'--agent.clip_flow_goals={clip}', env_name=VISUAL)
    with pytest.raises(UserError, match='clip_flow_goals=True with an encoder'):
        parse('--agent.clip_flow_goals=True', env_name=VISUAL)


def test_dino_has_an_encoder_of_states():
    assert parse('--agent=dino_rebrac').agent.encoder == 'mlp'
    with pytest.raises(UserError, match=r'encoder=impala_small: .* has state observations; use for instance mlp$'):
        parse('--agent=dino_rebrac', '--agent.encoder=impala_small')
    with pytest.raises(UserError, match=r'use mlp for states'):
        parse('--agent=dino_rebrac', '--agent.encoder=none')
    with pytest.raises(UserError, match=r'encoder=None: .* has images; use for instance impala_small$'):
        parse('--agent=dino_rebrac', '--agent.encoder=none', env_name=VISUAL)


@pytest.mark.parametrize('agent', ['iql', 'dino_rebrac'])
def test_an_encoder_that_does_not_exist_is_refused_before_anything_starts(agent):
    with pytest.raises(UserError, match="unknown encoder 'foo': expected one of impala"):
        parse(f'--agent={agent}', '--agent.encoder=foo', env_name=VISUAL)


def test_versions_of_jaxlib_that_crash_on_images_get_an_option(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '--xla_one=1')
    for version, expected in (
        ('0.12.0', '--xla_one=1'),  # It may not know the option, and would refuse to start.
        ('0.10.2', '--xla_one=1 --xla_cpu_experimental_ynn_fusion_type='),
    ):
        monkeypatch.setattr('importlib.metadata.version', {'jaxlib': version}.get)
        avoid_crash_on_images()
        assert os.environ['XLA_FLAGS'] == expected


def test_where_a_run_is_written():
    config = parse('--preset=smoke', '--seed=3', '--save_dir=~/runs')
    assert config.run_dir == Path.home() / 'runs' / 'smoke' / f'{TASK}_infom_sd3'
    assert parse('--run_group=g', '--run_name=n').run_dir == Path('exp/g/n')
    with pytest.raises(UserError, match='home folder ~no-such-user is not known'):
        parse('--dataset_dir=~no-such-user/data')
    assert parse('--dataset_dir=~/d').dataset_dir == str(Path.home() / 'd')


def test_a_single_phase():
    pretraining = parse('--preset=smoke', phases=('pretraining',))
    assert (pretraining.pretraining_steps, pretraining.finetuning_steps) == (40, 0)
    finetuning = parse('--preset=smoke', phases=('finetuning',))
    assert (finetuning.pretraining_steps, finetuning.finetuning_steps) == (0, 40)
    assert len({pretraining.run_dir, finetuning.run_dir, parse('--preset=smoke').run_dir}) == 3
    with pytest.raises(UserError, match=r'--finetuning_steps=40: this command has no such phase'):
        parse('--finetuning_steps=40', phases=('pretraining',))


def test_the_configuration_is_a_value():
    config = parse('--preset=smoke', '--agent.alpha=3')
    assert isinstance(config.agent, FrozenConfigDict)
    assert hash(config.agent) == hash(parse('--preset=smoke', '--agent.alpha=3').agent)
    assert config == parse('--preset=smoke', '--agent.alpha=3')
    stored = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert stored == config.to_dict()
    assert stored['agent']['actor_hidden_dims'] == [64, 64]
    assert stored['sources']['agent.alpha'] == 'command line'


def test_the_first_log_lines_say_what_came_from_where():
    lines = dict(line.split(': ', 1) for line in parse('--preset=smoke', '--agent.alpha=3').describe().splitlines())
    assert lines['command line'] == f'env_name={TASK}, preset=smoke, agent.alpha=3.0'
    assert 'agent.batch_size=32' in lines['preset smoke']
    assert 'agent.expectile=0.95' in lines[f'published table, infom on {TASK}']
    assert 'default' not in lines


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--pretraining_steps=-5'], '--pretraining_steps=-5: expected 0 or more'),
        (['--log_interval=0'], '--log_interval=0: expected a positive number'),
        (['--eval_interval=-1'], '--eval_interval=-1: expected a positive number'),
        (['--save_interval=0'], '--save_interval=0: expected a positive number'),
        (['--pretraining_size=0'], '--pretraining_size=0: expected a positive number'),
        (['--num_seeds=0'], '--num_seeds=0: expected a positive number'),
        (['--seed=-1'], '--seed=-1: expected 0 or more'),
        (['--seed=2147483647', '--num_seeds=2'], 'seeds go up to 2147483647'),
        (['--keep_interval=-1'], '--keep_interval=-1: expected 0 or more'),
        (['--eval_workers=-2'], '--eval_workers=-2: expected 0 or more'),
        (['--p_aug=0.5'], '--p_aug=0.5 .*for image tasks'),
        (['--frame_stack=3'], '--frame_stack=3: .*for image tasks'),
        (['--save_dir='], '--save_dir is empty'),
        (['--pretraining_steps=0', '--finetuning_steps=0'], 'nothing to do'),
        (['--agent.expectile=1.5'], r'--agent.expectile=1.5: expected a number from 0.5 up to, but not, 1'),
        (['--agent.expectile=0.4'], 'expected a number from 0.5'),
        (['--agent.discount=1'], r'--agent.discount=1.0: expected a number between 0 and 1'),
        (['--agent.tau=0'], r'--agent.tau=0.0: expected'),
        (['--agent.lr=nan'], r'--agent.lr=nan: expected'),
        (['--agent.alpha=inf'], r'--agent.alpha=inf: expected a finite number'),
        (['--agent.batch_size=0'], r'--agent.batch_size=0: expected a positive number'),
        (['--agent.actor_freq=0'], r'--agent.actor_freq=0: expected a positive number'),
        (['--agent.actor_hidden_dims=()'], 'expected the widths of one or more layers'),
        (['--agent.actor_hidden_dims=64,-1'], 'expected the widths of one or more layers'),
        (['--agent.q_agg=median'], 'agent.q_agg=.*median'),
        (['--log_interval=300'], '--pretraining_steps=1000000 is not a multiple of --log_interval=300: use 999900 or'),
        (['--log_interval=10'], '--log_interval=10 is not a multiple of --agent.actor_freq=4: use 8 or 12'),
        (['--finetuning_steps=30'], '--finetuning_steps=30 is not a multiple of --agent.actor_freq=4: use 28 or 32'),
        (['--finetuning_steps=3'], '--finetuning_steps=3 is not a multiple of --agent.actor_freq=4: use 4$'),
        (['--log_interval=40', '--eval_interval=100'], '--eval_interval=100 is not a multiple of --log_interval=40'),
        (['--chunk_size=300'], '--log_interval=5000 is not a multiple of --chunk_size=300'),
        (['--chunk_size=10'], '--chunk_size=10 is not a multiple of --agent.actor_freq=4'),
        (['--pretraining_steps=1000004'], 'no log_interval from 5 to 5000 divides them all'),
    ],
)
def test_refused_values(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(*arguments)


@pytest.mark.parametrize('flag', ['run_group', 'run_name'])
@pytest.mark.parametrize('name', ['', '.', '..', 'a/b', '../a', 'a\0'])
def test_names_that_leave_the_directory_are_refused(flag, name):
    with pytest.raises(UserError, match=f'--{flag}=.*: expected the name of a folder'):
        parse(f'--{flag}={name}')


def test_an_unknown_home_folder_is_a_user_error():
    with pytest.raises(UserError, match='the home folder ~no-such-user is not known'):
        _ = parse('--save_dir=~no-such-user/exp').run_dir


@pytest.mark.parametrize(
    ('env_name', 'message'),
    [
        (None, '--env_name is missing'),
        ('cube-singel-play-singletask-task1-v0', 'did you mean cube-single-play-singletask-task1-v0'),
    ],
)
def test_refused_tasks(env_name, message):
    with pytest.raises(UserError, match=message):
        parse(env_name=env_name)


def test_images_are_not_normalised():
    with pytest.raises(UserError, match='images are not normalised'):
        parse('--obs_norm_type=normal', env_name=VISUAL)


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('--agent=agents/nope.py', 'there is no agent'),
        ('--agent.foo=1', "Unknown command line flag 'agent.foo'"),
        ('--agent.agent_name=iql', "Unknown command line flag 'agent.agent_name'"),
        ('--agent.alpha=much', r'--agent.alpha=much: could not convert'),
        ('--agent.latent_dim=none', r'--agent.latent_dim=none: invalid literal'),
        ('--agent.actor_lr=nothing', r'--agent.actor_lr=nothing: could not convert'),
        ('--agent.critic_layer_norm=maybe', 'agent.critic_layer_norm=maybe'),
        ('--agent.latent_dim=1.5', r'--agent.latent_dim=1.5: invalid literal'),
        ('--agent.actor_hidden_dims=wide', 'expected a tuple'),
        ('--preset=tiny', r'value should be one of <paper\|published\|small\|smoke>'),
        ('--precision=float8', 'value should be one of'),
        ('--seed=one', '--seed=one'),
        ('--flagfile=/nowhere', 'Unable to open flagfile'),
    ],
)
def test_refused_while_parsing(argument, message):
    with pytest.raises(flags.Error, match=message):
        parse(argument)


# ------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        # (log, eval, save): the preset's where they fit, else the nearest below that do.
        ([], (5_000, 50_000, 50_000)),
        (['--preset=small'], (250, 2_000, 1_000)),
        (['--preset=smoke'], (20, 40, 40)),
        (['--preset=smoke', '--pretraining_steps=400', '--finetuning_steps=400'], (20, 40, 40)),
        (['--preset=smoke', '--finetuning_steps=48'], (8, 40, 40)),
        (['--preset=smoke', '--finetuning_steps=36'], (4, 40, 40)),
        (['--preset=smoke', '--pretraining_steps=37', '--finetuning_steps=0'], (1, 40, 40)),
        (['--preset=small', '--pretraining_steps=1200', '--finetuning_steps=800'], (200, 2_000, 1_000)),
        (['--preset=small', '--eval_interval=500'], (250, 500, 1_000)),
        (['--preset=small', '--save_interval=300', '--eval_interval=200'], (100, 200, 300)),
        (['--preset=small', '--keep_interval=300'], (100, 2_000, 1_000)),
        (['--preset=small', '--log_interval=500'], (500, 2_000, 1_000)),
        (['--preset=small', '--log_interval=1000'], (1_000, 2_000, 1_000)),
        (['--preset=small', '--pretraining_steps=0'], (250, 2_000, 1_000)),
        (['--preset=small', '--agent.actor_freq=5'], (250, 2_000, 1_000)),
        (['--preset=smoke', '--agent.actor_freq=40'], (40, 40, 40)),
    ],
)
def test_intervals_fit_the_steps(arguments, expected):
    config = parse(*arguments)
    assert (config.log_interval, config.eval_interval, config.save_interval) == expected


def test_a_fitted_interval_says_so():
    config = parse('--preset=smoke', '--finetuning_steps=48')
    assert config.sources['log_interval'] == 'made to fit the steps (preset: 20)'
    assert config.sources['eval_interval'] == 'preset smoke'


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ([], 500_000),
        (['--preset=smoke', '--finetuning_steps=48'], 48),
        (['--preset=smoke', '--agent.schedule_steps=36'], 36),
        (['--preset=smoke', '--finetuning_steps=0'], None),
        (['--preset=smoke', '--agent.finetuning_schedule=constant'], None),
        (['--preset=published'], None),
        (['--preset=smoke', '--agent.finetuning_schedule=constant', '--agent.stabilizer=anneal_expectile'], 40),
    ],
)
def test_a_schedule_is_as_long_as_fine_tuning(arguments, expected):
    config = parse(*arguments)
    assert config.agent.schedule_steps == expected
    if '--agent.schedule_steps=36' not in arguments:
        assert config.sources['agent.schedule_steps'] == ('as many as finetuning_steps' if expected else 'default')


@given(number=st.integers(0, 2_000), block=st.integers(1, 7), limit=st.integers(1, 500))
def test_largest_divisor(number, block, limit):
    number *= block
    divisors = [d for d in range(block, limit + 1) if number % d == 0 and d % block == 0]
    assert largest_divisor(number, block, limit) == max(divisors, default=block)


COUNTS = ('pretraining_steps', 'finetuning_steps', 'log_interval', 'eval_interval', 'save_interval', 'keep_interval')


@settings(max_examples=300, deadline=None)
@given(
    counts=st.tuples(*(st.integers(0, 60) for _ in COUNTS)),
    explicit=st.sets(st.sampled_from(COUNTS)),
    block=st.integers(1, 5),
    unit=st.sampled_from([1, 4, 60]),
)
def test_fitted_intervals_divide_everything_or_are_refused(counts, explicit, block, unit):
    values = {name: count * unit for name, count in zip(COUNTS, counts, strict=True)}
    values |= {name: max(values[name], 1) for name in COUNTS[2:5]} | {'chunk_size': 0}
    block = block if values['finetuning_steps'] else 1
    try:
        fitted = values | fit_intervals(values, explicit, block)
    except UserError as error:
        assert str(error).startswith('--')
        return
    assert all(fitted[name] == values[name] for name in explicit)
    assert all(fitted[name] % fitted['log_interval'] == 0 for name in COUNTS)
    assert fitted['log_interval'] % block == 0
    assert all(fitted[name] > 0 for name in COUNTS[2:5])
    if 'log_interval' not in explicit:
        assert fitted['log_interval'] <= max(values['log_interval'], block)


# ------------------------------------------------------------------------------------------------------------- JAX


def test_xla_flags_are_appended(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '--xla_a=1')
    append_xla_flags('')
    assert os.environ['XLA_FLAGS'] == '--xla_a=1'
    append_xla_flags('--xla_b=2 --xla_c=3')
    assert os.environ['XLA_FLAGS'] == '--xla_a=1 --xla_b=2 --xla_c=3'


# A run's beginning: the flags are resolved without a device or a simulator, then JAX is set up and compiles something.
SCRIPT = """
import sys
from absl import flags
from utils import cli
from utils.flags import define_flags, resolve_settings, set_up_jax

def main(_):
    config = resolve_settings(flags.FLAGS)
    print(config.describe())
    print('loaded', *({'mujoco', 'gymnasium', 'wandb', 'matplotlib'} & set(sys.modules)))
    config = set_up_jax(config)
    import jax
    import jax.numpy as jnp
    def deep(x):  # Long enough to compile that it is worth keeping, on any machine.
        for layer in range(100):
            x = jnp.sin(x + layer) @ jnp.cos(x * layer).T
        return x.sum()
    jax.jit(jax.grad(deep))(jnp.eye(8))
    print('chunk', config.chunk_size, config.sources['chunk_size'])
    print('devices', jax.device_count(), jax.config.jax_default_matmul_precision, jax.config.jax_compilation_cache_dir)

if __name__ == '__main__':
    define_flags()
    cli.run(main)
"""


@pytest.fixture
def run(tmp_path):
    """run(arguments, **environment) → the finished process of SCRIPT."""
    script = tmp_path / 'start.py'
    script.write_text(SCRIPT)
    inherited = {
        key: value for key, value in os.environ.items() if key not in ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR')
    }

    def start(*arguments, **environment):
        env = (
            inherited | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XDG_CACHE_HOME': str(tmp_path)} | environment
        )
        command = [sys.executable, str(script), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    return start


def test_the_beginning_of_a_run(run, tmp_path):
    result = run(
        f'--env_name={TASK}', '--preset=small', '--precision=highest', '--xla_flags=--xla_cpu_enable_fast_math=false',
        XLA_FLAGS='--xla_force_host_platform_device_count=2',
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert f'command line: env_name={TASK}, preset=small, precision=highest' in result.stdout
    assert lines[-3] == 'loaded'
    assert lines[-2] == 'chunk 50 chosen for this device (cpu)'
    cache = next((tmp_path / 'infom' / 'xla').iterdir())
    assert lines[-1] == f'devices 2 highest {cache}'
    assert list(cache.iterdir()), 'nothing was cached'


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_a_warning(run):
    result = run(f'--env_name={TASK}', '--preset=smoke', XDG_CACHE_HOME='/proc/nowhere')
    assert result.returncode == 0, result.stderr
    assert 'no compilation cache' in result.stderr
    assert 'chunk 20 chosen' in result.stdout


@pytest.mark.slow
def test_the_cache_can_be_turned_off(run, tmp_path):
    result = run(f'--env_name={TASK}', '--preset=smoke', '--nocompilation_cache', '--chunk_size=4')
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == 'devices 1 tensorfloat32 None'
    assert 'chunk 4 command line' in result.stdout
    assert not (tmp_path / 'infom').exists()


# ------------------------------------------------------------------------------------------------------ exit codes


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--agent=agents/nope.py', '--agent.alpha=1'], 'there is no agent'),
        (['--agent.foo=1'], 'agent.foo'),
        (['--agent.expectile=1.5'], 'expected a number from 0.5'),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, message):
    result = run(f'--env_name={TASK}', '--preset=smoke', *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


@pytest.mark.parametrize(
    ('platform', 'message'),
    [
        ('nonsense', "error: JAX finds no device: Unable to initialize backend 'nonsense'"),
        ('cuda', 'error: JAX finds no device of JAX_PLATFORMS=cuda: unset it'),
    ],
)
def test_a_platform_that_is_not_there_is_one_line_and_exit_code_2(run, platform, message):
    if platform == 'cuda' and Path('/dev/nvidia0').exists():
        pytest.skip('there is a GPU')
    result = run(f'--env_name={TASK}', '--preset=smoke', JAX_PLATFORMS=platform)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count('\n') == 1


def test_help_lists_the_flags_of_the_run_and_of_the_agent(run):
    result = run('--help')
    assert result.returncode == 0
    assert '--pretraining_steps' in result.stdout
    assert '--agent.expectile' in result.stdout


def test_operational_flags_are_flags():
    assert flag_fields().keys() >= OPERATIONAL_FLAGS


def test_the_hosts_processor_is_there_beside_an_accelerator():
    """JAX_PLATFORMS=cuda alone would leave no place to draw batches on."""
    expected = {'cuda': 'cuda,cpu', 'tpu,cpu': 'tpu,cpu', 'cpu': 'cpu', '': '', None: None}
    assert {platforms: with_host(platforms) for platforms in expected} == expected
