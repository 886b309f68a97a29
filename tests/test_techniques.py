"""The techniques benchmark compares like with like: without a technique the losses and their gradients are the same."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.infom import InFOMAgent
from benchmarks import techniques, throughput
from tests.tiny import make_agent, make_batch, make_config, make_dataset, random_walks
from utils import devices, processor, training
from utils.datasets import example_batch

ROOT = Path(__file__).resolve().parents[1]
AS_IT_IS = techniques.Technique('nothing')
PATCHED = ('unrolling', 'hoisting', 'blocks', 'layer norm', 'centred variance', 'flat Adam')


def update(technique):
    """(parameters, metrics, program) of one fine-tuning update of a new agent, `technique` taken out throughout."""
    batch, key = make_batch(3), jax.random.key(5)
    with technique.taken_out():
        new = make_agent(batch, num_flow_steps=2, num_flow_goals=3)
        traced = jax.jit(lambda agent, key: agent.finetune(batch, key, update_actor=True)).trace(new, key)
        agent, metrics = traced.lower().compile()(new, key)
    return agent.params, metrics, str(traced.jaxpr)


@pytest.fixture(scope='module')
def as_it_is():
    return update(AS_IT_IS)


@pytest.mark.parametrize('name', PATCHED)
def test_an_update_without_the_technique_is_the_same(name, as_it_is):
    params, metrics, program = update(techniques.TECHNIQUES[name])
    assert program != as_it_is[2], 'nothing was taken out'
    for key, value in as_it_is[1].items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    # Adam's first step is the gradient's sign: where that is rounding, it differs by up to twice the learning rate.
    differences = jax.tree.map(lambda p, q: np.abs(np.asarray(p) - np.asarray(q)), params, as_it_is[0])
    differences = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(differences)])
    assert np.mean(differences > 1e-5) < 0.01


def test_without_early_rounding_only_products_round():
    """In the program alone: a CPU does not do all products at that precision."""
    programs, batch = [], make_batch(3)
    for technique in (AS_IT_IS, techniques.TECHNIQUES['early rounding']):
        agent = make_agent(batch)
        with technique.taken_out(), jax.default_matmul_precision(devices.BFLOAT16):
            update = jax.make_jaxpr(lambda agent: agent.finetune(batch, jax.random.key(5), update_actor=True))
            programs.append(str(update(agent)))
    assert ['bf16[' in program for program in programs] == [True, False]


def test_without_donation_the_agents_outlive_the_chunk():
    """On what `train_chunk` is called with: the agents' buffers are given away with it, and not without."""
    dataset = make_dataset(random_walks())
    config = make_config(batch_size=4)
    for technique in (AS_IT_IS, techniques.TECHNIQUES['donation']):
        agents = training.create_agents(InFOMAgent, [0], example_batch(dataset), config)
        keys = training.stream_keys([0], 'pretraining')
        with technique.taken_out():
            training.train_chunk(agents, dataset, keys, jnp.int32(0), phase='pretraining', n=1)
        assert all(leaf.is_deleted() == (technique is AS_IT_IS) for leaf in jax.tree.leaves(agents.params))


@pytest.mark.slow
def test_without_packing_a_chunk_is_the_same():
    dataset, config, programs, results = make_dataset(random_walks()), make_config(batch_size=4), [], []
    for technique in (AS_IT_IS, techniques.TECHNIQUES['packing']):
        jax.clear_caches()
        agents = training.create_agents(InFOMAgent, [0], example_batch(dataset), config)
        arguments = agents, dataset, training.stream_keys([0], 'pretraining'), jnp.int32(0)
        with technique.taken_out():
            traced = training.train_chunk.trace(*arguments, phase='pretraining', n=3)
        programs.append(str(traced.jaxpr))
        results.append(traced.lower().compile()(*arguments))
    jax.clear_caches()
    assert programs[0] != programs[1], 'nothing was taken out'
    for x, y in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_command_keeps_a_line_for_each_technique_and_device(tmp_path):
    command = [
        sys.executable, '-m', 'benchmarks.techniques', '--preset=smoke', '--updates=2', '--finetuning_updates=2',
        '--repeats=1', '--rows=400', f'--output={tmp_path}',
    ]  # fmt: skip
    phase = {'ratio': 9.0, 'ratio_min': 8.0, 'ratio_max': 9.5}
    old = throughput.machine() | {'date': '2000-01-01', 'preset': 'smoke', 'technique': 'chunks'}
    old |= {'env_name': 'cube-single-play-singletask-task1-v0', 'precision': 'tensorfloat32'}
    old |= dict.fromkeys(throughput.PHASES, phase)
    lines = [old, old | {'technique': 'hoisting'}, old | {'processor': 'another'}]
    (tmp_path / 'techniques.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    done = subprocess.run([*command, '--only=chunks'], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in (tmp_path / 'techniques.jsonl').read_text().splitlines()]
    assert kept[:2] == lines[1:] and len(kept) == 3
    assert kept[2]['technique'] == 'chunks' and kept[2]['date'] > '2000'
    assert all(0 < kept[2][phase]['ratio_min'] <= kept[2][phase]['ratio'] for phase in throughput.PHASES)
    assert (tmp_path / 'techniques.md').read_text() in done.stdout


@pytest.mark.parametrize('flag, expected', [('--only=luck', 'luck'), ('--agent=iql', 'InFOM')])
def test_what_cannot_be_measured_gets_one_line(flag, expected, tmp_path):
    command = [sys.executable, '-m', 'benchmarks.techniques', flag, f'--output={tmp_path}']
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and expected in refused.stderr and 'Traceback' not in refused.stderr
    assert not list(tmp_path.iterdir())


def test_options_are_those_of_the_compiler():
    """Those of GPUs, too: XLA knows their names and values wherever it runs, and refuses others."""
    program = jax.jit(lambda x: x + 1).lower(jnp.ones(8))
    for name in ('graphs', 'concurrent graphs'):
        with techniques.TECHNIQUES[name].taken_out():
            options = processor.compiler_options('gpu')
        assert options and jnp.allclose(program.compile(compiler_options=options)(jnp.zeros(8)), 1.0)
    with pytest.raises(Exception, match='xla_gpu_enable_command_buffer'):
        program.compile(compiler_options={'xla_gpu_enable_command_buffer': 'EVERYTHING'})
