"""What a run directory tells of the settings that it began with, older versions of the code among them."""

import json
from pathlib import Path

import pytest
from absl import flags

from utils.errors import UserError
from utils.flags import define_flags, resolve_settings
from utils.resume import check_same_run


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
