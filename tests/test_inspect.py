"""`python -m utils.inspect` from a run on disk to its page: what is shown, what is left out, and what is refused."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import envs
from envs import custom, data, play
from tests import tiny, tiny_agents
from utils import checkpoints, inspect, inspect_parts, runs, training
from utils.datasets import Dataset, example_batch
from utils.errors import UserError
from utils.normalizers import Normalizer

ROOT = Path(__file__).resolve().parents[1]
TASK = 'cube-single-play-singletask-task1-v0'
SPEC = envs.task_spec(TASK)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """Held-out files of both phases: two short episodes of real play each."""
    folder = tmp_path_factory.mktemp('data')
    script = play.ScriptedPlay(SPEC.dataset_env)
    for number, phase in enumerate(data.PHASES):
        episodes = [script.episode((number, index), rows=41) for index in range(2)]
        arrays = {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}
        np.savez(data.task_path(SPEC, phase, 'val', folder), **arrays)
    return folder


@pytest.fixture
def training_data(data_dir, tmp_path):
    """A folder of data, whose held-out rows are those that are trained on."""
    for phase in data.PHASES:
        for split in ('train', 'val'):
            shutil.copy(data.task_path(SPEC, phase, 'val', data_dir), data.task_path(SPEC, phase, split, tmp_path))
    return tmp_path


def make_run(folder, data_dir, agent_name, phases, num_seeds=1, dataset=None, obs_norm_per_split=False):
    """A run directory as `utils.experiment` leaves one behind, of untrained tiny agents: a checkpoint after each
    phase. dataset: of the user's own. obs_norm_per_split: each phase's rows have a normaliser of their own."""
    if dataset:
        raw = {phase: custom.load_raw(dataset, phase, 'val') for phase in phases}
    else:
        raw = {phase: data.load_raw(TASK, phase, 'val', data_dir) for phase in phases}
    normalizer = Normalizer.fit(raw[phases[0]]['observations'], 'normal')
    config = tiny_agents.make_config(agent_name)
    example = example_batch(Dataset.create(raw[phases[0]], normalizer))
    seeds = list(range(3, 3 + num_seeds))
    agents = training.create_agents(tiny_agents.agents.load(agent_name).AGENT, seeds, example, config)
    run = runs.make_run_directory(folder / 'g' / agent_name)
    sources = {f'{phase}/val': raw[phase]['source'] for phase in phases}
    settings = {'agent_name': agent_name, 'seed': 3, 'num_seeds': num_seeds, 'dataset_dir': str(data_dir)}
    settings |= {'env_name': envs.NO_ENV if dataset else TASK, 'dataset': dataset}
    with runs.MetricsLog(run / 'metrics.jsonl') as log, checkpoints.CheckpointWriter(run / 'checkpoints') as writer:
        for number, phase in enumerate(phases, start=1):
            if obs_norm_per_split:
                normalizer = Normalizer.fit(raw[phase]['observations'], 'normal')
            for seed in seeds:
                log.write(10 * number - 5, phase, seed, {'training/loss': 2.0 / number, 'validation/loss': 3.0})
                log.write(10 * number, phase, seed, {'training/loss': 1.0 / number, 'validation/loss': 2.5})
                if phase == 'finetuning':
                    log.write(20, phase, seed, {'evaluation/episode.return': -7.25, 'evaluation/episode.success': 0.5})
            meta = {
                'phase': phase,
                'phase_step': 10,
                'agent_name': agent_name,
                'agent_config': config.to_dict(),
                'normalizer': normalizer.to_dict(),
                'seed': 3,
                'num_seeds': num_seeds,
            }
            writer.save(10 * number, agents, meta, keep=True)
    runs.write_json(run / 'config.json', {**settings, 'agent': config.to_dict(), 'data': sources})
    runs.write_summary(run)
    return run


@pytest.fixture
def small(monkeypatch):
    """As much as a test needs to see."""
    sizes = {
        'NUM_PRIOR_INTENTIONS': 1, 'NUM_FUTURES': 4, 'NUM_PICTURES': 1, 'NUM_VALUE_INTENTIONS': 2,
        'NUM_SCORED_STATES': 4, 'NUM_SCORED_FUTURES': 8,
    }  # fmt: skip
    for name, size in sizes.items():
        monkeypatch.setattr(inspect_parts, name, size)


def page_of(look):
    path = inspect.inspect_run(look)
    page = path.read_text()
    addresses = re.findall(r'(?:src|href|poster|action)\s*=\s*"([^"]*)"', page)
    assert all(address.startswith(('data:', '#s')) for address in addresses), 'opens offline'
    assert not re.search(r'https?://|url\(|@import|<script|<link', page)
    return page


def figures(run):
    return {path.name.removeprefix('inspect_') for path in (run / 'figures').iterdir()}


def rows_of(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_infom_from_run_to_page(data_dir, tmp_path, small):
    run = make_run(tmp_path, data_dir, 'infom', data.PHASES)
    (run / 'videos' / 'step_20.mp4').write_bytes(b'a film')
    (run / 'videos' / '.step_30.tmp.mp4').write_bytes(b'half a film')
    page = page_of(inspect.open_run(run, num_states=1))
    assert figures(run) == {
        'curves.png', 'futures.csv', 'futures_0.png', 'futures_0_pictures.png', 'intentions.csv', 'intentions.png',
        'occupancy.csv', 'occupancy.png', 'values.csv', 'values.png',
    }  # fmt: skip
    assert page.count('<img') == 6 and page.count('<video') == 1 and 'Left out' not in page and 'Mind' not in page
    assert '-7.25' in page, 'the score'
    occupancy = rows_of(run / 'figures' / 'inspect_occupancy.csv')
    assert [row['step'] for row in occupancy] == ['10'] * 5 + ['20'] * 5, 'every kept checkpoint'
    distances = {(row['step'], row['predictor']): row['energy_distance'] for row in occupancy}
    assert distances['10', 'marginal'] == distances['20', 'marginal'], 'the same states and draws'
    futures = rows_of(run / 'figures' / 'inspect_futures.csv')
    assert len(futures) == 2 * 4 and {row['intention'] for row in futures} == {'z inferred', 'z from the prior, 1'}
    values = rows_of(run / 'figures' / 'inspect_values.csv')
    assert len(values) == 40 and {'realised return', 'Q, as the actor sees it'} < set(values[0])


@pytest.mark.slow
def test_own_data_are_shown_by_numbered_observations(tmp_path, small):
    raw = tiny.random_walks(labelled=True)
    np.savez(tmp_path / 'mine.npz', **raw)
    run = make_run(tmp_path, None, 'infom', data.PHASES, dataset=str(tmp_path / 'mine.npz'))
    config = json.loads((run / 'config.json').read_text())
    config['data']['finetuning/val'] = {'fingerprint': 'another'}
    (run / 'config.json').write_text(json.dumps(config))
    page = page_of(inspect.open_run(run, num_states=1))
    assert page.count('Mind: mine.npz is not the file') == 1 and 'one step ahead of the realised return' in page
    assert figures(run) == {
        'curves.png', 'futures.csv', 'futures_0.png', 'intentions.csv', 'intentions.png', 'occupancy.csv',
        'occupancy.png', 'values.csv', 'values.png',
    }  # fmt: skip
    assert 'No pictures: mine.npz holds no states' in page and 'Left out' not in page
    columns = rows_of(run / 'figures' / 'inspect_futures.csv')[0]
    assert list(columns)[3:] == [f'observation {index}' for index in range(min(4, tiny.STATE_DIM))]


def test_what_another_agent_and_a_pretraining_run_leave_out(data_dir, tmp_path, small):
    run = make_run(tmp_path, data_dir, 'iql', ('pretraining', 'finetuning'), num_seeds=2)
    page = page_of(inspect.open_run(run, seed=4))
    assert figures(run) == {'curves.png', 'values.csv', 'values.png'}
    assert page.count('Left out: iql has no flow over future states.') == 3
    assert 'Seed 4' in page and 'episode.return, mean over seeds' in page
    with pytest.raises(UserError, match='has no seed 5: expected 3 to 4'):
        inspect.open_run(run, seed=5)

    run = make_run(tmp_path / 'pretrained', data_dir, 'iql', ('pretraining',))
    page = page_of(inspect.open_run(run))
    assert 'before fine-tuning there is no reward' in page and 'has not been evaluated' in page


def test_bad_input_is_told_in_one_line(data_dir, tmp_path):
    run = make_run(tmp_path, data_dir, 'iql', ('pretraining',))
    with pytest.raises(UserError, match=r'no data for .* does not exist'):
        inspect.inspect_run(inspect.open_run(run, dataset_dir=tmp_path / 'nowhere'))
    with pytest.raises(UserError, match='is not a run directory'):
        inspect.open_run(tmp_path)
    config = json.loads((run / 'config.json').read_text())
    (run / 'config.json').write_text(json.dumps({**config, 'env_name': 'cube-singel-play-singletask-v0'}))
    with pytest.raises(UserError, match='unknown task'):
        inspect.open_run(run)
    (run / 'config.json').write_text('{')
    with pytest.raises(UserError, match='is not a run directory'):
        inspect.open_run(run)
    (run / 'config.json').write_text(json.dumps(config))
    shutil.rmtree(run / 'checkpoints' / '10')
    with pytest.raises(UserError, match='no complete checkpoint'):
        inspect.open_run(run)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), 'error: missing argument: <run directory> (--help lists the flags)'),
        (('a', 'b'), "error: unexpected argument 'b': flags are written --name=value"),
        (('nowhere', '--seed=1'), 'error: nowhere is not a run directory'),
    ],
)
def test_the_command_line(arguments, message):
    result = subprocess.run(
        [sys.executable, '-m', 'utils.inspect', *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 2 and result.stderr.startswith(message) and result.stderr.count('\n') == 1


# --- Numbers ---


def test_principal_components_by_hand():
    points = np.array([[3.0, 0, 1], [-3, 0, 1], [0, 1, 1], [0, -1, 1]])
    projections, shares = inspect_parts.principal_components(points)
    np.testing.assert_allclose(np.abs(projections), [[3, 0], [3, 0], [0, 1], [0, 1]], atol=1e-12)
    np.testing.assert_allclose(shares, [0.9, 0.1])
    projections, shares = inspect_parts.principal_components(np.array([[1.0], [3.0]]))
    np.testing.assert_allclose(np.abs(projections), [[1, 0], [1, 0]])


def test_neighbours_are_those_of_other_episodes():
    points, labels = np.array([[0.0], [0.1], [5.0], [5.1]]), np.array([7, 7, 9, 9])
    assert inspect_parts.neighbour_accuracy(points, labels, np.array([0, 1, 0, 1]), count=1) == (1.0, 0.5)
    # Each episode has one label: no neighbour of another episode has it.
    assert inspect_parts.neighbour_accuracy(points, labels, np.array([0, 0, 1, 1]), count=1) == (0.0, 0.5)


def test_the_episode_with_the_most_varied_rewards():
    starts, ends = np.repeat([0, 3, 7], [3, 4, 3]), np.repeat([2, 6, 9], [3, 4, 3])
    rewards = np.array([0, 0, 9, 1, 0, 1, 0, 0, 0, -9.0])  # Of rows 2, 6 and 9 nobody learns anything.
    assert inspect_parts.most_varied_episode(rewards, starts, ends) == (3, 6)


def test_shown_states_are_spread_over_the_first_halves():
    raw = tiny.random_walks(num_episodes=3, num_transitions=20)  # Rows 0, 21 and 42 begin one.
    np.testing.assert_array_equal(inspect_parts.chosen_rows(tiny.make_dataset(raw), 3), [5, 26, 47])
