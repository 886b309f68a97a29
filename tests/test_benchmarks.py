"""The benchmark compares like with like: the host loop's losses are the agent's. The command prints what it says.

How fast anything is, is not tested here.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import arithmetic, host_loop, suite, throughput
from tests.tiny import ACTION_DIM, STATE_DIM, make_agent, make_batch, make_dataset, random_walks
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4


def host_params(agent):
    """The agent's parameters under the host loop's names."""

    def heads(params, mean, *others):
        names = {mean: 'Dense_0', **{name: f'Dense_{i + 1}' for i, name in enumerate(others)}}
        return {names.get(name, name): value for name, value in params.items()}

    def plain_field(params):
        rest, layers = params['rest'], len(agent.config.value_hidden_dims)
        field = {'Dense_0': {'kernel': params['first_kernel'], 'bias': params['first_bias']}}
        field |= {f'Dense_{i + 1}': rest[f'Dense_{i}'] for i in range(layers)}
        if 'first_norm' in params:
            field['LayerNorm_0'] = params['first_norm']
            field |= {f'LayerNorm_{i + 1}': rest[f'LayerNorm_{i}'] for i in range(layers - 1)}
        return field

    params = agent.params
    return {
        'vector_field': plain_field(params['vector_field']),
        'target_vector_field': plain_field(agent.target_params['vector_field']),
        'intention_encoder': heads(params['intention_encoder'], 'mean', 'log_std'),
        'critic': next(iter(params['critic'].values())),  # The ensemble's MLPs are the head's only submodule.
        'reward': params['reward']['MLP_0'],
        'actor': heads(params['actor'], 'mean'),
    }


def host_state(agent):
    state = host_loop.TrainState.create(jax.random.key(7), STATE_DIM, ACTION_DIM, agent.config, agent.flow_bounds)
    params = host_params(agent)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, state.params)
    return state.replace(params=params)


@pytest.fixture(scope='module')
def batch():
    return make_batch(3)


@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [{}, {'critic_latent_type': 'encoding', 'q_agg': 'mean', 'value_layer_norm': False, 'clip_flow_goals': False}],
    ids=['defaults', 'options'],
)
def test_the_host_loop_has_the_agents_losses(batch, options):
    agent = make_agent(batch, **options)
    state, key = host_state(agent), jax.random.key(5)

    def metrics(learner):
        finetuning_loss = jax.jit(learner.finetuning_loss, static_argnums=3)
        return {
            'pretraining': jax.jit(learner.pretraining_loss)(learner.params, batch, key)[1],
            **{flag: finetuning_loss(learner.params, batch, key, flag)[1] for flag in (False, True)},
        }

    ours, host = metrics(agent), metrics(state)
    assert ours.keys() == host.keys()
    for part, expected in ours.items():
        assert expected.keys() == host[part].keys()
        for name, value in expected.items():
            np.testing.assert_allclose(
                host[part][name], value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=f'{part} {name}'
            )


@pytest.mark.slow
def test_first_updates_agree(batch):
    """Gradients are the same, too: Adam's first step is their sign, and frozen modules have none in either loop."""
    agent = make_agent(batch)
    state, key = host_state(agent), jax.random.key(6)
    host_after, metrics = state.finetune(batch, key, full_update=True)
    ours_after, _ = jax.jit(agent.finetune, static_argnames='update_actor')(batch, key, update_actor=True)
    assert np.isfinite([metrics[name] for name in ('grad/max', 'grad/min', 'grad/norm')]).all()
    for name, expected in host_params(ours_after).items():
        close = jax.tree.map(
            lambda a, b: np.mean(np.abs(a - b) < 0.1 * agent.config.lr), host_after.params[name], expected
        )
        # A gradient of rounding errors alone (as of a bias before a norm) has a sign of its own in each loop.
        assert np.mean(jax.tree.leaves(close)) > 0.98, name


def test_host_batches_stay_inside_episodes():
    raw = random_walks(num_episodes=3, num_transitions=4, labelled=True)
    raw['observations'][:, 0] = np.arange(len(raw['observations']))
    dataset = make_dataset(raw)
    batch = host_loop.sample_batch(host_loop.row_arrays(jax.device_get(dataset)), np.random.default_rng(0), 500)
    rows, next_rows = (batch[name][:, 0].astype(int) for name in ('observations', 'next_observations'))
    np.testing.assert_array_equal(next_rows, rows + 1)
    # Each drawn transition has a next action: all of them are drawn, and no other.
    np.testing.assert_array_equal(np.unique(rows), dataset.next_action_rows)
    np.testing.assert_array_equal(batch['next_actions'], raw['actions'][next_rows])
    np.testing.assert_array_equal(batch['reward_observations'], batch['observations'])


@pytest.mark.slow
def test_the_command_prints_a_line_of_json():
    command = [sys.executable, '-m', 'benchmarks.throughput', '--agent=infom', '--preset=smoke']
    command += ['--precision=bfloat16', '--updates=2', '--finetuning_updates=3', '--repeats=2', '--rows=2000']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    for phase in ('pretrain', 'finetune'):
        assert report[f'{phase}_ratio'] > 0
        assert report[f'{phase}_ms'] > 0 and report[f'{phase}_host_ms'] > 0
    assert report['finetune_updates'] == 4  # Whole actor periods.
    for phase in ('pretrain', 'finetune'):  # The share is of the rate that stands beside it.
        reached = report[f'{phase}_gflop'] * report[f'{phase}_seed_updates_per_second']
        assert report[f'{phase}_matmul_share'] == pytest.approx(reached / report['matmul_gflops'], abs=2e-3, rel=5e-3)
    assert report['versions']['jax'] == jax.__version__ and report['precision'] == 'bfloat16'


def test_images_are_measured_without_a_ratio():
    problem = throughput.make_problem('infom', 'visual-scene-play-singletask-task1-v0', 'smoke', rows=20)
    dataset = problem.dataset('pretraining')
    assert dataset.observations.dtype == np.uint8 and (dataset.frame_stack, dataset.p_aug) == (3, 0.5)
    assert problem.example['observations'].shape == (1, 64, 64, 9)
    loops = {'ours': throughput.Loop(lambda: None, updates=4, first_seconds=2.0)}
    summary = throughput.summarize(loops, {'ours': [100.0, 300.0, 200.0]})
    assert summary == {
        'ms': 200.0, 'updates_per_second': 5.0, 'compile_seconds': pytest.approx(1.2), 'updates': 4,
        'seed_updates_per_second': 5.0,
    }  # fmt: skip
    assert 'host' not in throughput.table({'pretraining': summary})


@pytest.mark.parametrize(
    'flag, expected',
    [('--agent=nobody', 'nobody'), ('--env_name=visual-scene-play-singletask-task9-v0', 'unknown task')],
)
def test_what_cannot_be_measured_gets_one_line(flag, expected):
    result = subprocess.run(
        [sys.executable, '-m', 'benchmarks.throughput', '--preset=smoke', flag],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert expected in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_arithmetic_is_that_of_products_as_often_as_they_run():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert arithmetic.matmul_flops(lambda x, w: jnp.tanh(x @ w), x, w) == 2 * 3 * 4 * 5

    def loop(x):
        return jax.lax.scan(lambda x, _: (jax.nn.relu(x @ jnp.eye(4)), None), x, None, length=7)[0]

    assert arithmetic.matmul_flops(jax.jit(loop), x) == 7 * 2 * 3 * 4 * 4
    assert arithmetic.matmul_flops(jax.vmap(loop), jnp.ones((2, 3, 4))) == 2 * 7 * 2 * 3 * 4 * 4
    # Forward product, and backward one for the kernel (the input is a constant).
    assert arithmetic.matmul_flops(jax.value_and_grad(lambda w: (x @ w).sum()), w) == 2 * (2 * 3 * 4 * 5)
    # Where nobody asks for the value, the forward product is not computed.
    assert arithmetic.matmul_flops(jax.grad(lambda w: (x @ w).sum()), w) == 2 * 3 * 4 * 5
    branches = lambda flag: jax.lax.cond(flag, lambda: (x @ w).sum(), lambda: 0.0)  # noqa: E731
    assert arithmetic.matmul_flops(branches, True) == 2 * 3 * 4 * 5
    images, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 16))

    def convolve(images, kernel):
        layout = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(images, kernel, (1, 1), 'SAME', dimension_numbers=layout)

    assert arithmetic.matmul_flops(convolve, images, kernel) == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)


def test_shares_are_arithmetic_over_time_and_rate():
    loops = {'ours': throughput.Loop(lambda: None, updates=4, first_seconds=1.0, gflop=3.0)}
    summary = throughput.summarize(loops, {'ours': [100.0]}, num_seeds=2, matmul_gflops=120.0)
    assert summary['seed_updates_per_second'] == 20
    assert summary['matmul_share'] == 0.5  # 3 GFLOP, 20 times a second, of 120.


def test_any_agent_is_measured_alone():
    problem = throughput.make_problem('iql', 'cheetah_run', 'smoke', rows=2000)
    with ThreadPoolExecutor(1) as compilers:
        loop = throughput.prepare_loop(problem, 'pretraining', updates=2, num_seeds=2, compilers=compilers)()
    loop.run()
    assert loop.gflop > 0 and loop.megabytes > 0


def test_the_suite_keeps_one_line_for_each_entry_and_device(tmp_path):
    report = {
        'date': '2026-01-02', 'device': 'cpu', 'processor': 'P', 'cores': 2, 'agent': 'iql', 'env_name': 'cheetah_run',
        'preset': 'paper', 'batch_size': 32, 'num_seeds': 1, 'precision': 'highest', 'matmul_gflops': 100.0,
        'versions': {'jax': '1'},
    }  # fmt: skip
    for phase in ('pretrain', 'finetune'):
        report |= {f'{phase}_ms': 2.0, f'{phase}_seed_updates_per_second': 500.0, f'{phase}_compile_seconds': 1.0}
    assert suite.same_place(report, {**report, 'date': '2026-01-03', 'pretrain_ms': 9.0})
    assert not suite.same_place(report, {**report, 'device': 'gpu'})
    assert not suite.same_place(report, {**report, 'num_seeds': 8})
    assert not suite.same_place(report, {**report, 'precision': 'bfloat16'})
    assert not suite.same_place(report, {**report, 'batch_size': 256})
    reports = [report, {**report, 'device': 'gpu'}]
    suite.write(tmp_path / 'throughput.jsonl', reports, 'README.md', suite.markdown(reports))
    assert suite.read(tmp_path / 'throughput.jsonl') == reports
    text = (tmp_path / 'README.md').read_text()
    assert text.count('| iql | states | paper | 32 | 1 | highest | pre-training | 2.0 | 500.0 | 1.0 |') == 2
    assert '## cpu: 2 cores of P' in text and '## gpu: 2 cores of P' in text
    assert [json.loads(line)['device'] for line in (tmp_path / 'throughput.jsonl').open()] == ['cpu', 'gpu']


@pytest.mark.slow
def test_entries_are_compiled_side_by_side_and_measured_in_turn():
    short = {'preset': 'smoke', 'rows': 2000, 'updates': 2, 'finetuning_updates': 2, 'repeats': 1}
    entries = [{'agent': agent, **short} for agent in ('iql', 'rebrac')]
    reports = list(suite.measure(entries))
    assert [report['agent'] for report in reports] == ['iql', 'rebrac']
    assert [report['flags'] for report in reports] == entries
    assert all(report[f'{phase}_ms'] > 0 for report in reports for phase in ('pretrain', 'finetune'))
    with pytest.raises(UserError, match='num_seeds'):
        next(suite.measure([*entries, {'agent': 'iql', 'num_seeds': 0}]))


def test_entries_are_chosen_by_agent_or_task():
    entries = suite.ENTRIES['cpu']
    assert suite.chosen(entries, []) == entries
    assert [entry['agent'] for entry in suite.chosen(entries, ['iql', 'rebrac'])] == ['iql', 'rebrac']
    (images,) = suite.chosen(entries, ['visual'])
    assert images['env_name'].startswith('visual-')
    with pytest.raises(UserError, match='--only=iqq: no entry'):
        suite.chosen(entries, ['iqq'])


def test_every_entry_of_the_suite_can_be_measured():
    for entries in suite.ENTRIES.values():
        for entry in entries:
            known = {flag: entry.get(flag, default) for flag, default in
                     (('agent', None), ('env_name', suite.CUBE), ('preset', 'paper'))}  # fmt: skip
            problem = throughput.make_problem(**known, rows=20, batch_size=entry.get('batch_size'))
            assert problem.config.batch_size == entry.get('batch_size', 256)


@pytest.mark.slow
def test_how_much_arithmetic_there_is_to_save():
    """At paper size the host loop's products are 1.16 times ours in pre-training, 1.28 times in fine-tuning: what
    there is to gain by arithmetic alone; the rest is memory traffic and what is not a product."""
    problem = throughput.make_problem('infom', suite.CUBE, 'paper', rows=3000)
    shapes = jax.eval_shape(
        lambda key: problem.agent_class.create(key, problem.example, problem.config), jax.random.key(0)
    )
    dims = problem.example['observations'].shape[-1], problem.example['actions'].shape[-1]
    host = jax.eval_shape(
        lambda key: host_loop.TrainState.create(key, *dims, problem.config, shapes.flow_bounds), jax.random.key(0)
    )
    batch = host_loop.sample_batch(
        host_loop.row_arrays(problem.dataset('finetuning')), np.random.default_rng(0), problem.config.batch_size
    )
    key = jax.random.key(0)
    ratios = {
        'pretraining': (lambda x: x.pretrain(batch, key), lambda x: x.pretrain(batch, key)),
        'finetuning': (
            lambda x: x.finetune(batch, key, full_update=False),
            lambda x: x.finetune(batch, key, update_actor=False),
        ),
    }
    ratios = {
        phase: arithmetic.matmul_flops(theirs, host) / arithmetic.matmul_flops(ours, shapes)
        for phase, (theirs, ours) in ratios.items()
    }
    assert ratios == pytest.approx({'pretraining': 1.16, 'finetuning': 1.28}, abs=0.01)
