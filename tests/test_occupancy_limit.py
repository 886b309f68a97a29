"""`python -m benchmarks.occupancy_limit`: the same field, taught by the futures that came."""

import pytest

from benchmarks import occupancy, occupancy_limit
from envs import data
from tests.test_inspect import data_dir, make_run, training_data  # noqa: F401
from utils.errors import UserError

NUM_STATES = 16
FLOW, MARGINAL = occupancy.SHOWN


@pytest.fixture
def folder(training_data, monkeypatch):  # noqa: F811
    for module in (occupancy, occupancy_limit):
        monkeypatch.setattr(module, 'NUM_FUTURES', 16)
    return training_data


def test_the_field_learns_from_futures_and_is_scored_as_the_run_is(folder):
    run = make_run(folder, folder, 'infom', data.PHASES)
    rows = occupancy_limit.measure(run, updates=1_000, interval=700, num_states=NUM_STATES)
    of_the_run, _ = occupancy.score_run(run, 'infom', NUM_STATES)
    assert rows[:5] == of_the_run[:5]
    places = [('infom', 10), (occupancy_limit.LABEL, 700), (occupancy_limit.LABEL, 1_000)]
    flow = {(row[0], row[3]): row[5] for row in rows if row[4] == FLOW}
    marginal = {(row[0], row[3]): row[5] for row in rows if row[4] == MARGINAL}
    assert list(flow) == list(marginal) == places
    assert len(set(marginal.values())) == 1, 'the same states and futures for all'
    # Two episodes that lead to different places: who knows the state knows which.
    untrained, after_700, after_1000 = flow.values()
    assert after_1000 < after_700 < untrained
    assert after_1000 < 0.75 * marginal['infom', 10]


@pytest.mark.parametrize(
    ('agent', 'phases', 'message'),
    [
        ('iql', data.PHASES, 'iql on cube-single.*: expected InFOM on states'),
        ('infom', data.PHASES[1:], 'its first checkpoint is of finetuning'),
    ],
)
def test_what_it_is_not_for(agent, phases, message, folder):
    run = make_run(folder, folder, agent, phases)
    with pytest.raises(UserError, match=message):
        occupancy_limit.measure(run, updates=2, interval=2, num_states=2)
