"""The compiled chunk: equal to a plain loop, the same for a seed alone or beside others, compiled once, and honest
about NaN."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.infom import InFOMAgent
from tests import tiny
from utils import batches, datasets, diagnostics, training

SEEDS = [3, 4]
SMALL = {'num_flow_steps': 3, 'num_flow_goals': 2, 'actor_freq': 2}


@pytest.fixture(scope='module')
def data():
    """{phase: data set} of the same walks, reward-free and labelled."""
    return {phase: tiny.make_dataset(tiny.random_walks(labelled=phase == 'finetuning')) for phase in training_phases()}


def training_phases():
    return 'pretraining', 'finetuning'


def create(data, seeds=SEEDS, **overrides):
    config = tiny.make_config(**{**SMALL, **overrides})
    return training.create_agents(InFOMAgent, seeds, datasets.example_batch(data['pretraining']), config)


def chunk(agents, data, phase, start, n, seeds=SEEDS):
    return training.train_chunk(
        agents, data[phase], training.stream_keys(seeds, phase), jnp.int32(start), phase=phase, n=n
    )


def solo(agents, i):
    return jax.tree.map(lambda x: x[i], agents)


def assert_close(a, b, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=2e-4), a, b)


def step_by_step(agent, dataset, key, steps, phase):
    """The same updates as a Python loop over jitted steps."""
    metrics = []

    @jax.jit
    def sample(step):
        batch_key, update_key = jax.random.split(jax.random.fold_in(key, step))
        return datasets.sample(dataset, batch_key, agent.config.batch_size, agent.needs), update_key

    pretrain = jax.jit(lambda agent, batch, key: agent.pretrain(batch, key))
    finetune = jax.jit(
        lambda agent, batch, key, update_actor: agent.finetune(batch, key, update_actor=update_actor), static_argnums=3
    )
    for step in steps:
        batch, update_key = sample(step)
        if phase == 'pretraining':
            agent, values = pretrain(agent, batch, update_key)
        else:
            agent, values = finetune(agent, batch, update_key, (step + 1) % agent.config.actor_freq == 0)
        metrics.append(values)
    return agent, metrics


@pytest.mark.slow
@pytest.mark.parametrize('phase', training_phases())
def test_a_chunk_is_the_loop_of_its_updates(data, phase):
    agents = create(data)
    expected, metrics = step_by_step(
        solo(agents, 1), data[phase], training.stream_keys(SEEDS, phase)[1], range(4, 12), phase
    )
    trained, means = chunk(agents, data, phase, 4, 8)
    assert_close(solo(trained, 1), expected)
    for name in ('flow_loss', 'kl_loss'):
        np.testing.assert_allclose(means[name][0][1], np.mean([m[name] for m in metrics]), rtol=1e-3)
    if phase == 'finetuning':  # What only the actor's steps have is averaged over those alone.
        np.testing.assert_allclose(means['actor_q'][0][1], np.mean([m['actor_q'] for m in metrics[1::2]]), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('phase', training_phases())
def test_a_seed_beside_others_is_the_seed_alone(data, phase):
    together, _ = chunk(create(data), data, phase, 0, 8)
    alone, _ = chunk(create(data, seeds=[4]), data, phase, 0, 8, seeds=[4])
    assert_close(solo(together, 1), solo(alone, 0))
    different = (
        solo(together, 0).params['actor']['mean']['kernel'] - solo(together, 1).params['actor']['mean']['kernel']
    )
    assert jnp.abs(different).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('phase', training_phases())
def test_two_chunks_are_one_of_twice_the_length(data, phase):
    halves = chunk(create(data), data, phase, 0, 4)[0]
    halves, _ = chunk(halves, data, phase, 4, 4)
    whole, _ = chunk(create(data), data, phase, 0, 8)
    assert_close(halves, whole)


def test_scan_is_that_of_jax_for_any_arrays():
    """`_scan` packs vectors and scalars of floats: values, types and shapes come out as by `jax.lax.scan`."""
    carry = {
        'scalar': jnp.float32(0.5),
        'vector': jnp.arange(3.0),
        'matrix': jnp.ones((2, 3)),
        'count': jnp.int32(7),
        'flags': jnp.array([True, False]),
        'none': None,
    }

    def body(carry, x):
        new = {**carry, 'count': carry['count'] + 1, 'flags': ~carry['flags'], 'matrix': carry['matrix'] * x}
        new |= {'scalar': carry['scalar'] - x, 'vector': carry['vector'] + carry['scalar'] * carry['matrix'][0]}
        return new, {
            'sum': new['vector'].sum(),
            'vector': new['vector'],
            'count': new['count'],
            'matrix': new['matrix'],
        }

    inputs = jnp.linspace(0.5, 1.5, 4)
    ours, expected = training._scan(body, carry, inputs), jax.lax.scan(body, carry, inputs)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize('phase', training_phases())
def test_what_is_small_goes_from_update_to_update_in_one_array(data, phase):
    """On a GPU each array is a kernel: neither parameters and moments nor metrics have one for every vector."""
    agents, keys = create(data, seeds=[0]), training.stream_keys([0], phase)
    traced = training.train_chunk.trace(agents, data[phase], keys, jnp.int32(0), phase=phase, n=4)
    scans = scans_of(traced.jaxpr.jaxpr)
    assert len(scans) == {'pretraining': 1, 'finetuning': 2}[phase]
    for equation in scans:
        carried = equation.outvars[: equation.params['num_carry']]
        metrics = [out.aval for out in equation.outvars[equation.params['num_carry'] :]]
        assert sum(out.aval.ndim <= 1 and out.aval.dtype == jnp.float32 for out in carried) == 1
        assert [(out.dtype, out.ndim) for out in metrics] == [(jnp.float32, 2)]


def scans_of(jaxpr):
    found = [equation for equation in jaxpr.eqns if equation.primitive.name == 'scan']
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, 'jaxpr', value)
            found += scans_of(inner) if hasattr(inner, 'eqns') else []
    return found


def test_one_compilation_a_phase_and_length(data):
    agents = create(data)
    sizes = []
    for start in (0, 4, 8):
        agents, _ = chunk(agents, data, 'pretraining', start, 4)
        sizes.append(training.train_chunk._cache_size())
    assert sizes[0] == sizes[1] == sizes[2]


def test_the_agents_buffers_are_donated(data):
    agents = create(data)
    kernel = agents.params['actor']['mean']['kernel']
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # A buffer that cannot be donated would warn.
        trained, _ = chunk(agents, data, 'pretraining', 0, 4)
    assert kernel.is_deleted()
    assert not data['pretraining'].observations.is_deleted()
    jax.block_until_ready(trained)


def test_fine_tuning_begins_with_the_targets_of_the_online_networks_and_all_else_as_it_was(data):
    agents = create(data)
    agents = agents.replace(target_params=jax.tree.map(lambda x: x + 1, agents.target_params))
    begun = training.begin_finetuning(agents, data['finetuning'], training.stream_keys(SEEDS, 'begin_finetuning'))
    expected = agents.replace(target_params={name: agents.params[name] for name in agents.target_params})
    jax.tree.map(np.testing.assert_array_equal, begun, expected)
    # Donated, what stays would change places, and on a GPU wrongly so (jax-ml/jax#39625).
    assert not any(x.is_deleted() for x in jax.tree.leaves(agents))


@pytest.mark.slow
def test_the_first_bad_step_is_named(data):
    """A learning rate that makes the reward model overflow: the step and the metric are those of the plain loop."""
    labelled = data['finetuning'].replace(rewards=jnp.full_like(data['finetuning'].rewards, jnp.nan))
    _, metrics = chunk(create(data), {'finetuning': labelled}, 'finetuning', 4, 4)
    assert metrics['reward_loss'][1].tolist() == [4, 4]
    assert metrics['flow_loss'][1].tolist() == [-1, -1], 'the flow does not read rewards'
    assert metrics['critic_loss'][1].tolist() == [5, 5], 'the reward model is NaN after the first update'


@pytest.mark.slow
@pytest.mark.parametrize('phase', training_phases())
def test_batches_drawn_on_the_host_are_those_drawn_on_the_device(data, phase, monkeypatch):
    """In chunks of 8, and in the shorter ones that limited memory asks for."""
    keys, agents, drawn = training.stream_keys(SEEDS, phase), create(data), []
    batch_bytes = 2 * tiny.BATCH_SIZE * 4 * (2 * tiny.STATE_DIM + 2 * tiny.ACTION_DIM + 10)
    for limit, length in ((5 * batch_bytes, 4), (1 << 20, 8)):
        monkeypatch.setattr(batches, 'PREFETCHED_BYTES', limit)
        source = batches.HostBatches(data[phase], 8, agents=agents, keys=keys, block=2)
        assert source.n == length
        with contextlib.closing(source):
            drawn.append([source.chunk(start) for start in range(0, 16, length)])
    of_four, of_eight = [jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *chunks) for chunks in drawn]
    jax.tree.map(np.testing.assert_array_equal, of_four, of_eight)
    expected = create(data)
    for start, ready in zip((0, 8), drawn[1], strict=True):
        expected, _ = chunk(expected, data, phase, start, 8)
        agents, _ = training.train_chunk(agents, ready, keys, jnp.int32(start), phase=phase, n=8)
    assert_close(agents, expected)


def test_data_stay_on_the_host_where_the_device_has_no_room(data, monkeypatch):
    class Device:
        def memory_stats(self):
            return {'bytes_limit': size / 0.5}

    size = sum(array.nbytes for array in jax.tree.leaves(data['finetuning']))
    assert batches.choose_location(data['finetuning'], 'auto') == 'device', 'a CPU has no memory of its own'
    monkeypatch.setattr(jax, 'local_devices', lambda: [Device()])
    assert batches.choose_location(data['finetuning'], 'auto') == 'device'
    size *= 0.5
    assert batches.choose_location(data['finetuning'], 'auto') == 'host'
    assert batches.choose_location(data['finetuning'], 'device') == 'device'


def test_validation_updates_nothing(data):
    agents = create(data)
    before = jax.tree.map(np.array, agents)
    keys = training.stream_keys(SEEDS, 'validation')
    ranges = diagnostics.observed_ranges(data['finetuning'])
    metrics = training.validation_metrics(agents, data['finetuning'], ranges, keys, jnp.int32(3), phase='finetuning')
    for name in ('validation/critic_loss', 'diagnostics/flow_excess', 'diagnostics/gradient_norm/critic'):
        assert metrics[name].shape == (2,) and np.isfinite(metrics[name]).all()
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, agents), before)
    later = training.validation_metrics(agents, data['finetuning'], ranges, keys, jnp.int32(4), phase='finetuning')
    assert (later['validation/reward_loss'] != metrics['validation/reward_loss']).all(), 'other rows at another step'


def test_streams_and_seeds_have_keys_of_their_own():
    keys = [jax.random.key_data(k).tolist() for s in training.STREAMS for k in training.stream_keys([0, 1, 2], s)]
    assert len({tuple(key) for key in keys}) == 3 * len(training.STREAMS)


def test_the_policy_acts_for_every_seed_in_bounds(data):
    agents = create(data)
    policy = training.make_policy(agents, lambda x: x, SEEDS)
    observations = np.linspace(-3, 3, 4 * tiny.STATE_DIM, dtype=np.float32).reshape(4, -1)
    actions = policy(observations)
    assert actions.shape == (2, 4, tiny.ACTION_DIM) and np.abs(actions).max() <= 1
    np.testing.assert_array_equal(policy(observations), actions)
    expected = solo(agents, 1).act(jnp.asarray(observations), jax.random.key(9), temperature=0.0)
    np.testing.assert_allclose(actions[1], expected, atol=1e-6)
    scaled = training.make_policy(agents, lambda x: 0.5 * x + 1, SEEDS)
    np.testing.assert_allclose(scaled(observations), policy(0.5 * observations + 1), atol=1e-6)
    assert np.abs(scaled(observations) - actions).max() > 1e-3, 'the normaliser is at work'
