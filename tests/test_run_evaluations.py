"""Evaluations beside training: the same lines, in the same order, and the same bits, stopped and resumed or not."""

import signal
import threading

import jax
import numpy as np
import pytest

from tests import tiny_agents
from tests.test_experiment import CountingEvaluator, make_config, make_experiment, run, saved_arrays
from utils import devices, runs, training
from utils.errors import UserError
from utils.experiment import Experiment
from utils.run_evaluations import RunEvaluations
from utils.run_log import interval_lines

# Saved less often than evaluated: some checkpoints fall on an evaluation, some evaluations span a log line.
ARGUMENTS = '--agent=iql', '--save_interval=16', '--log_interval=4', '--eval_interval=12'


class SlowEvaluator(CountingEvaluator):
    """Acts only when `training_goes_on` is set: two chunks later, or when somebody waits for the evaluation."""

    training_goes_on = threading.Event()

    def evaluate(self, policy, **options):
        in_background = threading.current_thread() is not threading.main_thread()
        assert not in_background or self.training_goes_on.wait(60), 'training waited for the evaluation'
        self.training_goes_on.clear()
        return super().evaluate(policy, **options)


class Overlapping(Experiment):
    """Lets the slow evaluation go on two chunks after it began, or at the next wait for it."""

    chunks, held, stop_at = 0, 0, None

    def _collect(self, end_step, *arguments):
        super()._collect(end_step, *arguments)
        if self.stop_at is not None and self.offset + end_step == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        self.held = max(self.held, len(self.lines._held or []))
        self.chunks = self.chunks + 1 if self.lines._held is not None else 0
        if self.chunks == 2:
            SlowEvaluator.training_goes_on.set()

    def _finish_evaluation(self, wait=True):
        if wait:
            SlowEvaluator.training_goes_on.set()
        finished = super()._finish_evaluation(wait)
        if wait:
            SlowEvaluator.training_goes_on.clear()
        return finished


def run_overlapping(config, stop_at=None):
    experiment = make_experiment(config, experiment_class=Overlapping, make_evaluator=lambda: SlowEvaluator([]))
    experiment.stop_at = stop_at
    with experiment:
        experiment.pretrain()
        experiment.finetune()
    return experiment


def lines(config):
    rows = runs.read_metrics(config.run_dir / 'metrics.jsonl')
    return [{k: v for k, v in row.items() if not k.startswith('time/')} for row in rows]


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    """One run that trains and evaluates in turn."""
    config = make_config(tmp_path_factory.mktemp('reference'), *ARGUMENTS)
    run(config, calls=[])
    return config


def test_overlapping_evaluations_change_nothing(reference, tmp_path):
    config = make_config(tmp_path, *ARGUMENTS, '--eval_async')
    experiment = run_overlapping(config)
    assert experiment.held > 0, 'nothing was logged while an evaluation ran'
    assert lines(config) == lines(reference)
    assert saved_arrays(config.run_dir, 48) == saved_arrays(reference.run_dir, 48)


# While an evaluation is running, where the next one is due, and at the last step.
@pytest.mark.parametrize('stop_at', [28, 36, 48])
def test_stopped_while_evaluating_and_resumed_equals_uninterrupted(reference, tmp_path, stop_at):
    config = make_config(tmp_path, *ARGUMENTS, '--eval_async')
    with pytest.raises(SystemExit) as stop:
        run_overlapping(config, stop_at)
    assert stop.value.code == 0
    run_overlapping(config)
    assert lines(config) == lines(reference)
    assert saved_arrays(config.run_dir, 48) == saved_arrays(reference.run_dir, 48)


def test_killed_while_evaluating_and_resumed_equals_uninterrupted(reference, tmp_path, monkeypatch):
    """A checkpoint of the very step whose evaluation is running says that it is still due."""
    config = make_config(tmp_path, *ARGUMENTS, '--eval_interval=8', '--save_interval=8', '--eval_async')
    in_turn = make_config(tmp_path / 'in turn', *ARGUMENTS, '--eval_interval=8', '--save_interval=8')
    run(in_turn, calls=[])

    class Killed(Exception):
        pass

    def killed(*_, keep, evaluation_due=False):
        save(*_, keep=keep, evaluation_due=evaluation_due)
        if evaluation_due:
            SlowEvaluator.training_goes_on.set()  # Whoever waits for the evaluation's thread need not wait for long.
            raise Killed

    save = Overlapping._save
    monkeypatch.setattr(Overlapping, '_save', killed)
    SlowEvaluator.training_goes_on.clear()
    with pytest.raises(Killed):
        run_overlapping(config)
    assert lines(config)[-1]['step'] == 32 and 'evaluation/episode.return' not in lines(config)[-1]
    monkeypatch.setattr(Overlapping, '_save', save)
    run_overlapping(config)
    assert lines(config) == lines(in_turn)


def test_an_error_of_a_running_evaluation_ends_the_run(tmp_path):
    class Failing(CountingEvaluator):
        def evaluate(self, policy, **options):
            raise UserError('evaluation worker 0 died')

    config = make_config(tmp_path, *ARGUMENTS, '--eval_async')
    with (
        pytest.raises(UserError, match='worker 0 died'),
        make_experiment(config, make_evaluator=lambda: Failing([])) as experiment,
    ):
        experiment.pretrain()
        experiment.finetune()


@pytest.mark.parametrize('name', ['infom', 'fb_iql', 'rebrac'])
def test_the_acting_part_acts_alike_and_is_small(name):
    batch = tiny_agents.make_batch()
    agents = jax.tree.map(lambda x: np.stack([x, x]), tiny_agents.make_agent(name, batch))
    part = training.acting_part(agents, batch['observations'][:1])
    assert {module for module, state in part.opt_states.items() if jax.tree.leaves(state)} == {'acting_actor'}
    assert not jax.tree.leaves((part.params, part.target_params))
    expected = training.make_policy(agents, lambda x: x, [0, 1])(batch['observations'])
    np.testing.assert_array_equal(training.make_policy(part, lambda x: x, [0, 1])(batch['observations']), expected)


def test_a_line_is_the_mean_of_its_chunks_for_each_seed():
    chunks = [{'loss': [1.0, 10.0]}, {'loss': [2.0, 20.0]}, {'loss': [6.0, 30.0]}]
    first, second = interval_lines(chunks, {'validation/loss': np.array([4.0, 5.0])}, 50.0, 2)
    assert first == {
        'training/loss': 3.0, 'validation/loss': 4.0, 'time/updates_per_second': 50.0,
        'time/seed_updates_per_second': 100.0,
    }  # fmt: skip
    assert (second['training/loss'], second['validation/loss']) == (20.0, 5.0)


@pytest.mark.usefixtures('precision_as_before')
def test_beside_training_a_policy_acts_in_float32(monkeypatch):
    class Product:
        """Of two vectors: a CPU has no such product by an accelerator's algorithm for bfloat16."""

        def evaluate(self, policy, **options):
            return jax.jit(lambda x: x.T @ x)(column)

        def close(self):
            pass

    column = np.full((8, 1), 1 + 2**-10, np.float32)
    agents = jax.tree.map(lambda x: x[None], tiny_agents.make_agent('iql', batch := tiny_agents.make_batch()))
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    devices.set_matmul_precision('bfloat16')
    evaluations = RunEvaluations(Product, lambda x: x, [0], 1, in_background=True)
    evaluations.begin(agents, 8, batch['observations'], should_stop=lambda: False)
    assert evaluations.finish().results == pytest.approx(8 * (1 + 2**-10) ** 2, abs=1e-6)
    evaluations.close()


def test_a_film_that_fails_is_no_reason_to_stop(tmp_path, caplog):
    def record(policy, path):
        raise UserError('no room for a film')

    config = make_config(tmp_path, '--agent=iql', '--video_episodes=1', '--pretraining_steps=8', '--finetuning_steps=8')
    run(config, calls=[], record_video=record)
    assert 'no video of step 16: no room for a film' in caplog.text
    assert [row['step'] for row in lines(config) if 'evaluation/episode.return' in row] == [8, 16]
