"""Evaluation where returns are known in closed form: results; workers that live, die and hang; videos.

Worker processes import this file: no jax here.
"""

import functools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from tests.waiting import wait_until
from utils.errors import UserError
from utils.evaluation import Evaluator, record_video

ROOT = Path(__file__).resolve().parents[1]
SEEDS, EPISODES = [5, 11], 7
GAINS = np.array([1.0, -2.0], np.float32)  # of the two seeds' policies: action = gain · first feature


class Tiny(gymnasium.Env):
    """The reset draws x in [0, 1); an episode takes 2 + ⌊5x⌋ steps, each gives the reward x + action; success is x > ½;
    beyond ¼ the episode terminates, else it is truncated.

    `fault` strikes at the third step of every episode, or on making the environment.
    """

    metadata = {'render_modes': ['rgb_array']}
    observation_space = gymnasium.spaces.Box(0, 10, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, fault=None, success=True, render_mode=None):
        self.fault, self.success, self.render_mode = fault, success, render_mode
        self.steps_after_the_end = 0
        if fault == 'refuse':
            raise UserError('this machine has no simulator')
        if fault == 'accelerator' and os.environ.get('JAX_PLATFORMS') != 'cpu':
            raise UserError('an environment written in JAX would take the accelerator')

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = float(self.np_random.random()), 0
        return np.array([self.x, self.t]), {}

    def step(self, action):
        self.t += 1
        if self.t == 3:
            if self.fault == 'die':
                os._exit(3)
            elif self.fault == 'hang':
                time.sleep(600)
            elif self.fault == 'raise':
                raise ZeroDivisionError('in the simulator')
        assert np.all(np.isfinite(action)) and action.dtype == np.float32
        assert self.t <= self.length, 'stepped after the end of the episode'
        reward = float('jax' in sys.modules) if self.fault == 'find jax' else self.x + float(action[0])
        info = {'success': np.float64(self.x > 0.5)} if self.success else {}
        return np.array([self.x, self.t]), reward, self.t == self.length and self.x > 0.25, self.t == self.length, info

    @property
    def length(self):
        return 2 + int(5 * self.x)

    def render(self):
        if self.fault == 'no renderer':
            raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")
        return np.full((32, 48, 3), 40 * self.t, np.uint8)


gymnasium.register('Tiny-v0', entry_point='tests.test_evaluation:Tiny', disable_env_checker=True)


def make_tiny(**kwargs):
    return gymnasium.make('Tiny-v0', **kwargs)


def policy(observations):
    assert observations.dtype == np.float32
    return GAINS[:, None, None] * observations[None, :, :1]


def starts(seed, episodes=EPISODES):
    """The x of the episodes of a seed."""
    seeds = [int(np.random.SeedSequence([seed, 977, e]).generate_state(1)[0]) for e in range(episodes)]
    return np.array([np.random.Generator(np.random.PCG64(s)).random() for s in seeds])


def expected(seed, gain):
    x = starts(seed)
    lengths = 2 + np.floor(5 * x)
    returns = lengths * (x + gain * x)
    return {
        'episode.return': returns.mean(),
        'episode.success': (x > 0.5).mean(),
        'episode.length': lengths.mean(),
        'episode.return_std': returns.std(),
        'episode.success_std': (x > 0.5).std(),
    }


def evaluate(evaluator, act=policy, num_episodes=EPISODES, **kwargs):
    return evaluator.evaluate(act, seeds=SEEDS, num_episodes=num_episodes, **kwargs)


@pytest.fixture(scope='module')
def three_workers():
    """An evaluator that the tests share, and its results. Tests that end it come last of all: they make their own."""
    with Evaluator(make_tiny, 3, environments_per_worker=2) as evaluator:
        yield evaluator, evaluate(evaluator)


def local(**kwargs):
    return Evaluator(functools.partial(make_tiny, **kwargs), 1)


def in_one_process(fault, **kwargs):
    """An evaluator that needs one worker process for one episode."""
    return Evaluator(functools.partial(make_tiny, fault=fault), 2, **kwargs)


def solo(evaluator):
    """One episode of one seed that is long enough for the third step."""
    seed = next(s for s in range(100) if starts(s, 1)[0] > 0.5)
    return evaluator.evaluate(lambda o: 0 * o[None, :, :1], seeds=[seed], num_episodes=1)


# --- Results ---


def test_results_are_those_of_the_closed_form_for_every_seed(three_workers):
    _, results = three_workers
    for seed, gain, result in zip(SEEDS, GAINS, results, strict=True):
        assert result == pytest.approx(expected(seed, gain), rel=1e-6)


@pytest.mark.parametrize('num_workers, environments', [(0, 1), (1, 3), (2, 1), (2, 5)])
def test_results_do_not_depend_on_the_number_of_workers(three_workers, num_workers, environments):
    with Evaluator(make_tiny, num_workers, environments) as evaluator:
        assert evaluate(evaluator) == three_workers[1]


def test_workers_leave_accelerators_alone(monkeypatch):
    """Environments may be written in JAX; the process that trains keeps its own choice."""
    monkeypatch.setenv('JAX_PLATFORMS', 'cuda,cpu')
    with Evaluator(functools.partial(Tiny, 'accelerator'), 2) as evaluator:
        assert evaluator.evaluate_random(seed=0, num_episodes=2)
    assert os.environ['JAX_PLATFORMS'] == 'cuda,cpu'
    monkeypatch.delenv('JAX_PLATFORMS')
    with Evaluator(functools.partial(Tiny, 'accelerator'), 2) as evaluator:
        assert evaluator.evaluate_random(seed=0, num_episodes=2)
    assert 'JAX_PLATFORMS' not in os.environ


def test_results_equal_a_plain_loop(three_workers):
    env = make_tiny()
    for s, (seed, result) in enumerate(zip(SEEDS, three_workers[1], strict=True)):
        returns = []
        for episode in range(EPISODES):
            reset_seed = int(np.random.SeedSequence([seed, 977, episode]).generate_state(1)[0])
            observation, _ = env.reset(seed=reset_seed)
            total, done = 0.0, False
            while not done:
                observation, reward, terminated, truncated, _ = env.step(policy(observation[None].astype('f'))[s, 0])
                total, done = total + reward, terminated or truncated
            returns.append(total)
        assert result['episode.return'] == np.mean(returns)


def test_workers_are_reused_and_every_evaluation_has_the_same_episodes(three_workers):
    evaluator, results = three_workers
    before = {child.pid for child in multiprocessing.active_children()}
    assert evaluate(evaluator, eval_index=1) == results
    assert {child.pid for child in multiprocessing.active_children()} == before


def test_the_policy_always_sees_one_row_for_each_environment(three_workers):
    shapes = set()

    def act(observations):
        shapes.add(observations.shape)
        return policy(observations)

    evaluate(three_workers[0], act)
    assert shapes == {(6, 2)}


def test_fewer_episodes_than_workers(three_workers):
    assert evaluate(three_workers[0], num_episodes=1) == evaluate(local(), num_episodes=1)


def test_random_actions_do_not_depend_on_the_number_of_workers(three_workers):
    result = local().evaluate_random(seed=5, num_episodes=EPISODES)
    assert three_workers[0].evaluate_random(seed=5, num_episodes=EPISODES) == result
    x = starts(5)
    assert result['episode.length'] == (2 + np.floor(5 * x)).mean()
    mean_action = result['episode.return'] - ((2 + np.floor(5 * x)) * x).mean()
    assert 0 < abs(mean_action) < result['episode.length']


def test_success_is_left_out_where_the_environment_has_none():
    assert 'episode.success' not in evaluate(local(success=False))[0]


def test_actions_that_are_not_finite_become_zero_with_one_warning(caplog):
    result = evaluate(local(), lambda o: policy(o) * np.array([1, np.nan], 'f')[:, None, None])
    assert result[0] == pytest.approx(expected(5, 1.0), rel=1e-6)
    assert result[1] == pytest.approx(expected(11, 0.0), rel=1e-6)
    assert len(caplog.records) == 1


def test_an_evaluation_can_be_stopped_and_the_next_one_is_sound(three_workers):
    evaluator, results = three_workers
    for patience in (0, 1, 5):
        answers = iter([False] * patience + [True])
        assert evaluate(evaluator, should_stop=lambda answers=answers: next(answers)) is None
    assert evaluate(evaluator) == results


def test_an_error_of_the_policy_leaves_the_next_evaluation_sound():
    def fail(_):
        raise FloatingPointError

    with local() as evaluator:
        with pytest.raises(FloatingPointError):
            evaluate(evaluator, fail)
        assert evaluate(evaluator)[0] == pytest.approx(expected(5, 1.0), rel=1e-6)


def test_no_episodes_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError):
        evaluate(local(), num_episodes=0)


# --- Processes ---


def test_workers_do_not_import_jax():
    pytest.importorskip('jax')
    assert 'jax' in sys.modules  # here it is
    with in_one_process('find jax') as evaluator:
        assert solo(evaluator)[0]['episode.return'] == 0.0


def test_signals_to_the_process_group_leave_workers_at_work_and_closing_leaves_none():
    others = set(multiprocessing.active_children())
    evaluator = Evaluator(make_tiny, 2)
    results = evaluate(evaluator)
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert evaluate(evaluator) == results
    evaluator.close()
    assert set(multiprocessing.active_children()) == others
    evaluator.close()  # once more does no harm


@pytest.mark.parametrize(
    ('fault', 'error', 'message'),
    [
        ('die', UserError, r'evaluation worker 0 died \(exit status 3\).*fewer --eval_workers'),
        ('hang', UserError, 'evaluation worker 0 has not answered for 2 seconds'),
        ('raise', RuntimeError, 'ZeroDivisionError: in the simulator'),
        ('refuse', UserError, '^this machine has no simulator$'),
    ],
)
def test_a_worker_in_trouble_is_an_error_and_no_worker_is_left(fault, error, message):
    others = set(multiprocessing.active_children())
    began = time.monotonic()
    evaluator = in_one_process(fault, **({'reply_timeout': 2.0} if fault == 'hang' else {}))
    with pytest.raises(error, match=message):
        solo(evaluator)
    assert time.monotonic() - began < 200
    assert set(multiprocessing.active_children()) == others
    evaluator.close()


def test_errors_in_this_process_are_raised_as_they_are():
    with pytest.raises(ZeroDivisionError):
        solo(local(fault='raise'))


def state_of(pid):
    """'Z' for a process that has ended and waits to be collected, '' for none."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ''


@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
@pytest.mark.parametrize('end', ['killed', 'finished without closing'])
def test_workers_end_with_their_owner(end):
    program = textwrap.dedent("""
        import multiprocessing, sys
        from tests.test_evaluation import Evaluator, evaluate, make_tiny
        evaluator = Evaluator(make_tiny, 2)
        evaluate(evaluator)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        input()
    """)
    owner = subprocess.Popen(
        [sys.executable, '-c', program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        workers = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(workers) == 2 and all(state_of(pid) not in ('', 'Z') for pid in workers)
        if end == 'killed':
            owner.kill()
        owner.communicate('\n', timeout=120)
    finally:
        owner.kill()
    wait_until(
        lambda: all(state_of(pid) in ('', 'Z') for pid in workers), 'workers that outlive their owner', seconds=60
    )


# --- Videos ---


make_rendering = functools.partial(make_tiny, render_mode='rgb_array')


def read_video(path):
    import imageio.v2 as imageio

    return np.stack(imageio.mimread(path))


def test_a_video_can_be_read_back(tmp_path):
    record_video(make_rendering, lambda o: o[:1], tmp_path / 'film.mp4', num_episodes=2, seed=5)
    lengths = 2 + np.floor(5 * starts(5, 2)).astype(int)
    frames = read_video(tmp_path / 'film.mp4')
    assert frames.shape == (lengths.sum() + 2, 32, 48, 3)
    brightness = np.concatenate([40 * np.arange(length + 1) for length in lengths])
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), brightness, atol=4)
    assert os.listdir(tmp_path) == ['film.mp4']


def test_a_video_of_every_third_step_and_the_last(tmp_path):
    record_video(make_rendering, lambda o: o[:1], tmp_path / 'film.mp4', 3, seed=5, every=3)
    lengths = 2 + np.floor(5 * starts(5, 3)).astype(int)
    assert len(read_video(tmp_path / 'film.mp4')) == sum(1 + int(np.ceil(length / 3)) for length in lengths)


def test_a_video_without_a_renderer_is_a_user_error(tmp_path):
    make = functools.partial(make_rendering, fault='no renderer')
    with pytest.raises(UserError, match=r'cannot render a video.*eglQueryString.*libEGL.*OSMesa'):
        record_video(make, lambda o: o[:1], tmp_path / 'film.mp4')
    assert os.listdir(tmp_path) == []


def test_an_environment_that_refuses_to_render_says_so_itself(tmp_path):
    make = functools.partial(make_rendering, fault='refuse')
    with pytest.raises(UserError, match=r'^this machine has no simulator$'):
        record_video(make, lambda o: o[:1], tmp_path / 'film.mp4')


def test_a_video_that_cannot_be_written_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r'cannot write .*film.mp4'):
        record_video(make_rendering, lambda o: o[:1], tmp_path / 'missing' / 'film.mp4')


def test_a_full_disk_is_a_user_error_and_leaves_no_video(tmp_path):
    """A limit on the size of files, which ffmpeg inherits, stands in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(UserError, match=r'cannot write .*film.mp4') as caught:
            record_video(make_rendering, lambda o: o[:1], tmp_path / 'film.mp4')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert '\n' not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_policy_that_fails_leaves_no_video(tmp_path):
    def fail(_):
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        record_video(make_rendering, fail, tmp_path / 'film.mp4')
    assert os.listdir(tmp_path) == []
