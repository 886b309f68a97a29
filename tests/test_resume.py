"""What a run directory tells of the settings that it began with, older versions of the code among them."""

import json
from pathlib import Path

import pytest
from absl import flags

from utils.errors import UserError
from utils.flags import define_flags, resolve_settings
from utils.resume import check_same_run, check_start, read_meta

META = {
    'format_version': 1, 'keep': True, 'phase': 'pretraining', 'step': 8, 'phase_step': 8, 'offset': 0,
    'domain': 'cube-single', 'agent_name': 'infom', 'agent_config': {}, 'seed': 0, 'num_seeds': 1,
    'normalizer': {'kind': 'none', 'shift': None, 'scale': None}, 'data': {'pretraining/train': {'fingerprint': 'f'}},
    'evaluation_due': False, 'metrics_lines': 0, 'partial_metrics': [], 'wall_seconds': 1.5,
}  # fmt: skip


@pytest.fixture(scope='module')
def config():
    flag_values = flags.FlagValues()
    argv = ['main.py', '--env_name=cube-single-play-singletask-task1-v0', '--preset=smoke']
    define_flags(flag_values, argv)
    flag_values(argv)
    return resolve_settings(flag_values, ('pretraining', 'finetuning'))


def write_settings(directory: Path, config, without: str):
    settings = config.to_dict()
    del (settings if without in settings else settings['agent'])[without]
    (directory / 'config.json').write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ('setting', 'message'),
    [
        ('actor_weight_decay', r'a version of the code that had no --agent\.actor_weight_decay, now it is 0\.0'),
        ('obs_norm_per_split', r'a version of the code that had no --obs_norm_per_split, now it is False'),
    ],
)
def test_a_run_from_before_a_setting_is_told_from_one_with_another_value(tmp_path, config, setting, message):
    write_settings(tmp_path, config, without=setting)
    with pytest.raises(UserError, match=message):
        check_same_run(tmp_path, config)


def test_a_setting_that_is_not_given_is_as_before_there_was_it(tmp_path, config):
    assert config.agent.num_critic_latents is None
    write_settings(tmp_path, config, without='num_critic_latents')
    check_same_run(tmp_path, config)


@pytest.mark.parametrize('content', ['[1]', '"text"', '{}', '{"agent": 1}', '{'])
def test_what_are_no_settings_of_a_run_is_told(tmp_path, config, content):
    (tmp_path / 'config.json').write_text(content)
    for check in (lambda: check_same_run(tmp_path, config), lambda: check_start({}, config, tmp_path)):
        with pytest.raises(UserError, match=r'config\.json cannot be read .*use another --run_name'):
            check()


def test_settings_that_do_not_say_where_the_run_started_are_told(tmp_path, config):
    (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
    with pytest.raises(UserError, match=r'config\.json does not say how the run started'):
        check_start({}, config, tmp_path)


def write_meta(directory: Path, meta) -> Path:
    path = directory / '8'
    path.mkdir()
    (path / 'meta.json').write_text(json.dumps(meta))
    return path


def test_metadata_that_are_whole_are_read(tmp_path):
    """Those of another run need not tell of its metrics."""
    path = write_meta(tmp_path, META)
    assert read_meta(path, own=True) == META
    of_another = {name: value for name, value in META.items() if name != 'partial_metrics'}
    (path / 'meta.json').write_text(json.dumps(of_another))
    assert read_meta(path) == of_another


@pytest.mark.parametrize('name', sorted(META.keys() - {'format_version'}))
def test_metadata_that_lack_something_or_mistake_it_are_damage(tmp_path, name):
    path = write_meta(tmp_path, {key: value for key, value in META.items() if key != name})
    with pytest.raises(UserError, match=f'8 is damaged: its metadata name no {name}'):
        read_meta(path, own=True)
    (path / 'meta.json').write_text(json.dumps(META | {name: None}))
    with pytest.raises(UserError, match=f'8 is damaged: its metadata have {name}=None'):
        read_meta(path, own=True)


@pytest.mark.parametrize(
    'mistake', [{'phase': 'resting'}, {'normalizer': {'kind': 'none'}}, {'data': {'a': 1}}, {'partial_metrics': [1]}]
)
def test_metadata_of_the_wrong_content_are_damage(tmp_path, mistake):
    path = write_meta(tmp_path, META | mistake)
    with pytest.raises(UserError, match=f'8 is damaged: its metadata have .*{next(iter(mistake))}'):
        read_meta(path, own=True)
