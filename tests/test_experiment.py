"""One run in this process, on synthetic data and without a simulator: what is logged, saved, resumed, and refused."""

import dataclasses
import json
import logging
import shutil
import signal

import jax
import numpy as np
import pytest
from absl import flags

import envs
from agents import fb_iql, stabilizers
from agents.common import STEP
from tests.tiny import random_walks
from utils import checkpoints, processes, runs, saved_policy, training
from utils.errors import TrainingDiverged, UserError
from utils.experiment import Experiment
from utils.flags import define_flags, resolve_settings, set_up_jax
from utils.normalizers import Normalizer
from utils.resume import check_same_run
from utils.run_status import FINISHED, run_status

TASK = 'cube-single-play-singletask-task1-v0'


def make_config(tmp_path, *arguments, phases=('pretraining', 'finetuning')):
    flag_values = flags.FlagValues()
    argv = [
        'main.py', f'--env_name={TASK}', '--preset=smoke', f'--save_dir={tmp_path}', '--run_group=g', '--run_name=r',
        '--agent.batch_size=8', '--pretraining_steps=24', '--finetuning_steps=24', '--log_interval=8',
        '--eval_interval=8',
        '--save_interval=8', '--chunk_size=4', *arguments,
    ]  # fmt: skip
    define_flags(flag_values, argv)
    flag_values(argv)
    return set_up_jax(resolve_settings(flag_values, phases))


def load_raw(phase, split, size, bad_row=None):
    raw = random_walks(seed={'train': 0, 'val': 1}[split], labelled=phase == 'finetuning')
    if bad_row is not None and 'rewards' in raw:
        raw['rewards'] = np.where(np.arange(len(raw['rewards'])) == bad_row, np.nan, raw['rewards'])
    return {**raw, 'source': {'file': split, 'fingerprint': f'{phase}-{split}'}}


OBSERVED = np.linspace(-1, 1, 10, dtype=np.float32).reshape(2, 5)  # By the policies that are evaluated.


class CountingEvaluator:
    """Stands in for the simulator: scores the policy's actions on fixed observations, deterministic in the policy.
    `asked`: (seeds, episodes, actions) of each evaluation."""

    def __init__(self, calls):
        self.calls, self.asked = calls, []

    def evaluate(self, policy, seeds, num_episodes, eval_index, should_stop):
        if should_stop():
            return None
        self.calls.append(eval_index)
        actions = policy(OBSERVED)
        self.asked.append((list(seeds), num_episodes, actions))
        assert actions.shape == (len(seeds), 2, 3)
        return [{'episode.return': float(a.sum()), 'episode.success': 0.0, 'episode.length': 2.0} for a in actions]

    def close(self):
        pass


def make_experiment(config, calls=None, task=None, load=load_raw, experiment_class=Experiment, **options):
    if calls is not None:
        options['make_evaluator'] = lambda: CountingEvaluator(calls)
    return experiment_class(config, task or envs.task_spec(TASK), load_raw=load, **options)


def run(config, **options):
    with make_experiment(config, **options) as experiment:
        experiment.pretrain()
        experiment.finetune()
    return experiment


def saved_arrays(directory, step):
    """The bytes of every array of a checkpoint, by name."""
    return {k: v.tobytes() for k, v in checkpoints.read_arrays(directory / 'checkpoints' / str(step)).items()}


def run_until(config, stop_at, **options):
    """A run that gets SIGTERM when it has looked at the metrics of step `stop_at`."""
    experiment = make_experiment(config, calls=[], **options)
    collect = Experiment._collect

    def collect_and_signal(self, end_step, *arguments):
        collect(self, end_step, *arguments)
        if self.offset + end_step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    experiment._collect = collect_and_signal.__get__(experiment)
    with pytest.raises(SystemExit) as stop, experiment:
        experiment.pretrain()
        experiment.finetune()
    assert stop.value.code == 0
    return experiment


def lines(config):
    """The run's metrics, without times."""
    rows = runs.read_metrics(config.run_dir / 'metrics.jsonl')
    return [{k: v for k, v in row.items() if not k.startswith('time/')} for row in rows]


def copy_of(config, tmp_path):
    """A copy of a run, and its configuration."""
    copied = dataclasses.replace(config, save_dir=str(tmp_path))
    shutil.copytree(config.run_dir, copied.run_dir)
    return copied


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """One uninterrupted run of both phases, and what evaluated it."""
    evaluator = CountingEvaluator([])
    config = make_config(tmp_path_factory.mktemp('finished'))
    return config, run(config, make_evaluator=lambda: evaluator), evaluator


@pytest.fixture(scope='module')
def quick(tmp_path_factory):
    """The same of an agent that compiles quickly: its configuration."""
    config = make_quick_config(tmp_path_factory.mktemp('quick'))
    run(config, calls=[])
    return config


def make_quick_config(path, *arguments, **options):
    return make_config(path, '--agent=iql', *arguments, **options)


def test_a_run_logs_both_phases_and_each_step_once(finished):
    config, _, evaluator = finished
    rows = runs.read_metrics(config.run_dir / 'metrics.jsonl')
    training = [row for row in rows if 'training/flow_loss' in row]
    assert [(row['phase'], row['step']) for row in training] == [
        ('pretraining', 8), ('pretraining', 16), ('pretraining', 24), ('finetuning', 32), ('finetuning', 40),
        ('finetuning', 48),
    ]  # fmt: skip
    assert all('validation/flow_loss' in row and row['time/updates_per_second'] > 0 for row in training)
    assert 'training/critic_loss' in training[-1] and 'training/critic_loss' not in training[0]
    calls = evaluator.calls
    assert calls == [24, 32, 40, 48], 'before the first fine-tuning step, at every interval, and once at the end'
    assert [row['step'] for row in rows if 'evaluation/episode.success' in row] == calls


def test_the_policy_acts_on_observations_as_training_saw_them(finished):
    """Normalised by what pre-training fitted; for the run's seeds and episodes."""
    config, experiment, evaluator = finished
    assert all(asked[:2] == ([0], config.eval_episodes) for asked in evaluator.asked)
    normalizer = Normalizer.fit(load_raw('pretraining', 'train', None)['observations'], 'normal')
    act = training.make_policy(experiment.agents, lambda x: x, [0])
    *_, (_, _, actions) = evaluator.asked
    np.testing.assert_allclose(actions, act(normalizer(OBSERVED)), atol=1e-6)
    assert np.abs(actions - act(OBSERVED)).max() > 1e-3


def test_kept_checkpoints_are_the_end_of_pretraining_and_the_end(finished):
    config, *_ = finished
    assert {path.name for path in (config.run_dir / 'checkpoints').iterdir()} == {'24', '48'}


def test_checkpoints_that_stay_on_the_way(tmp_path):
    config = make_quick_config(tmp_path, '--finetuning_steps=0', '--keep_interval=8', '--save_interval=24')
    with make_experiment(config) as experiment:
        experiment.pretrain()
    assert {path.name for path in (config.run_dir / 'checkpoints').iterdir()} == {'8', '16', '24'}


def test_config_and_summary(finished):
    config, *_ = finished
    saved = json.loads((config.run_dir / 'config.json').read_text())
    assert saved['agent']['batch_size'] == 8 and saved['sources']['agent.batch_size'] == 'command line'
    assert saved['data']['finetuning/train']['fingerprint'] == 'finetuning-train'
    assert saved['environment']['packages']['jax']
    rows = runs.read_metrics(config.run_dir / 'metrics.jsonl')
    returns = [row['evaluation/episode.return'] for row in rows if 'evaluation/episode.return' in row]
    summary = json.loads((config.run_dir / 'summary.json').read_text())
    assert summary['mean']['episode.return']['final_three'] == pytest.approx(np.mean(returns[-3:]))


def test_the_same_command_again_finds_the_run_complete(finished, caplog):
    config, *_ = finished
    before = (config.run_dir / 'metrics.jsonl').read_bytes()
    with caplog.at_level(logging.INFO):
        run(config, calls=[])
    assert 'complete' in caplog.text
    assert (config.run_dir / 'metrics.jsonl').read_bytes() == before


@pytest.mark.parametrize('stop_at', [12, 24, 28, 40])
def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(quick, tmp_path, stop_at):
    """SIGTERM in either phase, at and between log boundaries: same arrays, same metrics, nothing twice."""
    config = make_quick_config(tmp_path)
    experiment = run_until(config, stop_at)
    assert experiment.offset + experiment.phase_step < 48
    started = json.loads((config.run_dir / 'config.json').read_text())['start']
    run(config, calls=[])
    assert saved_arrays(config.run_dir, 48) == saved_arrays(quick.run_dir, 48)
    assert lines(config) == lines(quick)
    assert json.loads((config.run_dir / 'config.json').read_text())['start'] == started, 'where the run began'


def test_chunks_of_another_length_end_at_the_same_intervals(quick, tmp_path):
    """As on another device: stopped 4 updates after a multiple of the new chunks' 8."""
    config = make_quick_config(tmp_path, '--save_interval=24', '--dataset_location=host')
    assert run_until(config, 8).phase_step == 12
    calls = []
    run(dataclasses.replace(config, chunk_size=8), calls=calls)
    assert calls == [24, 32, 40, 48]
    assert [row['step'] for row in lines(config)] == [row['step'] for row in lines(quick)]
    rows = runs.read_metrics(config.run_dir / 'metrics.jsonl')
    speeds = {row['step']: row['time/updates_per_second'] for row in rows if 'time/updates_per_second' in row}
    timed = {step: speed is not None and speed > 0 for step, speed in speeds.items()}
    # The first chunk of a start, and of a phase, is not timed: it ends at 4 of the first interval, and at 16 and 32.
    assert timed == {8: True, 16: False, 24: True, 32: False, 40: True, 48: True}
    assert {path.name for path in (config.run_dir / 'checkpoints').iterdir()} == {'24', '48'}
    ours, theirs = (checkpoints.read_arrays(c.run_dir / 'checkpoints' / '48') for c in (config, quick))
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_signal_after_an_evaluation_stops_with_a_checkpoint(tmp_path, monkeypatch):
    """It comes when nothing was to be saved, and before the loop goes on."""
    config = make_quick_config(tmp_path, '--save_interval=24')
    experiment = make_experiment(config, calls=[])

    def wait_and_signal():
        if (experiment.phase, experiment.phase_step) == ('finetuning', 8):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(processes, 'wait_for_all', wait_and_signal)
    with pytest.raises(SystemExit), experiment:
        experiment.pretrain()
        experiment.finetune()
    assert checkpoints.latest_step(config.run_dir / 'checkpoints') == experiment.offset + experiment.phase_step == 36


def test_a_last_evaluation_after_a_resume_is_not_due_again(quick, tmp_path):
    """SIGTERM cuts the last evaluation short; the second start makes it, the third has nothing to do."""
    config = make_quick_config(tmp_path)
    run_until(config, 48)
    second, third = [], []
    run(config, calls=second)
    run(config, calls=third)
    assert (second, third) == ([48], [])
    assert lines(config) == lines(quick)


def test_without_its_last_checkpoint_a_finished_run_is_one_no_more(quick, tmp_path):
    """It goes on from the one before, and what it had said of its end is gone until it is there again."""
    config = copy_of(quick, tmp_path)
    shutil.rmtree(config.run_dir / 'checkpoints' / '48')
    run_until(config, 40)
    assert run_status(config.run_dir) == 'not finished: at step 40 of 48'
    run(config, calls=[])
    assert run_status(config.run_dir) == FINISHED
    assert lines(config) == lines(quick)


def test_a_start_that_fails_leaves_the_run_as_it_was(quick, tmp_path):
    """Without checkpoints: a finished run is not begun anew, and one that is not finished loses no line to a mistake in
    the command."""
    config = copy_of(quick, tmp_path)
    before = (config.run_dir / 'metrics.jsonl').read_bytes()
    for checkpoint in (config.run_dir / 'checkpoints').iterdir():
        shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match='finished run without its checkpoints'):
        run(config, calls=[])
    assert run_status(config.run_dir) == FINISHED
    (config.run_dir / 'summary.json').unlink()

    def load_nothing(*_):
        raise UserError('no data here')

    with pytest.raises(UserError, match='no data here'):
        run(config, load=load_nothing)
    assert (config.run_dir / 'metrics.jsonl').read_bytes() == before


def test_no_fine_tuning_is_none(tmp_path):
    config = make_quick_config(tmp_path, '--finetuning_steps=0')

    def load_unlabelled(phase, split, size):
        assert phase == 'pretraining'
        return load_raw(phase, split, size)

    calls = []
    run(config, calls=calls, load=load_unlabelled)
    assert not calls
    assert run_status(config.run_dir) == FINISHED


@pytest.mark.slow
def test_seeds_side_by_side_equal_seeds_alone(finished, tmp_path):
    _, solo, _ = finished
    both = run(make_config(tmp_path, '--num_seeds=2'), calls=[])
    rows = runs.read_metrics(both.directory / 'metrics.jsonl')
    assert {row['seed'] for row in rows} == {0, 1}
    np.testing.assert_allclose(
        np.asarray(both.agents.params['actor']['mean']['kernel'])[0],
        np.asarray(solo.agents.params['actor']['mean']['kernel'])[0],
        atol=2e-5,
    )


def test_one_checkpoint_fine_tunes_on_its_own(finished, tmp_path):
    """finetune.py from main.py's end-of-pre-training checkpoint goes where main.py went, without reading pre-training
    data."""
    reference, *_ = finished
    config = make_config(
        tmp_path, f'--restore_path={reference.run_dir}', '--pretraining_steps=0', phases=('finetuning',)
    )

    def load_labelled(phase, split, size):
        assert phase == 'finetuning'
        return load_raw(phase, split, size)

    with make_experiment(config, calls=[], load=load_labelled, first_phase='finetuning') as experiment:
        experiment.finetune()
    assert saved_arrays(config.run_dir, 48) == saved_arrays(reference.run_dir, 48)

    # Its steps are counted from where pre-training ended, and so is whether it is finished.
    written = config.run_dir / 'config.json'
    started = json.loads(written.read_text())
    assert run_status(config.run_dir) == FINISHED
    written.write_text(json.dumps(started | {'finetuning_steps': started['finetuning_steps'] + 10}))
    assert run_status(config.run_dir) == 'not finished: at step 48 of 58'


@pytest.mark.slow
def test_a_stabilizer_starts_from_a_pretraining_without_it_and_is_kept_from_then_on(finished, tmp_path):
    reference, *_ = finished
    for steps in (8, 16):
        config = make_config(
            tmp_path, f'--restore_path={reference.run_dir}', '--pretraining_steps=0', f'--finetuning_steps={steps}',
            '--agent.stabilizer=clip_rewards', '--agent.finetuning_schedule=constant', phases=('finetuning',),
        )  # fmt: skip
        with make_experiment(config, calls=[], first_phase='finetuning') as experiment:
            experiment.finetune()
        arrays = checkpoints.read_arrays(config.run_dir / 'checkpoints' / str(24 + steps))
        assert arrays[f'opt_states.{STEP}'].tolist() == [steps]
        lowest, highest = (arrays[f'opt_states.{stabilizers.REWARD_RANGE}.{end}'] for end in (0, 1))
        assert (lowest < highest).all()


def test_a_pretraining_without_what_fine_tuning_counts_can_be_looked_at(finished, tmp_path):
    config, *_ = finished
    task = dataclasses.replace(envs.task_spec(TASK), observation_shape=(5,), action_size=3)
    agents, _, meta = saved_policy.load_agents(config.run_dir / 'checkpoints' / '24', task)
    older = agents.replace(opt_states={name: state for name, state in agents.opt_states.items() if name != STEP})
    with checkpoints.CheckpointWriter(tmp_path) as writer:
        writer.save(24, older, meta)
    read, *_ = saved_policy.load_agents(tmp_path, task)
    jax.tree.map(np.testing.assert_array_equal, read, agents)
    assert read.opt_states[STEP].tolist() == [0]


def test_the_pretraining_that_a_run_fine_tunes_stays_the_same(quick, tmp_path):
    """Another --restore_path is another run; one that is gone is not needed any more; and the digest tells of settings
    and length, not of the seed."""
    settings = '--pretraining_steps=0', '--finetuning_steps=8'

    def finetune(restore_path, run_name='r', *more):
        config = make_quick_config(
            tmp_path, *settings, f'--restore_path={restore_path}', f'--run_name={run_name}', *more,
            phases=('finetuning',),
        )  # fmt: skip
        with make_experiment(config, calls=[], first_phase='finetuning') as experiment:
            experiment.finetune()
        return json.loads((config.run_dir / 'config.json').read_text())['start']

    def pretrain(run_name, *more):
        config = make_quick_config(tmp_path, '--finetuning_steps=0', f'--run_name={run_name}', *more)
        run(config)
        return config.run_dir

    started = finetune(quick.run_dir)
    assert started['checkpoint'] == str(quick.run_dir / 'checkpoints' / '24') and started['steps_before'] == 24
    shorter = pretrain('shorter', '--pretraining_steps=16')
    with pytest.raises(UserError, match=r'started from .*checkpoints/24, now it is .*shorter/checkpoints/16'):
        finetune(shorter)
    assert finetune(tmp_path / 'nowhere') == started
    longer = copy_of(quick, tmp_path / 'gone on')
    shutil.copytree(longer.run_dir / 'checkpoints' / '24', longer.run_dir / 'checkpoints' / '32')
    shutil.rmtree(longer.run_dir / 'checkpoints' / '48')
    first = finetune(longer.run_dir / 'checkpoints' / '24', 'from_longer')
    meta = json.loads((longer.run_dir / 'checkpoints' / '32' / 'meta.json').read_text())
    (longer.run_dir / 'checkpoints' / '32' / 'meta.json').write_text(json.dumps(meta | {'step': 32, 'phase_step': 32}))
    assert finetune(longer.run_dir, 'from_longer') == first, 'a pre-training that has gone on'
    another_seed = finetune(pretrain('seed', '--seed=1'), 'from_seed_1')
    assert another_seed['pretraining'] == started['pretraining'] | {'seed': 1}
    assert finetune(shorter, 'from_shorter')['pretraining']['digest'] != started['pretraining']['digest']


def test_more_pretraining_than_asked_for_is_what_was_before(quick, tmp_path):
    """main.py on a checkpoint of 24 updates with 8 of its own: it fine-tunes at once, at step 24."""
    config = make_quick_config(tmp_path, f'--restore_path={quick.run_dir}', '--pretraining_steps=8')
    run(config, calls=[])
    assert [row['step'] for row in lines(config) if row['phase'] == 'finetuning'][-1] == 48
    assert run_status(config.run_dir) == FINISHED


@pytest.mark.parametrize(
    ('task', 'arguments'),
    [
        (TASK, ('--next_actions_across_episodes',)),
        ('cheetah_run', ()),
        ('visual-cube-single-play-singletask-task1-v0', ('--p_aug=0.25', '--frame_stack=2')),
    ],
)
def test_the_settings_of_data_reach_the_data(tmp_path, task, arguments):
    config, spec = make_config(tmp_path, f'--env_name={task}', *arguments), envs.task_spec(task)

    def load(phase, split, size):
        raw = load_raw(phase, split, size)
        if spec.visual:
            raw['observations'] = np.zeros((len(raw['actions']), 8, 8, 3), np.uint8)
        return raw

    phase, train, validation = make_experiment(config, task=spec, load=load)._load_phase('finetuning')
    for dataset in (train, validation):
        assert dataset.reward_at == ('next_observations' if task == 'cheetah_run' else 'observations')
        assert dataset.frame_stack == config.frame_stack
        assert dataset.next_actions_across_episodes == config.next_actions_across_episodes
    assert (train.p_aug, validation.p_aug) == (config.p_aug, 0)
    for split, dataset in (('train', train), ('val', validation)):
        np.testing.assert_array_equal(dataset.rewards, load(phase, split, None)['rewards'], err_msg=split)


@pytest.mark.slow
def test_fine_tuning_infers_the_task_from_many_labelled_rows(tmp_path, monkeypatch):
    """What `begin_finetuning` makes of them is what is fine-tuned, and what a checkpoint gives back."""
    seen = []
    begin = fb_iql.AGENT.begin_finetuning

    def begin_and_note(agent, labelled_batch, key):
        seen.append(labelled_batch['rewards'].shape)
        return begin(agent, labelled_batch, key)

    monkeypatch.setattr(fb_iql.AGENT, 'begin_finetuning', begin_and_note)
    config = make_config(tmp_path, '--agent=fb_iql', '--pretraining_steps=8', '--finetuning_steps=8')

    def load(phase, split, size):
        raw = load_raw(phase, split, size)
        return raw if phase == 'pretraining' else raw | {'rewards': raw['observations'][:, 0] - 1}

    experiment = run(config, calls=[], load=load)
    assert seen == [(config.agent.num_latent_inference_samples,)] and seen[0][0] > 5000
    task = dataclasses.replace(envs.task_spec(TASK), observation_shape=(5,), action_size=3)
    before, normalizer, _ = saved_policy.load_agents(config.run_dir / 'checkpoints' / '8', task)
    after, *_ = saved_policy.load_agents(config.run_dir, task)
    np.testing.assert_array_equal(after.task_latent, experiment.agents.task_latent)
    labelled = load('finetuning', 'train', None)
    agent = jax.tree.map(lambda x: x[0], before)
    states = normalizer(labelled['observations'])
    expected = (agent.backward(agent.params, states) * labelled['rewards'][:, None]).mean(axis=0)

    def cosine(x):
        return float(x @ expected / np.linalg.norm(x) / np.linalg.norm(expected))

    # The rows with a next state alone are drawn, 10,000 times: near, and nearer than the random z of pre-training.
    assert cosine(after.task_latent[0]) > 0.97 > abs(cosine(before.task_latent[0]))


def test_pretraining_never_sees_a_reward(tmp_path):
    config = make_config(tmp_path, '--finetuning_steps=0', phases=('pretraining',))

    def load_unlabelled(phase, split, size):
        assert phase == 'pretraining'
        return load_raw(phase, split, size)

    with make_experiment(config, load=load_unlabelled) as experiment:
        assert experiment._data[1].rewards is None
        experiment.pretrain()
    assert (config.run_dir / 'summary.json').exists()


def load_nan(phase, split, size):
    """All rewards are NaN."""
    raw = load_raw(phase, split, size)
    return raw if phase == 'pretraining' else raw | {'rewards': np.full_like(raw['rewards'], np.nan)}


def test_nan_stops_the_run_with_step_metric_and_checkpoint(tmp_path):
    config = make_config(tmp_path)
    with pytest.raises(TrainingDiverged, match=r'step 25 .*reward_loss.*checkpoints/24'):
        run(config, load=load_nan)
    warned = dataclasses.replace(config, nan_policy='warn', run_name='warned')
    run(warned, load=load_nan)
    rows = runs.read_metrics(warned.run_dir / 'metrics.jsonl')
    assert rows[-1]['training/reward_loss'] is None, 'NaN is null in the log'


@pytest.mark.parametrize('mean', ['nan', 'inf', '-inf'])
def test_means_that_are_not_finite_are_kept_over_a_stop(quick, tmp_path, mean):
    """SIGTERM within an interval, under --nan_policy=warn."""
    config = copy_of(quick, tmp_path)
    shutil.rmtree(config.run_dir / 'checkpoints' / '48')
    (config.run_dir / 'summary.json').unlink()
    with make_experiment(config) as experiment:
        experiment._partial = [{'loss': [float(mean), 0.5]}]
        experiment._save(keep=True)
    with make_experiment(config) as experiment:
        np.testing.assert_array_equal(experiment._partial[0]['loss'], [float(mean), 0.5])


def test_a_stop_within_an_interval_of_nan_saves(tmp_path):
    config = make_quick_config(
        tmp_path, '--nan_policy=warn', '--pretraining_steps=8', '--save_interval=24', '--eval_interval=24'
    )
    experiment = run_until(config, 16, load=load_nan)
    assert experiment.offset + experiment.phase_step == 20, 'half an interval'
    (chunk,) = checkpoints.load_meta(config.run_dir / 'checkpoints' / '20')['partial_metrics']
    assert ['nan'] in chunk.values()
    run(config, calls=[], load=load_nan)
    assert run_status(config.run_dir) == FINISHED


def test_metadata_that_say_nothing_get_one_line(quick, tmp_path):
    config = copy_of(quick, tmp_path)
    (config.run_dir / 'checkpoints' / '48' / 'meta.json').write_text('{"format_version": 1}')
    restored = make_quick_config(
        tmp_path, f'--restore_path={config.run_dir / "checkpoints" / "48"}', '--run_name=other'
    )
    for started in (config, restored):
        with pytest.raises(UserError, match='checkpoints/48 is damaged: its metadata name no phase'):
            run(started)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--agent.alpha=3',), r'agent.alpha=30.0, now it is 3.0'),
        (('--seed=1',), r'--seed=0, now it is 1'),
        (('--agent=iql',), r'holds a run with --agent=agents/infom\.py, now it is iql'),
        (('--agent.latent_dim=4',), r'latent_dim=8, now it is 4'),
        (('--finetuning_steps=16',), r'24 fine-tuning updates, more than --finetuning_steps=16'),
        # Its learning rates have fallen to 0 by then.
        (('--finetuning_steps=32',), r'--agent.schedule_steps=24, now it is 32'),
    ],
)
def test_a_run_directory_of_other_settings_is_refused(finished, arguments, message):
    config, *_ = finished
    other = make_config(config.run_dir.parents[1], *arguments)
    with pytest.raises(UserError, match=message):
        run(other)


def test_own_data_may_lie_elsewhere_when_a_run_goes_on(finished):
    config, *_ = finished
    before = (config.run_dir / 'config.json').read_bytes()
    check_same_run(config.run_dir, dataclasses.replace(config, dataset='/another/place/mine.npz'))
    assert (config.run_dir / 'config.json').read_bytes() == before


def test_a_run_without_fine_tuning_may_go_on_to_it(tmp_path):
    """The learning rates had no schedule before."""
    before, after = make_config(tmp_path, '--finetuning_steps=0'), make_config(tmp_path)
    assert (before.agent.schedule_steps, after.agent.schedule_steps) == (None, 24)
    (tmp_path / 'config.json').write_text(json.dumps(before.to_dict()))
    check_same_run(tmp_path, after)
    (tmp_path / 'config.json').write_text(json.dumps(after.to_dict()))
    with pytest.raises(UserError, match=r'--agent.schedule_steps=24, now it is None'):
        check_same_run(tmp_path, before)


def test_other_data_are_refused_on_resume(finished):
    config, *_ = finished

    def load_changed(phase, split, size):
        return {**load_raw(phase, split, size), 'source': {'file': split, 'fingerprint': 'changed'}}

    with pytest.raises(UserError, match='finetuning/train data are not those'):
        run(config, load=load_changed)


@pytest.mark.parametrize(
    ('arguments', 'task', 'message'),
    [
        ((), 'scene-play-singletask-task1-v0', 'pre-trained on cube-single'),
        (('--num_seeds=2',), TASK, 'holds 1 seeds'),
        (('--agent=iql',), TASK, r'was trained with --agent=agents/infom\.py, now it is iql'),
        (('--agent.latent_dim=4',), TASK, 'agent.latent_dim=8, now it is 4'),
        (('--agent.discount=0.9',), TASK, 'agent.discount=0.99, now it is 0.9'),
        (('--agent.clip_flow_goals=False',), TASK, 'agent.clip_flow_goals=True, now it is False'),
        (('--obs_norm_type=bounded',), TASK, 'obs_norm_type=normal, now it is bounded'),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(finished, tmp_path, arguments, task, message):
    reference, *_ = finished
    config = make_config(tmp_path, f'--restore_path={reference.run_dir}', *arguments)
    with pytest.raises(UserError, match=message):
        run(config, task=envs.task_spec(task))
    assert not (config.run_dir / 'config.json').exists()


def test_a_fine_tuned_checkpoint_is_no_pretraining(finished, tmp_path):
    reference, *_ = finished
    config = make_config(tmp_path, f'--restore_path={reference.run_dir / "checkpoints" / "48"}')
    with pytest.raises(UserError, match='checkpoint of fine-tuning'):
        run(config)


def test_fine_tuning_needs_a_checkpoint(tmp_path):
    config = make_config(tmp_path, '--pretraining_steps=0', phases=('finetuning',))
    with pytest.raises(UserError, match='--restore_path'), make_experiment(config, first_phase='finetuning'):
        pass


def test_two_processes_cannot_share_a_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, 'LOCK_PATIENCE', 0.3)
    config = make_config(tmp_path)
    with make_experiment(config), pytest.raises(UserError, match='another process'), make_experiment(config):
        pass
