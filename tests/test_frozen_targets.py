"""`python -m benchmarks.frozen_targets`: critic and actor from the start, on a checkpoint's targets."""

import functools

import jax
import numpy as np
import pytest

import envs
from benchmarks import frozen_targets
from envs import data
from tests.test_infom_updates import equal
from tests.test_inspect import TASK, data_dir, make_run, training_data  # noqa: F401
from utils import datasets, inspect
from utils.errors import UserError
from utils.evaluation import Evaluator


def test_a_fresh_critic_learns_targets_that_stand_still(training_data):  # noqa: F811
    run = make_run(training_data, training_data, 'infom', data.PHASES)
    with Evaluator(functools.partial(envs.make_env, TASK), 1) as evaluator:
        rows = frozen_targets.measure(run, evaluator, updates=3_000, interval=1_500, episodes=1)
    assert [row[:4] for row in rows] == [('infom', 3, 20, 1_500), ('infom', 3, 20, 3_000)]
    found = {name: [row[at] for row in rows] for at, name in enumerate(frozen_targets.COLUMNS)}
    assert found['change_by_action'][0] == found['change_by_action'][1] > 0, 'the targets stand still'
    assert found['return'][1] == -200 and found['success'][1] == 0

    look = inspect.open_run(run)
    look.load()
    untrained = frozen_targets.agreements(look.agent, look.make_dataset(look.load_raw('finetuning')), jax.random.key(0))
    assert untrained['change_by_action'] == pytest.approx(found['change_by_action'][1], rel=1e-4)
    assert untrained['agreement_over_rows'] < 0.5 and found['agreement_over_rows'][1] > 0.7


def test_what_stands_still_and_what_is_fresh(training_data):  # noqa: F811
    look = inspect.open_run(make_run(training_data, training_data, 'infom', data.PHASES))
    pretrained, finetuned = (look.load_agent(path)[0] for path in look.checkpoints)
    moved = jax.tree.map(lambda x: x + 1, finetuned.params)
    agent = frozen_targets.on_frozen_targets(finetuned.replace(params=moved), pretrained)
    after, _ = agent.finetune(*_labelled(look), update_actor=True)
    for name in agent.params:
        fresh = name in ('critic', 'actor')
        assert equal(agent.params[name], (pretrained.params if fresh else moved)[name])
        assert equal(agent.params[name], after.params[name]) != fresh
    assert equal(agent.target_params, after.target_params)


def _labelled(look):
    _, look.normalizer, _ = look.load_agent(look.checkpoints[0])
    dataset = look.make_dataset(look.load_raw('finetuning'))
    return datasets.gather_batch(dataset, np.arange(8), {'next_actions'}), jax.random.key(0)


@pytest.mark.parametrize(
    ('agent', 'phases', 'message'),
    [
        ('iql', data.PHASES, 'iql: expected InFOM'),
        ('infom', data.PHASES[:1], 'no checkpoint of fine-tuning'),
        ('infom', data.PHASES[1:], 'fine-tuned without a pre-training'),
    ],
)
def test_what_it_is_not_for(agent, phases, message, training_data):  # noqa: F811
    run = make_run(training_data, training_data, agent, phases)
    with pytest.raises(UserError, match=message):
        frozen_targets.measure(run, None, updates=2, interval=2, episodes=1)


@pytest.mark.parametrize(('updates', 'interval'), [(8, 3), (6, 3)])
def test_intervals_that_do_not_fit(updates, interval, training_data):  # noqa: F811
    run = make_run(training_data, training_data, 'infom', data.PHASES)
    with pytest.raises(UserError, match='--interval=3: expected a divisor'):
        frozen_targets.measure(run, None, updates=updates, interval=interval, episodes=1)
