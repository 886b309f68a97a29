"""Exploring ExORL's domains: the policies, the coverage grid, what is written, interruption, and what RND learns.

Episodes are short, and run in this process where a process of their own is not the point.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs import (
    collect_exorl,
    collect_rnd,
    coverage,
    episode_parts,
    exorl_env,
    exorl_episodes,
    exploration,
    rnd,
)
from tests import tiny
from tests.baseline_reference import heads
from tests.infom_reference import float64
from tests.tiny_exorl import jobs_in_this_process  # noqa: F401 (a fixture)
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
STEPS = 12
pytestmark = pytest.mark.usefixtures('jobs_in_this_process')


@pytest.fixture(scope='module', autouse=True)
def a_small_explorer():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {'HIDDEN_DIMS': (64, 64), 'BATCH_SIZE': 64, 'PREDICTOR_LEARNING_RATE': 1e-3}.items():
            patch.setattr(rnd, name, value)
        yield


def collect(folder, policy='random', episodes=4, **options):
    settings = {'seed': 1, 'workers': 1, 'episode_length': STEPS, 'num_envs': 2} | options
    return collect_exorl.collect('cheetah', policy, episodes * STEPS, exorl_dir=str(folder), **settings)


def contents(buffer):
    return {path.name: path.read_bytes() for path in buffer.iterdir()}


# --- Policies and coverage ---


def test_ou_actions_wander_with_the_documented_spread_and_memory():
    actions = exploration.ou_actions(np.random.default_rng(0), 20_000, 3)
    assert np.abs(actions).max() == 1.0  # Clipped now and then.
    raw_correlation = np.corrcoef(actions[:-1].ravel(), actions[1:].ravel())[0, 1]
    assert raw_correlation == pytest.approx(np.exp(-0.15), abs=0.02)
    assert actions.std() == pytest.approx(0.5, abs=0.04) and abs(actions.mean()) < 0.05
    spread = exploration.ou_actions(np.random.default_rng(1), 2, 20_000)[0].std()
    assert spread == pytest.approx(0.5, abs=0.04)  # From the first step on.


def test_random_actions_fill_the_cube():
    actions = exploration.random_actions(np.random.default_rng(0), 5000, 2)
    assert (
        actions.min() < -0.99
        and actions.max() > 0.99
        and abs(np.corrcoef(actions[:-1, 0], actions[1:, 0])[0, 1]) < 0.05
    )


@pytest.mark.parametrize('domain', coverage.GRIDS)
def test_coordinates_are_what_they_are_called(domain):
    env = envs.make_env(exploration.reward_task(domain))
    env.reset(seed=0)
    for action in np.random.default_rng(0).uniform(-1, 1, (5, *env.action_space.shape)):
        observation = env.step(action)[0]
    physics, named = env.physics, env.physics.named.data
    expected = {
        'cheetah': lambda: [named.qvel['rootx'][0], named.qpos['rooty'][0], named.qpos['rootz'][0]],
        'walker': lambda: [named.qvel['rootx'][0], named.qpos['rooty'][0], named.xpos['torso', 'z']],
        'quadruped': lambda: [
            np.linalg.norm(named.qvel['root'][:2]),
            named.xmat['torso', 'zz'],
            named.xpos['torso', 'z'],
        ],
        'jaco': lambda: named.site_xpos['jaco_arm/jaco_hand/pinchsite'],
    }[domain]()
    found = coverage.coordinates(domain, observation[None], physics.get_state()[None])[0]
    angle = [1] if domain in ('cheetah', 'walker') else []
    np.testing.assert_allclose(np.delete(found, angle), np.delete(expected, angle), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.cos(found[angle]), np.cos(np.array(expected)[angle]), atol=1e-5)
    assert (
        0 < coverage.visited_cells(domain, observation[None], physics.get_state()[None])[0] < coverage.grid_size(domain)
    )


def test_cells_are_counted_once_and_what_lies_outside_in_the_outermost():
    rows = np.zeros((5, 17))
    rows[:, 8] = [0.1, 0.2, 1.1, 50.0, 9.9]  # Forward speeds: two in one cell, one in the next, two in the last.
    assert len(coverage.visited_cells('cheetah', rows, np.zeros((5, 18)))) == 3
    assert coverage.grid_size('cheetah') == 20 * 16 * 14


# --- Collecting ---


@pytest.mark.parametrize('policy', ['random', 'ou'])
def test_an_episode_follows_from_seed_and_index_alone(tmp_path, policy):
    whole = contents(collect(tmp_path / 'a', policy))
    assert list(whole) and sorted(whole) == [f'episode_{index:06d}_{STEPS}.npz' for index in range(4)]
    assert len(set(whole.values())) == 4
    collect(tmp_path / 'b', policy, episodes=2)
    assert contents(collect(tmp_path / 'b', policy)) == whole  # More was asked for: two are added.
    assert not set(contents(collect(tmp_path / 'c', policy, seed=2)).values()) & set(whole.values())


def test_an_interrupted_command_continues(tmp_path, capsys):
    whole = contents(collect(tmp_path))
    buffer = exorl_episodes.buffer_path(tmp_path, 'cheetah', 'random')
    (buffer / f'episode_000001_{STEPS}.npz').unlink()
    damaged = buffer / f'episode_000002_{STEPS}.npz'
    damaged.write_bytes(damaged.read_bytes()[:900])  # As a power cut might leave it.
    (buffer / f'episode_000003_{STEPS}.npz.99.tmp').write_bytes(b'half an episode')
    (buffer.parent / '.explorer.msgpack.99.tmp').write_bytes(b'half an explorer')
    capsys.readouterr()
    assert contents(collect(tmp_path)) == whole
    output = capsys.readouterr().out
    assert 'continuing: 2 of 4 episodes are already there' in output
    assert f'{2 * STEPS} transitions in' in output and f'{2 * STEPS} were already there' in output
    assert 'cells visited' in output
    assert not list(tmp_path.rglob('*.tmp'))


def test_files_get_their_names_when_they_are_on_the_disk(tmp_path, monkeypatch):
    """After a power cut, an episode or a learner that is there is whole."""
    done = []
    with monkeypatch.context() as patch:
        for name in ('fsync', 'replace'):
            original = getattr(os, name)
            patch.setattr(os, name, lambda *args, name=name, original=original: (done.append(name), original(*args)))
        exorl_episodes.write_episode(tmp_path, 0, {'observation': np.zeros((STEPS + 1, 17))})
        collect_rnd._save(tmp_path / 'buffer', rnd.create(jax.random.key(0), 17, 6), 1, [])
        exorl_episodes.write_metadata(tmp_path / 'buffer', {})
    assert done == ['fsync', 'replace'] * 4


def test_episodes_of_other_settings_are_in_the_way(tmp_path):
    buffer = collect(tmp_path)
    before = contents(buffer)
    with pytest.raises(UserError, match=r'seed 1 instead of 2.*--overwrite'):
        collect(tmp_path, seed=2)
    assert contents(buffer) == before
    collect(tmp_path, seed=2, episodes=1, overwrite=True)
    assert len(contents(buffer)) == 1
    (buffer.parent / 'metadata.json').unlink()
    with pytest.raises(UserError, match='not made by this command'):
        collect(tmp_path)
    with (
        episode_parts.hold(buffer.parent / '.lock', 'mine'),
        pytest.raises(UserError, match='another process is collecting'),
    ):
        collect(tmp_path, overwrite=True)
    with pytest.raises(UserError, match='did you mean cheetah'):
        collect_exorl.collect('chetah', 'ou', 10, 0, 1, str(tmp_path))


def test_a_diverged_step_is_taken_again_without_an_action(tmp_path):
    recorder = exploration.EpisodeRecorder('cheetah', 3, tmp_path)
    recorder.start(0, seed=0)
    taken = [recorder.step(np.ones(6))[1]]
    recorder._env.physics.data.qvel[:] = 1e12
    taken += [recorder.step(np.ones(6))[1], recorder.step(np.full(6, 2.0))[1]]
    recorder.finish()
    with np.load(tmp_path / 'episode_000000_3.npz') as episode:
        assert all(np.isfinite(episode[name]).all() for name in episode.files)
        np.testing.assert_array_equal(episode['action'][:, 0], [0, 1, 0, 1])
        np.testing.assert_array_equal(episode['action'][1:], taken)
        env = envs.make_env('cheetah_run')
        env.reset(seed=0)
        with env.physics.reset_context():
            env.physics.set_state(episode['physics'][1])
        env.step(np.zeros(6))
        np.testing.assert_array_equal(env.physics.get_state(), episode['physics'][2])


def test_an_episode_that_cannot_be_simulated_any_further_stays_where_it_is(tmp_path):
    recorder = exploration.EpisodeRecorder('cheetah', 4, tmp_path)
    for index in range(2):  # The next episode is not concerned.
        recorder.start(index, seed=index)
        for step in range(4):
            if index == 0 and step == 2:
                recorder._env.physics.data.qvel[:] = 1e12
                recorder._step_back = lambda: recorder._env.physics.data.qvel.fill(1e12)  # Nor without an action.
            observation, action = recorder.step(np.full(6, 0.5))
            assert (
                action.dtype == observation.dtype == np.float32 and (action == (0.5 if index or step < 2 else 0)).all()
            )
        recorder.finish()
    stuck, whole = (
        exorl_episodes.read_episode(path, 'cheetah', ('observation', 'action', 'physics'))
        for path in exorl_episodes.list_episodes(tmp_path)
    )
    np.testing.assert_array_equal(stuck['action'][:, 0], [0, 0.5, 0.5, 0, 0])
    for name in ('observation', 'physics'):
        np.testing.assert_array_equal(stuck[name][3:], np.stack([stuck[name][2]] * 2))
        assert len(np.unique(whole[name], axis=0)) == 5 and (stuck[name][1] != stuck[name][2]).any()


# --- RND ---


def test_moments_are_those_of_all_rows():
    rows = np.random.default_rng(0).normal(3.0, 2.0, (60, 4)).astype(np.float32)
    moments = rnd.Moments.create((4,))
    for part in (rows[:5], rows[5:6], rows[6:]):
        moments = moments.add(jnp.array(part))
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(moments.std, rows.std(axis=0), rtol=1e-5)


def numbered_replay(rounds, columns, size=17):
    """A replay in which an observation's first feature is its row, the second its column."""
    rows = rounds * (STEPS + 1)
    observations = np.random.default_rng(0).normal(size=(rows, columns, size)).astype(np.float32)
    observations[..., 0], observations[..., 1] = np.arange(rows)[:, None], np.arange(columns)
    actions = np.repeat(observations[..., :1], 6, axis=-1)
    return rnd.Replay(jnp.array(observations), jnp.array(actions))


def test_sampled_transitions_stay_in_their_episode_and_in_what_is_filled():
    replay, steps = numbered_replay(rounds=4, columns=3), 2 * STEPS + 5
    sampled = [np.array(part) for part in rnd._sample(replay, steps, STEPS, jax.random.key(0))]
    observations, actions, next_observations = sampled
    row, column = observations[:, 0], observations[:, 1]
    np.testing.assert_array_equal(next_observations[:, 0], row + 1)
    np.testing.assert_array_equal(next_observations[:, 1], column)
    np.testing.assert_array_equal(actions[:, 0], row)
    allowed = {*range(STEPS), *range(STEPS + 1, 2 * STEPS + 1), *range(2 * STEPS + 2, 2 * STEPS + 7)}
    assert set(row) <= allowed and len(set(row)) > len(allowed) / 2 and set(column) == {0, 1, 2}


@pytest.fixture(scope='module')
def trained():
    """An explorer after 400 updates on few states, with the bonus of the first and of the last updates."""
    replay = numbered_replay(4, 3)
    replay = replay.replace(observations=replay.observations.at[..., :2].set(0.0))
    explorer = rnd.create(jax.random.key(0), 17, 6)
    explorer, replay = rnd.see(explorer, replay, 0, jax.random.normal(jax.random.key(1), (3, 17)))
    for row in range(1, 8):
        explorer, replay = rnd.see(explorer, replay, row, jax.random.normal(jax.random.key(row + 1), (3, 17)))
    bonuses = []
    for step in range(8):
        explorer, metrics = rnd.learn(explorer, replay, 40, jax.random.key(step), episode_length=STEPS, updates=50)
        bonuses.append(float(metrics['bonus']))
    return explorer, replay, bonuses


def test_the_bonus_of_what_is_seen_often_falls(trained):
    _, _, bonuses = trained
    assert bonuses[-1] < 0.3 * bonuses[0]


def test_the_bonus_of_the_unseen_stays(trained):
    explorer, replay, _ = trained
    network = rnd._networks(6)['predictor']

    def bonus(observations):
        states = rnd._normalised(explorer, observations)
        errors = network.apply(explorer.params['predictor'], states) - network.apply(explorer.random_network, states)
        return float(jnp.square(errors).mean())

    seen = replay.observations[: STEPS + 1].reshape(-1, 17)
    assert bonus(jnp.roll(seen, 5, axis=1)) > 3 * bonus(seen)


def test_only_the_predictor_learns_the_random_network(trained):
    explorer, _, _ = trained
    fresh = rnd.create(jax.random.key(0), 17, 6)
    for one, two in zip(jax.tree.leaves(explorer.random_network), jax.tree.leaves(fresh.random_network), strict=True):
        np.testing.assert_array_equal(one, two)
    for name in ('actor', 'critic', 'predictor'):
        changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), explorer.params[name], fresh.params[name])
        assert max(jax.tree.leaves(changes)) > 1e-3
    actions = rnd.act(explorer, jnp.zeros((5, 17)), jax.random.key(0), action_size=6)
    assert actions.shape == (5, 6) and float(jnp.abs(actions).max()) <= 1


def test_one_update_is_ddpg_on_the_bonus():
    """Values, gradients (Adam's first moment after one step is 0.1 times them) and the target against float64 NumPy,
    from networks off their initial values."""
    replay, fresh, key = numbered_replay(4, 3), rnd.create(jax.random.key(0), 17, 6), jax.random.key(5)
    parts = ('params', 'target_critic', 'random_network')
    explorer = fresh.replace(**{name: tiny.perturb(getattr(fresh, name), i, 0.1) for i, name in enumerate(parts)})
    explorer = explorer.replace(observation_moments=explorer.observation_moments.add(0.4 * replay.observations[:, 0]))
    params, target, random = (float64(getattr(explorer, name)) for name in parts)
    sample_key, *noise_keys = jax.random.split(jax.random.split(key, 1)[0], 3)
    s, a, next_s = (np.float64(x) for x in rnd._sample(replay, 40, STEPS, sample_key))
    rows = 0.4 * np.float64(replay.observations[:, 0])
    s, next_s = (np.clip((x - rows.mean(0)) / (rows.std(0) + 1e-6), -5, 5) for x in (s, next_s))
    assert (np.abs(next_s) == 5).any(), 'the clip is at work'
    noises = [np.clip(0.2 * np.float64(jax.random.normal(k, a.shape)), -0.3, 0.3) for k in noise_keys]

    def network(params, *inputs, norm=True):
        return heads(params['params'] if norm else {'MLP_0': params['params']}, inputs, (64, 64), norm)

    def policy(params, s, noise):
        return np.clip(np.tanh(network({'params': {'MLP_0': params['params']}}, s)) + noise, -1, 1)

    bonus = ((network(params['predictor'], next_s, norm=False) - network(random, next_s, norm=False)) ** 2).mean(-1)
    next_q = network(target, next_s, policy(params['actor'], next_s, noises[0]))[..., 0].min(0)
    y = bonus / (bonus.std() + 1e-6) + 0.99 * next_q
    embeddings = network(random, next_s, norm=False)
    losses = {
        'actor': lambda actor: -network(params['critic'], s, policy(actor, s, noises[1]))[..., 0].min(0).mean(),
        'critic': lambda critic: ((network(critic, s, a)[..., 0] - y) ** 2).mean(),
        'predictor': lambda predictor: ((network(predictor, next_s, norm=False) - embeddings) ** 2).mean(),
    }

    after, metrics = rnd.learn(jax.tree.map(jnp.copy, explorer), replay, 40, key, episode_length=STEPS, updates=1)
    expected = {
        'bonus': bonus.mean(),
        'critic_loss': losses['critic'](params['critic']),
        'value': network(params['critic'], s, a).mean(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)
    for name, loss in losses.items():
        direction = tiny.perturb(jax.tree.map(np.zeros_like, params[name]), seed=3, scale=1.0)
        up, down = (loss(jax.tree.map(lambda p, d, x=x: p + x * d, params[name], direction)) for x in (1e-5, -1e-5))
        actual = tiny.dot(after.opt_states[name][0].mu, direction) / 0.1
        np.testing.assert_allclose(actual, (up - down) / 2e-5, rtol=1e-2, atol=1e-4, err_msg=name)
    followed = jax.tree.map(lambda new, old: 0.01 * np.float64(new) + 0.99 * old, after.params['critic'], target)
    jax.tree.map(lambda x, e: np.testing.assert_allclose(x, e, rtol=1e-5, atol=1e-7), after.target_critic, followed)


@pytest.mark.slow
def test_rnd_continued_equals_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(rnd, 'RANDOM_TRANSITIONS', 2 * STEPS)  # Of the first round.
    step = exorl_env.ExORLEnv.step

    def sometimes_diverging(env, action):  # Not without an action, but then from the eighth step on.
        if (env._steps == 3 and np.any(action)) or env._steps >= 8:
            env._steps += 1
            return env._observation.copy(), 0.0, True, False, {}
        return step(env, action)

    monkeypatch.setattr(exorl_env.ExORLEnv, 'step', sometimes_diverging)
    whole = collect(tmp_path / 'a', 'rnd', episodes=6)
    assert len(contents(whole)) == 6
    history = collect_rnd.json.loads((whole.parent / 'history.json').read_text())
    assert [row['transitions'] for row in history] == [2 * STEPS, 4 * STEPS, 6 * STEPS]
    assert history[0]['bonus'] is None and history[1]['bonus'] > 0 and history[2]['coverage'] > 0

    parts = collect(tmp_path / 'b', 'rnd', episodes=4)
    exorl_episodes.write_episode(parts, 5, {'observation': np.zeros((STEPS + 1, 17))})  # Of a round cut off.
    collect(tmp_path / 'b', 'rnd', episodes=6)
    assert contents(parts) == contents(whole)
    assert (parts.parent / 'explorer.msgpack').read_bytes() == (whole.parent / 'explorer.msgpack').read_bytes()
    with pytest.raises(UserError, match='num_envs 2 instead of 3'):
        collect(tmp_path / 'b', 'rnd', episodes=6, num_envs=3)
    (parts.parent / 'explorer.msgpack').write_bytes(b'damaged')
    with pytest.raises(UserError, match=r'explorer\.msgpack cannot be continued from.*--overwrite'):
        collect(tmp_path / 'b', 'rnd', episodes=8)


@pytest.fixture
def rounds(tmp_path, monkeypatch):
    """The buffer of three rounds of two episodes; the learner after each is in `explorer.<round>` beside it."""
    save = collect_rnd._save

    def save_and_keep(buffer, explorer, rounds, history):
        save(buffer, explorer, rounds, history)
        shutil.copy(buffer.parent / 'explorer.msgpack', buffer.parent / f'explorer.{rounds}')

    monkeypatch.setattr(rnd, 'RANDOM_TRANSITIONS', 2 * STEPS)
    monkeypatch.setattr(collect_rnd, '_save', save_and_keep)
    return collect(tmp_path, 'rnd', episodes=6)


def test_finished_episodes_outlive_a_learner_that_is_missing_or_older(rounds, tmp_path):
    before, learner = contents(rounds), rounds.parent / 'explorer.msgpack'
    for kept, message in (
        (None, r'explorer\.msgpack is missing'),
        (1, r'older copy, which has learnt from 2 episodes'),
    ):
        learner.unlink(missing_ok=True)
        if kept:
            shutil.copy(rounds.parent / f'explorer.{kept}', learner)
        with pytest.raises(UserError, match=rf'{message}.*episode_000005_12.*--exorl_dir.*--overwrite') as refused:
            collect(tmp_path, 'rnd', episodes=6)
        assert contents(rounds) == before and '\n' not in str(refused.value)
    shutil.copy(rounds.parent / 'explorer.2', learner)  # It lacks one round, which it makes again.
    collect(tmp_path, 'rnd', episodes=6)
    assert contents(rounds) == before
    learner.unlink()
    collect(tmp_path, 'rnd', episodes=6, overwrite=True)
    assert contents(rounds) == before  # Made by the same command on the same machine.
    for path in rounds.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r'none of the 6 episodes.*put them back.*--overwrite'):
        collect(tmp_path, 'rnd', episodes=6)


def test_rnd_goes_on_without_a_lost_episode_and_makes_up_for_it(rounds, tmp_path, capsys):
    before = contents(rounds)
    lost = rounds / f'episode_000001_{STEPS}.npz'
    lost.write_bytes(lost.read_bytes()[:900])
    with pytest.raises(UserError, match=r'episode_000001_12\.npz cannot be read.*delete it.*make another in its place'):
        collect(tmp_path, 'rnd', episodes=6)
    lost.unlink()
    capsys.readouterr()
    collect(tmp_path, 'rnd', episodes=6)
    output = capsys.readouterr().out
    assert 'continuing: 5 episodes are already there' in output and '1 more are lost' in output
    after = contents(rounds)
    assert sorted(after) == [f'episode_{index:06d}_{STEPS}.npz' for index in (0, 2, 3, 4, 5, 6, 7)]
    assert {name: after[name] for name in before if name != lost.name} == {
        name: content for name, content in before.items() if name != lost.name
    }
    collect(tmp_path, 'rnd', episodes=6)  # There are enough: nothing is added, nothing lost.
    assert contents(rounds) == after


# --- The commands ---


def command(module, *arguments):
    return subprocess.run(
        [sys.executable, '-m', f'envs.{module}', *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
def test_the_command_in_processes_of_its_own(tmp_path):
    flags = ['--policy=rnd', '--domain=cheetah', f'--exorl_dir={tmp_path}', '--episode_length=8', '--workers=2']
    result = command('collect_exorl', *flags, '--num_envs=3', '--num_transitions=40')
    assert result.returncode == 0, result.stderr
    assert 'cells visited' in result.stdout
    paths = exorl_episodes.list_episodes(exorl_episodes.buffer_path(tmp_path, 'cheetah', 'rnd'))
    assert [path.name for path in paths] == [f'episode_{index:06d}_8.npz' for index in range(6)]  # Whole rounds.
    for path in paths:
        episode = exorl_episodes.read_episode(path, 'cheetah', ('observation', 'action', 'physics'))
        assert episode['action'][1:].any(axis=1).all()


def test_bad_flags_are_one_line(tmp_path):
    for arguments, message in ((['--domain=walkr'], 'did you mean walker'), (['--policy=icm'], 'policy')):
        result = command('collect_exorl', f'--exorl_dir={tmp_path}', *arguments)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and message in result.stderr, result
    assert not list(tmp_path.iterdir())
