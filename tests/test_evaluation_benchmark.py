"""The benchmark of evaluations: every number of workers takes its turns; evaluations that differ are no comparison."""

import functools
import itertools
import os
import types

import gymnasium
import numpy as np
import pytest

from benchmarks import evaluation

make_env = functools.partial(gymnasium.make, 'Pendulum-v1', max_episode_steps=4)


def test_every_number_of_workers_takes_its_turns():
    measured = evaluation.compare(make_env, lambda rows: np.zeros((1, len(rows), 1)), [1, 2], episodes=3, repeats=2)
    assert list(measured) == [1, 2]
    assert all(first > 0 and len(turns) == 2 and min(turns) > 0 for first, turns in measured.values())


def test_evaluations_that_differ_fail():
    calls = itertools.count()
    with pytest.raises(RuntimeError, match='the evaluations differ'):
        evaluation.compare(
            make_env, lambda rows: np.full((1, len(rows), 1), next(calls) % 7 / 7), [1], episodes=1, repeats=1
        )


def test_systems_that_cannot_say_which_cores_a_process_has(monkeypatch, capsys):
    monkeypatch.delattr(os, 'sched_getaffinity', raising=False)
    monkeypatch.setattr(evaluation, 'make_policy', lambda *_: None)
    monkeypatch.setattr(evaluation, 'compare', lambda *_: {1: (2.0, [1.0])})
    settings = {'env_name': 'walker_run', 'preset': 'smoke', 'workers': [], 'episodes': 3, 'repeats': 1}
    monkeypatch.setattr(evaluation, 'FLAGS', types.SimpleNamespace(**settings))
    evaluation.main([])
    assert f'walker_run, 3 episodes, {os.cpu_count()} cores' in capsys.readouterr().out


def test_the_policy_is_an_agents():
    policy = evaluation.make_policy('cube-single-play-singletask-task1-v0', 'smoke')
    actions = policy(np.ones((3, 28), np.float32))
    assert actions.shape == (1, 3, 5) and np.abs(actions).max() <= 1
    np.testing.assert_array_equal(actions[0, 0], actions[0, 1])
