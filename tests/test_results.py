"""Collecting runs: what counts, what is named and left out, what is one method; scores and tables by hand; the command
as a process."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import envs
from tests.tiny_runs import CUBE, write_run
from utils import results, runs, tables
from utils.collected_runs import AGENT_TITLES, collect
from utils.errors import UserError
from utils.run_status import FINISHED, run_status

ROOT = Path(__file__).resolve().parents[1]


def rows_of(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def reason(collection, run):
    (text,) = [text for name, text in collection.left_out if name == run]
    return text


# ------------------------------------------------------------------------------------------------------------ scores


def test_scores_by_hand(tmp_path):
    write_run(tmp_path, 'g/a', {3: [0.0, 0.9, 0.2, 0.3, 0.7], 4: [0.0, 0.0, 0.0, 0.0, 0.0]})
    first, second = collect(tmp_path).curves
    assert (first.run, first.method, first.seed, first.unit) == ('g/a', 'InFOM', 3, 'success %')
    assert first.steps.tolist() == [0, 100, 200, 300, 400]  # of fine-tuning
    assert first.values.tolist() == pytest.approx([0, 90, 20, 30, 70])
    assert first.score == pytest.approx(40.0)
    assert first.scores == pytest.approx(
        {'evaluations': 5, 'first': 0, 'final': 70, 'final_three': 40, 'best': 90, 'drop': 50, 'stability': 4 / 9}
    )
    assert second.scores['stability'] is None
    assert second.scores['drop'] == 0


def test_exorl_is_scored_by_return(tmp_path):
    write_run(tmp_path, 'g/a', {0: [10.0, 250.0, 350.0, 300.0]}, env_name='walker_flip')
    (curve,) = collect(tmp_path).curves
    assert (curve.unit, curve.domain, curve.score) == ('return', 'walker', 300.0)


def test_own_data_are_a_task_of_their_own_beside_the_benchmarks(tmp_path):
    """Two data sets in one environment, and a task of the benchmark; none of the files exists. Returns may be negative,
    and no scale makes them comparable with the benchmark's."""
    for name, dataset, agent in (
        ('a', '/far/away/sorting.npz', 'infom'),
        ('b', '/elsewhere/sorting.npz', 'iql'),
        ('c', 'minari:mujoco/hopper/medium-v0', 'infom'),
    ):
        settings = {'dataset': dataset}
        write_run(
            tmp_path, f'g/{name}', {0: [-4.0, -3.0, -2.0]}, env_name='Sorter-v0', agent=agent, settings=settings,
            explicit=('dataset',),
        )  # fmt: skip
    write_run(tmp_path, 'g/d', {0: [0.5, 0.5, 0.5]})
    collection = collect(tmp_path)
    curves = {curve.run: curve for curve in collection.curves}
    assert not collection.left_out
    assert [(curve.method, curve.env_name, curve.domain) for _, curve in sorted(curves.items())] == [
        ('InFOM', 'custom-sorting', 'custom-sorting'),
        ('IQL', 'custom-sorting', 'custom-sorting'),
        ('InFOM', 'custom-mujoco-hopper-medium-v0', 'custom-mujoco-hopper-medium-v0'),
        ('InFOM', CUBE.format(1), 'cube-single'),
    ]
    assert (curves['g/a'].unit, curves['g/a'].score) == ('return', -3.0)
    titles = [table.title for table in tables.all_tables(collection.curves)]
    assert titles == [
        'cube-single (success %)', 'custom-mujoco-hopper-medium-v0 (return)', 'custom-sorting (return)', 'Stability',
        'Probability of improvement',
    ]  # fmt: skip
    output = tmp_path / 'out'
    results.write_results(collection, output.with_suffix('.csv'), ['*'])
    read = {curve.run: curve for curve in results.read_results(output.with_suffix('.csv'))}
    assert {run: (curve.env_name, curve.score) for run, curve in read.items()} == {
        run: (curve.env_name, curve.score) for run, curve in curves.items()
    }


# ------------------------------------------------------------------------------------------ what counts, what does not


def test_nothing_to_collect_is_refused(tmp_path):
    with pytest.raises(UserError, match='not a directory'):
        collect(tmp_path / 'absent')
    with pytest.raises(UserError, match='no run in'):
        collect(tmp_path)
    write_run(tmp_path, 'g/a', {0: [0.0, 0.5]}, finished=False)
    with pytest.raises(UserError, match=r'no finished run.*g/a: not finished: at step 100 of 200'):
        collect(tmp_path)


def test_unfinished_and_damaged_runs_are_named_and_left_out(tmp_path):
    write_run(tmp_path, 'g/good', {0: [0.1, 0.2, 0.3]})
    write_run(tmp_path, 'g/crashed', {1: [0.1, 0.2, 0.3]}, finished=False)
    (write_run(tmp_path, 'g/cut', {2: [0.1, 0.2, 0.3]}) / 'config.json').write_text('{"agent_na')
    (write_run(tmp_path, 'g/garbled', {3: [0.1, 0.2]}) / 'metrics.jsonl').write_text('{}\nnonsense\n')
    (write_run(tmp_path, 'g/empty', {4: [0.1, 0.2]}) / 'metrics.jsonl').unlink()
    (write_run(tmp_path, 'g/keyless', {5: [0.1, 0.2]}) / 'config.json').write_text('{}')
    (write_run(tmp_path, 'g/started', {6: [0.1, 0.2]}) / 'config.json').unlink()
    (write_run(tmp_path, 'g/listed', {7: [0.1, 0.2]}) / 'summary.json').write_text('[]')
    unknown = write_run(tmp_path, 'g/unknown', {8: [0.1, 0.2]})
    config = json.loads((unknown / 'config.json').read_text())
    (unknown / 'config.json').write_text(json.dumps(config | {'env_name': 'cube-single-play-singletask-task9-v0'}))
    collection = collect(tmp_path)
    assert [curve.run for curve in collection.curves] == ['g/good']
    assert reason(collection, 'g/crashed') == 'not finished: at step 200 of 300'
    assert reason(collection, 'g/cut').startswith('config.json is damaged')
    assert 'line 2 is not a JSON object' in reason(collection, 'g/garbled')
    assert reason(collection, 'g/empty') == 'stopped before the first line of metrics'
    assert 'pretraining_steps' in reason(collection, 'g/keyless')
    assert reason(collection, 'g/started') == 'config.json is missing'
    assert 'summary.json is damaged' in reason(collection, 'g/listed')
    assert 'unknown task' in reason(collection, 'g/unknown')
    assert len(collection.left_out) == 8


def test_a_run_made_longer_and_then_stopped_is_not_finished(tmp_path):
    directory = write_run(tmp_path, 'g/a', {0: [0.1, 0.2]})
    assert run_status(directory) == FINISHED
    config = json.loads((directory / 'config.json').read_text())
    (directory / 'config.json').write_text(json.dumps(config | {'finetuning_steps': 400}))
    assert run_status(directory) == 'not finished: at step 200 of 500'
    (directory / 'config.json').write_text(json.dumps(config))
    with runs.MetricsLog(directory / 'metrics.jsonl') as log:
        log.write(350, 'finetuning', 0, {'evaluation/episode.success': 1.0})
    assert run_status(directory) == 'not finished: at step 350 of 350'


def test_a_run_without_evaluations_of_a_seed_is_left_out(tmp_path):
    write_run(tmp_path, 'g/a', {0: [0.1, 0.2, 0.3]})
    write_run(tmp_path, 'g/half', {1: [0.1, 0.2], 2: []})
    collection = collect(tmp_path)
    assert 'no evaluation/episode.success of seed 2' in reason(collection, 'g/half')


def test_evaluations_out_of_order_are_damage(tmp_path):
    write_run(tmp_path, 'g/a', {0: [0.1, 0.2, 0.3]})
    directory = write_run(tmp_path, 'g/twice', {1: [0.1, 0.2, 0.3]})
    lines = (directory / 'metrics.jsonl').read_text().splitlines()
    (directory / 'metrics.jsonl').write_text('\n'.join([*lines, lines[-1]]) + '\n')
    assert 'seed 1 are not in the order' in reason(collect(tmp_path), 'g/twice')


def test_unequal_lengths_are_never_averaged(tmp_path):
    """Within a run they are damage; of two runs, the steps set the methods apart."""
    write_run(tmp_path, 'g/uneven', {0: [0.1, 0.2, 0.3], 1: [0.1, 0.2]})
    write_run(tmp_path, 'g/long', {2: [0.1, 0.2, 0.3, 0.4]})
    write_run(tmp_path, 'g/short', {3: [0.1, 0.2, 0.3]})
    collection = collect(tmp_path)
    assert 'evaluations of seed 1 are not at the steps of seed 0' in reason(collection, 'g/uneven')
    assert {curve.run: curve.method for curve in collection.curves} == {
        'g/long': 'InFOM finetuning_steps=300',
        'g/short': 'InFOM finetuning_steps=200',
    }


def test_runs_of_unequal_lengths_compare_at_a_common_one(tmp_path):
    """Scores, the last values of metrics and results.csv are those that the longer run had then."""
    write_run(tmp_path, 'g/long', {2: [0.1, 0.2, 0.3, 0.9, 0.9]}, explicit=['finetuning_steps'])
    write_run(tmp_path, 'g/short', {3: [0.1, 0.2, 0.6]}, explicit=['finetuning_steps'])
    write_run(tmp_path, 'g/shorter', {4: [0.1, 0.2]}, explicit=['finetuning_steps'])
    tuned = write_run(tmp_path, 'g/tuned', {5: [0.0, 0.3, 0.6, 1.0]}, agent='iql', explicit=['finetuning_steps'])
    config = json.loads((tuned / 'config.json').read_text())
    config |= {'pretraining_steps': 0, 'start': {'steps_before': config['pretraining_steps']}}  # as finetune.py has it
    (tuned / 'config.json').write_text(json.dumps(config))
    collection = collect(tmp_path, finetuning_steps=200)
    assert {curve.run: (curve.method, curve.steps[-1]) for curve in collection.curves} == {
        'g/long': ('InFOM', 200),
        'g/short': ('InFOM', 200),
        'g/tuned': ('IQL', 200),
    }
    assert [curve.score for curve in collection.curves] == pytest.approx([20, 30, 30])
    assert reason(collection, 'g/shorter') == 'it has 100 fine-tuning updates, fewer than 200'
    assert collection.notes[0] == 'All runs as after 200 fine-tuning updates.'
    with pytest.raises(UserError, match='g/long: it was not evaluated after 150 fine-tuning updates'):
        collect(tmp_path, finetuning_steps=150)
    long = next(run for run in collection.runs if run.name == 'g/long')
    assert long.last[2]['evaluation/episode.success'] == 0.3
    results.write_results(collection, tmp_path / 'results.csv', ['*'])
    assert [line['step'] for line in rows_of(tmp_path / 'results.csv') if line['run'] == 'g/long'] == [
        '100', '100', '200', '300',
    ]  # fmt: skip


def test_a_stopped_run_counts_at_a_length_that_it_has_reached(tmp_path):
    """Whether it was killed, or stopped after it had been made longer; not if an evaluation there is missing of one of
    its seeds."""
    write_run(tmp_path, 'g/whole', {2: [0.1, 0.2, 0.3]})
    write_run(tmp_path, 'g/killed', {3: [0.1, 0.2, 0.6, 0.9, 0.9]}, finished=False)
    half = write_run(tmp_path, 'g/half', {4: [0.1, 0.2, 0.3, 0.4], 5: [0.1, 0.2, 0.3, 0.4]}, finished=False)
    lines = (half / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (half / 'metrics.jsonl').write_text(''.join(lines[:-1]))
    (write_run(tmp_path, 'g/cut', {6: [0.1, 0.2, 0.3, 0.4]}) / 'config.json').write_text('{"agent_na')
    assert [curve.run for curve in collect(tmp_path).curves] == ['g/whole']
    collection = collect(tmp_path, finetuning_steps=200)
    assert {curve.run: curve.score for curve in collection.curves} == pytest.approx({'g/killed': 30, 'g/whole': 20})
    assert reason(collection, 'g/half') == 'it was not evaluated after 200 fine-tuning updates'
    assert reason(collection, 'g/cut').startswith('config.json is damaged')
    with pytest.raises(UserError, match=r'g/killed: not finished: at step 400 of 500'):
        collect(tmp_path, finetuning_steps=400)


def test_one_seed_in_two_runs_is_left_out_of_both(tmp_path):
    write_run(tmp_path, 'a/same', {0: [0.1, 0.2, 0.3], 1: [0.1, 0.2, 0.3]})
    write_run(tmp_path, 'b/same', {1: [0.9, 0.9, 0.9], 2: [0.1, 0.2, 0.3]})
    collection = collect(tmp_path)
    assert [(curve.run, curve.seed) for curve in collection.curves] == [('a/same', 0), ('b/same', 2)]
    assert 'seed 1 of InFOM' in reason(collection, 'a/same')
    assert 'is in a/same, too' in reason(collection, 'b/same')


def test_one_name_in_two_groups_is_two_runs(tmp_path):
    write_run(tmp_path, 'a/same', {0: [0.1, 0.2, 0.3]})
    write_run(tmp_path, 'b/same', {1: [0.1, 0.2, 0.3]})
    collection = collect(tmp_path)
    assert [curve.run for curve in collection.curves] == ['a/same', 'b/same']
    assert {curve.method for curve in collection.curves} == {'InFOM'}


def test_a_default_task_and_its_number_are_one_task(tmp_path):
    """Of images the benchmark has task 1 alone: their default task has no number there."""
    names = ('scene-play-singletask-v0', 'scene-play-singletask-task2-v0', 'visual-scene-play-singletask-v0')
    for seed, env_name in enumerate(names):
        write_run(tmp_path, f'g/{seed}', {seed: [0.1, 0.2, 0.3]}, env_name=env_name)
    assert [curve.env_name for curve in collect(tmp_path).curves] == [names[1], names[1], names[2]]
    write_run(tmp_path, 'g/3', {1: [0.1, 0.2, 0.3]}, env_name=names[0])
    assert 'is in g/1, too' in reason(collect(tmp_path), 'g/3')


# ---------------------------------------------------------------------------------------------- what is one method


def test_fine_tunings_of_other_pretrainings_are_told_apart(tmp_path):
    """By what was pre-trained, not by where it lies or with which seed; and one pre-training under two seeds is said to
    be one."""

    def tuned(name, seed, digest, pretraining_seed):
        start = {'steps_before': 0, 'pretraining': {'digest': digest, 'seed': pretraining_seed, 'step': 50}}
        write_run(tmp_path, f'g/{name}', {seed: [0.1, 0.2, 0.3]}, settings={'start': start})

    tuned('a', 0, 'aaaaaaaa', 0)
    tuned('b', 1, 'aaaaaaaa', 1)
    assert {curve.method for curve in collect(tmp_path).curves} == {'InFOM'}
    tuned('c', 2, 'cccccccc', 2)
    tuned('d', 3, 'aaaaaaaa', 0)
    collection = collect(tmp_path)
    assert {curve.run: curve.method for curve in collection.curves} == {
        'g/a': 'InFOM pretraining=aaaaaaaa',
        'g/b': 'InFOM pretraining=aaaaaaaa',
        'g/c': 'InFOM pretraining=cccccccc',
        'g/d': 'InFOM pretraining=aaaaaaaa',
    }
    assert 'g/d: seed 3 is of fine-tuning alone, its pre-training has seed 0.' in collection.notes


def test_methods_on_different_data_are_said_to_be(tmp_path):
    for name, agent, fingerprint in (('a', 'infom', 'a' * 64), ('b', 'iql', 'b' * 64), ('c', 'rebrac', 'a' * 64)):
        directory = write_run(tmp_path, f'g/{name}', {0: [0.1, 0.2, 0.3]}, agent=agent)
        config = json.loads((directory / 'config.json').read_text())
        config['data'] = {'finetuning/train': {'fingerprint': fingerprint}}
        (directory / 'config.json').write_text(json.dumps(config))
    (note,) = [note for note in collect(tmp_path).notes if 'different data' in note]
    assert note == f'{CUBE.format(1)}: fine-tuned on different data: aaaaaaaa (InFOM, ReBRAC); bbbbbbbb (IQL).'


def test_own_data_in_two_environments_are_never_averaged(tmp_path):
    for seed, env_name in enumerate(('Sorter-v0', 'Sorter-v1')):
        settings = {'dataset': 'sorting.npz'}
        write_run(tmp_path, f'g/{seed}', {seed: [0.1, 0.2, 0.3]}, env_name=env_name, settings=settings)
    assert {curve.method for curve in collect(tmp_path).curves} == {
        'InFOM env_id=Sorter-v0',
        'InFOM env_id=Sorter-v1',
    }
    results.write_results(collect(tmp_path), tmp_path / 'results.csv', ['*'])
    assert [curve.env_name for curve in results.read_results(tmp_path / 'results.csv')] == ['custom-sorting'] * 2


def test_what_the_command_line_chose_makes_the_method(tmp_path):
    write_run(tmp_path, 'g/a', {0: [0.1, 0.2, 0.3]}, explicit=['preset'])
    write_run(tmp_path, 'g/b', {0: [0.1, 0.2, 0.3]}, settings={'agent.alpha': 3.0}, explicit=['agent.alpha', 'preset'])
    # The preset's own value of another task: the same method.
    write_run(
        tmp_path, 'g/c', {0: [0.1, 0.2, 0.3]}, env_name=CUBE.format(2), settings={'agent.alpha': 300.0},
        explicit=['preset'],
    )  # fmt: skip
    collection = collect(tmp_path)
    assert [curve.method for curve in collection.curves] == ['InFOM', 'InFOM alpha=3.0', 'InFOM']
    assert [curve.settings for curve in collection.curves] == [
        {'agent.alpha': 10.0},
        {'agent.alpha': 3.0},
        {'agent.alpha': 300.0},
    ]
    assert 'All runs: preset=small.' in collection.notes


@pytest.mark.parametrize('change', [{'settings': {'agent.tau': 0.1}}, {'fingerprint': 'e' * 64}])
def test_settings_or_data_that_differ_behind_the_same_command_are_never_averaged(tmp_path, change):
    write_run(tmp_path, 'g/a', {0: [0.1, 0.2, 0.3]}, settings={'agent.tau': 0.005})
    write_run(tmp_path, 'g/b', {1: [0.1, 0.2, 0.3]}, **({'settings': {'agent.tau': 0.005}} | change))
    first, second = (curve.method for curve in collect(tmp_path).curves)
    assert first != second
    assert ('tau=0.005' in first) if 'settings' in change else ('data=' in first)


def test_mixed_versions_are_named(tmp_path):
    write_run(tmp_path, 'g/a', {0: [0.1, 0.2, 0.3]})
    write_run(tmp_path, 'g/b', {1: [0.1, 0.2, 0.3]}, environment={'git_commit': 'def', 'packages': {'jax': '0.11.0'}})
    (note,) = [note for note in collect(tmp_path).notes if 'mixed versions' in note]
    for part in ('git_commit abc (g/a) / def (g/b)', 'jax 0.10.2 (g/a) / 0.11.0 (g/b)'):
        assert part in note


def test_missing_seeds_and_short_runs_are_named(tmp_path):
    write_run(tmp_path, 'g/a', {0: [0.1, 0.2, 0.3], 1: [0.1, 0.2, 0.3]})
    write_run(tmp_path, 'g/b', {0: [0.1, 0.2]}, agent='iql')
    notes = '\n'.join(collect(tmp_path).notes)
    assert f'IQL has fewer seeds than others: 1 of 2 on {CUBE.format(1)}' in notes
    assert 'Fewer than three evaluations, all of which make the score: g/b' in notes


def test_trainings_under_several_names_are_named(tmp_path):
    base = {'agent.latent_dim': 512, 'agent.num_flow_goals': 16}
    for key, value in (('agent.latent_dim', 512), ('agent.latent_dim', 64), ('agent.num_flow_goals', 16)):
        for task in (1, 2):
            write_run(
                tmp_path, f'{key}/{value}-{task}', {0: [0.1, 0.2, 0.3]}, env_name=CUBE.format(task),
                settings={**base, key: value}, explicit=[key],
            )  # fmt: skip
    assert collect(tmp_path).notes == [
        'The same settings and seeds under 2 names: InFOM latent_dim=512; InFOM num_flow_goals=16 '
        f'(on {CUBE.format(1)}, {CUBE.format(2)}). Sensitivities count each seed once.'
    ]


def test_trainings_on_different_data_are_not_one_under_two_names(tmp_path):
    settings = {'agent.latent_dim': 512, 'agent.num_flow_goals': 16}
    for key, fingerprint in zip(settings, ('a' * 64, 'b' * 64)):
        write_run(tmp_path, f'g/{key}', {0: [0.1] * 3}, settings=settings, explicit=[key], fingerprint=fingerprint)
    collection = collect(tmp_path)
    assert not [note for note in collection.notes if 'names' in note]
    assert len({curve.training for curve in collection.curves}) == 2
    assert len({curve.settings['data'] for curve in collection.curves}) == 2


def test_a_setting_that_a_run_lacks_is_none_and_one_that_its_agent_lacks_is_absent(tmp_path):
    """In results.csv, too, where an empty text is a third thing."""
    for seed, value in enumerate((None, '', 4)):
        settings = {'agent.new': value}
        write_run(tmp_path, f'g/{seed}', {seed: [0.1, 0.2, 0.3]}, settings=settings, explicit=['agent.new'])
    write_run(tmp_path, 'g/old', {3: [0.1, 0.2, 0.3]})
    write_run(tmp_path, 'g/other', {0: [0.1, 0.2, 0.3]}, agent='iql')
    collection = collect(tmp_path)
    results.write_results(collection, tmp_path / 'results.csv', ['*'])
    for curves in (collection.curves, results.read_results(tmp_path / 'results.csv')):
        assert {curve.run: curve.settings for curve in curves} == {
            'g/0': {'agent.new': None},
            'g/1': {'agent.new': ''},
            'g/2': {'agent.new': 4},
            'g/old': {'agent.new': None},
            'g/other': {},
        }


# ---------------------------------------------------------------------------------------------------------- tables


@pytest.fixture
def two_methods(tmp_path):
    """InFOM with two seeds on two tasks, IQL with two seeds and one."""
    write_run(tmp_path, 'g/a', {0: [0.0, 0.2, 0.2, 0.2], 1: [0.0, 0.6, 0.6, 0.6]})
    write_run(tmp_path, 'g/b', {0: [0.0, 1.0, 1.0, 1.0], 1: [0.0, 0.9, 0.9, 0.9]}, env_name=CUBE.format(2))
    write_run(tmp_path, 'g/c', {0: [0.0, 0.3, 0.3, 0.3], 1: [0.0, 0.1, 0.1, 0.1]}, agent='iql')
    write_run(tmp_path, 'g/d', {0: [0.0, 0.5, 0.2, 0.2]}, agent='iql', env_name=CUBE.format(2))
    return tmp_path


def test_a_domain_table_by_hand(two_methods):
    table = tables.domain_table('cube-single', collect(two_methods).curves)
    assert table.header == ['', 'task1', 'task2', 'average']
    infom, infom_published, iql, iql_published = table.rows
    # Standard deviations of (20, 60) and (100, 90): 20√2 and 5√2; their mean 12.5√2 = 17.7.
    assert infom == ['InFOM', '40.0 ± 28.3 (2)', '95.0 ± 7.1 (2)', '67.5 ± 17.7']
    assert infom_published == ['InFOM (published)', '92.5 ± 4.0', '78.4 ± 12.3', '77.7 ± 21.3']
    assert iql == ['IQL', '20.0 ± 14.1 (2)', '30.0 (1)', '25.0']
    assert iql_published == ['IQL (published)', '–', '–', '44.4 ± 10.1']


def test_no_average_over_fewer_tasks_than_others_have(two_methods):
    shutil.rmtree(two_methods / 'g' / 'd')
    rows = {row[0]: row for row in tables.domain_table('cube-single', collect(two_methods).curves).rows}
    assert rows['IQL'] == ['IQL', '20.0 ± 14.1 (2)', '–', '–']


def test_the_stability_table_by_hand(two_methods):
    rows = {row[0]: row for row in tables.stability_table(collect(two_methods).curves, ['cube-single']).rows}
    # IQL: final three 30, 10, 30; best 30, 10, 50; ratios 1, 1, 0.6.
    assert rows['IQL'] == ['IQL', 'cube-single', '23.3', '30.0', '6.7', '0.87', '3']


def test_aggregates_by_hand(two_methods):
    overall, improvement = tables.aggregate_tables(tables.scores_by_task(collect(two_methods).curves))
    rows = {row[0]: row for row in overall.rows}
    # InFOM's runs 20 60 90 100: the middle two; IQL's 10 30 30: 3 // 4 = 0 are left out.
    assert rows['InFOM'][1].startswith('75.0 [')
    assert rows['IQL'][1].startswith('23.3 [')
    assert rows['IQL'][3].startswith('25.0 [')
    assert rows['IQL'][4] == '3'
    # Task 1: 20 and 60 against 30 and 10: 3 of 4. Task 2: 2 of 2.
    (row,) = improvement.rows
    assert row[0] == 'InFOM > IQL'
    assert row[1].startswith('0.88 [')
    assert row[2] == '2'


def test_the_scale_that_tasks_share(tmp_path):
    write_run(tmp_path, 'g/a', {0: [0.5, 0.5, 0.5]})
    write_run(tmp_path, 'g/b', {0: [100.0, 100.0, 100.0]}, env_name='jaco_reach_top_left')
    write_run(tmp_path, 'g/c', {0: [100.0, 100.0, 100.0]}, env_name='walker_flip')
    (overall,) = tables.aggregate_tables(tables.scores_by_task(collect(tmp_path).curves))
    assert overall.rows == [['InFOM', '33.3', '40.0', '33.3', '3']]  # 50 %, 100 of 250, 100 of 1000


def test_methods_without_a_common_task_are_not_aggregated(tmp_path):
    write_run(tmp_path, 'g/a', {0: [0.5, 0.5, 0.5]})
    write_run(tmp_path, 'g/b', {0: [0.5, 0.5, 0.5]}, agent='iql', env_name=CUBE.format(2))
    assert tables.aggregate_tables(tables.scores_by_task(collect(tmp_path).curves)) == []


def test_a_published_ablation_stands_beside_its_variant(tmp_path):
    settings = {'agent.intention_encoder': 'variational'}
    write_run(tmp_path, 'g/a', {0: [0.0, 500.0]}, env_name='walker_flip', settings=settings)
    write_run(
        tmp_path, 'g/b', {0: [0.0, 300.0]}, env_name='walker_flip', settings={'agent.intention_encoder': 'fb'},
        explicit=['agent.intention_encoder'],
    )  # fmt: skip
    rows = {row[0]: row for row in tables.domain_table('walker', collect(tmp_path).curves).rows}
    assert rows['InFOM (published)'] == ['InFOM (published)', '409.0 ± 13.0', '393.0 ± 46.0']
    assert rows['InFOM intention_encoder=fb (published)'] == ['InFOM intention_encoder=fb (published)', '254.0', '–']


def test_published_figures_are_of_the_setting_in_the_name_of_the_method(tmp_path):
    """Not of another one that varies elsewhere in the collection; with two of them, of the agent alone."""
    base = {'agent.expectile': 0.99, 'agent.latent_dim': 512}
    for seed, (expectile, latent_dim) in enumerate(((0.9, 512), (0.99, 128), (0.95, 64))):
        settings = {'agent.expectile': expectile, 'agent.latent_dim': latent_dim}
        explicit = [key for key, value in settings.items() if value != base[key]]
        write_run(
            tmp_path, f'g/{seed}', {0: [0.0, 500.0]}, env_name='walker_flip', settings=settings, explicit=explicit
        )
    rows = tables.domain_table('walker', collect(tmp_path).curves).rows
    assert [row[:2] for row in rows] == [
        ['InFOM expectile=0.9', '250.0 (1)'],
        ['InFOM expectile=0.9 (published)', '409.0'],
        ['InFOM expectile=0.95, latent_dim=64', '250.0 (1)'],
        ['InFOM (published)', '409.0 ± 13.0'],
        ['InFOM latent_dim=128', '250.0 (1)'],
        ['InFOM latent_dim=128 (published)', '379.0'],
    ]


def test_published_figures_are_of_known_agents_tasks_and_domains():
    with open(tables.PUBLISHED_PATH, newline='') as file:
        rows = list(csv.DictReader(file))
    names = set(envs.TASKS) | {tables.domain_of(task) for task in envs.TASKS}
    for row in rows:
        assert row['agent'] in AGENT_TITLES
        assert row['name'] in names
        assert row['metric'] == (
            'success %'
            if 'singletask' in row['name'] or '-' in row['name'] or row['name'] in ('scene', 'visual')
            else 'return'
        )
    assert len(tables.published()) == len(rows), 'a figure stands there twice'
    assert tables.published()['hilp_iql', (), 'quadruped'] == (527.0, 11.0)
    double = CUBE.format(1).replace('single-play', 'double-play')
    assert tables.published()['infom', ('num_flow_steps=20',), double] == (49.0, None)


def test_latex_has_nothing_that_latex_cannot_read(two_methods):
    text = results.report(collect(two_methods), 'latex')
    assert text.count(r'\begin{tabular}') == text.count(r'\end{tabular}') == 4
    assert r'InFOM $>$ IQL & 0.88 [' in text
    for line in text.splitlines():
        if not line.startswith('%'):
            assert not set(line) & set('±–÷−'), line
            assert '%' not in line.replace(r'\%', ''), line
            assert line.isascii(), line


# ---------------------------------------------------------------------------------------------------- the command


def command(*arguments):
    return subprocess.run(
        [sys.executable, '-m', 'utils.results', *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_writes_files_that_read_back(two_methods):
    write_run(two_methods, 'g/e', {5: [0.1, 0.2, 0.3]}, finished=False)
    result = command(two_methods)
    assert result.returncode == 0, result.stderr
    assert 'left out: g/e: not finished: at step 200 of 300' in result.stderr
    output = two_methods / 'results'
    assert '| IQL | 20.0 ± 14.1 (2) | 30.0 (1) | 25.0 |' in (output / 'tables.md').read_text()
    assert 'Left out: g/e' in (output / 'tables.md').read_text()
    lines = rows_of(output / 'results.csv')
    assert len(lines) == 7 + 7 * 4  # of each seed: one of pre-training, four evaluations
    first = [line for line in lines if line['run'] == 'g/a' and line['seed'] == '1']
    assert [line['step'] for line in first] == ['100', '100', '200', '300', '400']
    assert [line['evaluation/episode.success'] for line in first] == ['', '0.0', '0.6', '0.6', '0.6']
    assert [line['validation/flow_loss'] for line in first] == ['0.75', '', '', '', '']
    scores = rows_of(output / 'scores.csv')
    assert [float(row['final_three']) for row in scores] == pytest.approx([20, 60, 100, 90, 30, 10, 30])

    # Read back, the curves are the same; and collected again, the results are no run.
    def key(curve):
        return curve.run, curve.seed

    again, fresh = (
        sorted(curves, key=key)
        for curves in (results.read_results(output / 'results.csv'), collect(two_methods).curves)
    )
    for one, other in zip(again, fresh, strict=True):
        assert (one.method, one.variant, one.env_name) == (other.method, other.variant, other.env_name)
        assert one.settings == other.settings
        np.testing.assert_array_equal(one.steps, other.steps)
        np.testing.assert_array_equal(one.values, other.values)


def test_bad_input_ends_with_one_line_and_exit_code_2(two_methods, tmp_path):
    (tmp_path / 'empty').mkdir()
    for arguments, message in (
        ([tmp_path / 'empty'], 'no run in'),
        ([], 'missing argument: <save_dir>'),
        ([two_methods, 'more'], "unexpected argument 'more'"),
        ([two_methods, '--finetuning_steps=500'], 'g/a: it has 300 fine-tuning updates, fewer than 500'),
        ([two_methods, '--finetuning_steps=0'], '--finetuning_steps'),
        ([two_methods, '--metrics=speed'], '--metrics=speed matches no metric: there are evaluation/episode.length'),
    ):
        result = command(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith('error: '), result.stderr
        assert result.stderr.count('\n') == 1
        assert message in result.stderr


def test_a_csv_of_something_else_is_refused(tmp_path):
    path = tmp_path / 'x.csv'
    path.write_text('a,b\n1,2\n')
    with pytest.raises(UserError, match='has no column'):
        results.load_curves(path)
    with pytest.raises(UserError, match='cannot read'):
        results.read_results(tmp_path / 'absent.csv')


@pytest.mark.parametrize('missing', [2, 4, 12, 40])
def test_a_csv_that_is_cut_off_is_refused(two_methods, missing):
    """Inside its last row, wherever: what is left of a number looks like one."""
    path = two_methods / 'results.csv'
    results.write_results(collect(two_methods), path, ['evaluation/episode.success'])
    whole = path.read_bytes()
    assert whole.endswith(b',finetuning,400,0.2\n')
    path.write_bytes(whole[:-missing])
    with pytest.raises(UserError, match='is cut off inside its last line'):
        results.load_curves(path)


def test_a_csv_with_a_row_of_another_length_is_refused(two_methods):
    path = two_methods / 'results.csv'
    results.write_results(collect(two_methods), path, ['*'])
    lines = path.read_text().splitlines(keepends=True)
    for damaged in ('g/a,InFOM\n', lines[2].replace('\n', ',1\n')):
        path.write_text(''.join([*lines[:2], damaged, *lines[3:]]))
        with pytest.raises(UserError, match='line 3 has more or fewer cells'):
            results.load_curves(path)
