"""`python -m benchmarks.occupancy`: every kept checkpoint of every run, and what is made of the numbers."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import occupancy as benchmark
from envs import data
from tests.test_inspect import ROOT, data_dir, make_run  # noqa: F401
from utils import occupancy
from utils.errors import UserError
from utils.inspect import open_run

NUM_STATES = 3


def test_every_seed_and_checkpoint_on_the_same_states(data_dir, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(benchmark, 'NUM_FUTURES', 8)
    run = make_run(tmp_path, data_dir, 'infom', data.PHASES, num_seeds=2, obs_norm_per_split=True)
    rows, units = benchmark.score_run(run, 'g/infom', NUM_STATES)
    places = [(phase, step) for phase, step in (('pretraining', 10), ('finetuning', 20)) for _ in occupancy.PREDICTORS]
    assert [row[:5] for row in rows] == [
        ('g/infom', seed, *place, predictor)
        for seed in (3, 4)
        for place, predictor in zip(places, occupancy.PREDICTORS * 2, strict=True)
    ]
    scores = {row[:5]: row[5] for row in rows}
    for step, phase in ((10, 'pretraining'), (20, 'finetuning')):
        baselines = {scores['g/infom', seed, phase, step, 'marginal'] for seed in (3, 4)}
        assert len(baselines) == 1, 'the same states and numbers for all'
    assert len({scores['g/infom', seed, 'pretraining', 10, benchmark.SHOWN[0]] for seed in (3, 4)}) == 2
    assert len(units) == 2, 'each phase has a normaliser of its own'

    look = open_run(run, 4)
    look.raw = look.load_raw('pretraining')
    look.agent, look.normalizer, _ = look.load_agent(look.checkpoints[0])
    held_out = look.make_dataset(look.raw)
    report = occupancy.occupancy_report(look.agent, held_out, jax.random.key(0), NUM_STATES, 8)
    expected = report[benchmark.SHOWN[0]]['energy_distance']
    assert scores['g/infom', 4, 'pretraining', 10, benchmark.SHOWN[0]] == pytest.approx(expected, rel=1e-6)


def test_an_agent_without_futures_is_refused(data_dir, tmp_path):  # noqa: F811
    run = make_run(tmp_path, data_dir, 'iql', data.PHASES[:1])
    with pytest.raises(UserError, match='iql has no model of future states'):
        benchmark.score_run(run, 'g/iql', NUM_STATES)


def test_runs_of_one_name_are_told_apart_and_one_without_a_model_is_left_out(data_dir, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(benchmark, 'NUM_FUTURES', 8)
    for group in 'ab':
        make_run(tmp_path / group, data_dir, 'infom', data.PHASES[:1])
    make_run(tmp_path, data_dir, 'iql', data.PHASES[:1])
    rows, units, left_out = benchmark.score_runs(tmp_path, NUM_STATES)
    assert {row[0] for row in rows} == {'a/g/infom', 'b/g/infom'} and len(units) == 1
    assert len(left_out) == 1 and left_out[0].startswith('g/iql:')
    with pytest.raises(UserError, match='no model of future states'):
        benchmark.score_runs(tmp_path / 'g', NUM_STATES)


def test_seeds_are_no_part_of_a_label():
    names = 'a/ours_sd0', 'a/ours_sd0-7', 'x_sd3_pretraining', 'x_sd4_finetuning', 'sd'
    assert [benchmark.label_of(name) for name in names] == [
        'a/ours', 'a/ours', 'x_pretraining', 'x_finetuning', 'sd',
    ]  # fmt: skip


def rows_by_hand():
    flow, marginal = benchmark.SHOWN
    return [
        ('ours_sd0', 0, 'pretraining', 5000, flow, 1.0, 0.1),
        ('ours_sd0', 0, 'pretraining', 10000, flow, 0.5, 0.1),
        ('ours_sd1', 1, 'pretraining', 5000, flow, 3.0, 0.1),
        ('ours_sd1', 1, 'pretraining', 10000, flow, 0.7, 0.1),
        ('other_sd0-7', 0, 'pretraining', 5000, flow, 9.0, 0.1),
        ('ours_sd0', 0, 'pretraining', 5000, marginal, 2.0, 0.1),
    ]


def test_the_table_by_hand():
    # Standard deviations over seeds: |1 − 3|/√2 and |0.5 − 0.7|/√2.
    assert benchmark.table(rows_by_hand()).splitlines()[2:] == [
        '| ours | flow, z from the prior | 2.000 ± 1.414 | 0.600 ± 0.141 |',
        '| other | flow, z from the prior | 9.000 |  |',
        '| ours | marginal | 2.000 |  |',
    ]


def test_the_figure(tmp_path):
    benchmark.draw(rows_by_hand(), tmp_path / 'occupancy.png')
    assert (tmp_path / 'occupancy.png').stat().st_size > 5_000
    curves = benchmark.lines(rows_by_hand(), benchmark.SHOWN[0])
    np.testing.assert_array_equal(curves['ours'][1], ([5000, 10000], [3.0, 0.7]))


def test_no_run_is_named(tmp_path):
    result = subprocess.run(
        [sys.executable, '-m', 'benchmarks.occupancy', str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].endswith('expected directories that main.py or pretrain.py made')
