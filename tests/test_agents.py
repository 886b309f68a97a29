"""What holds for every agent of `agents/`, whatever it learns: the contract of the training loop.

A new agent joins with one row of `ROWS`. The values of its losses, and where their gradients go, are in a file of its
own.
"""

import functools
import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agents
from agents import common
from tests import infom_reference as reference
from tests import tiny, tiny_agents
from tests.baseline_reference import heads
from utils import checkpoints, datasets, diagnostics, training
from utils.errors import UserError

PARTED_BY = 'name'  # Agents share no programs: see conftest.py.
KEY = jax.random.key(3)
SEEDS = [3, 4]
PHASES = ('pretraining', 'finetuning')
# The three kinds of update: (phase, whether it trains the actor).
UPDATES = {'pretrain': ('pretraining', True), 'finetune': ('finetuning', False), 'finetune_actor': ('finetuning', True)}


class Row(NamedTuple):
    """Modules that an update trains, and targets that then follow their online networks; all others stay put."""

    pretrained: set  # Modules trained by a step of pre-training.
    finetuned: set  # Modules trained by a step of fine-tuning, apart from the actor.
    targets: dict  # Kind of update → the targets that follow.
    image_modules: set = frozenset()  # Trained modules with targets that images add in every step.
    images: bool = True  # Whether the agent works with images.


ACTOR_STEPS = {'pretrain': set(), 'finetune': set(), 'finetune_actor': {'critic', 'actor'}}
ROWS = {
    'infom': Row(
        pretrained={'vector_field', 'intention_encoder', 'actor'},
        finetuned={'vector_field', 'intention_encoder', 'critic', 'reward'},
        targets={kind: {'vector_field'} for kind in UPDATES},
        image_modules={'encoder'},
    ),
    'iql': Row(
        pretrained={'actor'},
        finetuned={'value', 'critic'},
        targets={'pretrain': set(), 'finetune': {'critic'}, 'finetune_actor': {'critic'}},
    ),
    'rebrac': Row(pretrained={'actor'}, finetuned={'critic'}, targets=ACTOR_STEPS),
    'dino_rebrac': Row(
        pretrained={'encoder', 'actor'}, finetuned={'critic'}, targets={**ACTOR_STEPS, 'pretrain': {'encoder'}}
    ),
    'mbpo_rebrac': Row(
        pretrained={'transition', 'actor'},
        finetuned={'transition', 'reward', 'critic'},
        targets=ACTOR_STEPS,
        images=False,
    ),
    'crl_infonce': Row(
        pretrained={'critic', 'actor'}, finetuned={'critic', 'reward'}, targets={kind: set() for kind in UPDATES}
    ),
    'td_infonce': Row(
        pretrained={'critic', 'actor'}, finetuned={'critic', 'reward'}, targets={kind: {'critic'} for kind in UPDATES}
    ),
    'fb_iql': Row(
        pretrained={'forward', 'backward', 'actor'},
        finetuned={'value', 'critic'},
        targets={'pretrain': {'forward', 'backward'}, 'finetune': {'critic'}, 'finetune_actor': {'critic'}},
    ),
    'hilp_iql': Row(
        pretrained={'representation', 'value', 'critic', 'actor'},
        finetuned={'value', 'critic'},
        targets={'pretrain': {'representation', 'critic'}, 'finetune': {'critic'}, 'finetune_actor': {'critic'}},
    ),
}


def test_every_agent_has_a_row():
    assert ROWS.keys() == set(agents.available())


@pytest.fixture(params=list(ROWS))
def name(request):
    return request.param


# ----------------------------------------------------------------------------------------- what is made once per agent


@functools.cache
def dataset(phase):
    return tiny.make_dataset(tiny.random_walks(labelled=phase == 'finetuning'))


@functools.cache
def created(name):
    """Fresh agents of `SEEDS`, on the host."""
    example = datasets.example_batch(dataset('pretraining'))
    config = tiny_agents.make_config(name)
    return jax.device_get(training.create_agents(agents.load(name).AGENT, SEEDS, example, config))


def fresh(name):
    """Fresh agents on buffers of their own: chunks take them over."""
    return jax.tree.map(jnp.array, created(name))


def seed_of(agents, i):
    return jax.tree.map(lambda x: jnp.asarray(x[i]), agents)


@functools.cache
def state_case(name):
    """One agent whose parameters and targets are all off their initial values, and a labelled batch."""
    return tiny.off_initial(seed_of(created(name), 0)), tiny_agents.make_batch()


@functools.cache
def image_case(name):
    batch = tiny_agents.make_batch(images=True)
    return tiny_agents.make_agent(name, batch, images=True), batch


def loss_of(agent, params, batch, key, kind):
    phase, with_actor = UPDATES[kind]
    if phase == 'pretraining':
        return agent.pretraining_loss(params, batch, key)
    return agent.finetuning_loss(params, batch, key, with_actor)


def without_labels(batch):
    return {name: value for name, value in batch.items() if not name.startswith('reward')}


def update_of(agent, batch, key, kind):
    phase, with_actor = UPDATES[kind]
    if phase == 'pretraining':
        return agent.pretrain(without_labels(batch), key)
    return agent.finetune(batch, key, update_actor=with_actor)


@functools.partial(jax.jit, static_argnames='kind')
def update(agent, batch, key, kind):
    return update_of(agent, batch, key, kind)


@jax.jit
def act(agent, observations, key, temperature):
    return agent.act(observations, key, temperature)


def equal(tree, other):
    """Bitwise equality of two trees of the same structure."""
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


def assert_close(tree, other, rtol=2e-4, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), tree, other)


def assert_no_shared_buffers(tree):
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) if leaf.size]
    assert len(set(addresses)) == len(addresses)


# -------------------------------------------------------------------------------------------------------- one update


def check_update(name, kind, agent, batch, images):
    """Exactly the listed modules move, with their Adam states; exactly the listed targets follow, to τθ + (1−τ)θ̄ with
    the new weights; metrics are finite numbers."""
    row = ROWS[name]
    extra = row.image_modules if images else set()
    trained = extra | (row.pretrained if kind == 'pretrain' else row.finetuned)
    trained |= {'actor'} if UPDATES[kind][1] else set()

    updated, metrics = update(agent, batch, KEY, kind)
    assert {m for m in agent.params if not equal(agent.params[m], updated.params[m])} == trained
    moved = trained | ({'acting_actor'} if 'actor' in trained else set())
    moved |= {common.STEP} if kind != 'pretrain' else set()
    assert {m for m in agent.opt_states if not equal(agent.opt_states[m], updated.opt_states[m])} == moved

    tau = agent.config.get('tau')  # None where there is no target.
    for module, target in agent.target_params.items():
        if module in row.targets[kind] | extra:
            online = updated.params[module]
            expected = jax.tree.map(
                lambda new, old: tau * np.float64(new) + (1 - tau) * np.float64(old), online, target
            )
            assert_close(updated.target_params[module], expected, rtol=1e-5, atol=1e-7)
            assert not equal(updated.target_params[module], target)
        else:
            assert equal(updated.target_params[module], target), f'the target of {module} stays put'
    for metric, value in metrics.items():
        assert value.shape == () and jnp.isfinite(value), metric


@pytest.mark.parametrize('kind', UPDATES)
def test_an_update_moves_what_it_should_and_nothing_else(name, kind):
    check_update(name, kind, *state_case(name), images=False)


@pytest.mark.parametrize('kind', ['pretrain', 'finetune_actor'])
def test_images(name, kind):
    if not ROWS[name].images:
        with pytest.raises(UserError, match='image'):
            tiny_agents.make_agent(name, tiny_agents.make_batch(images=True), images=True)
        with pytest.raises(UserError, match='image'):  # Not even where no encoder is asked for.
            tiny_agents.make_agent(name, tiny_agents.make_batch(images=True), images=True, encoder=None)
        return
    agent, batch = image_case(name)
    check_update(name, kind, agent, batch, images=True)
    if kind == 'pretrain':
        actions = act(agent, batch['observations'], KEY, 1.0)
        assert actions.shape == batch['actions'].shape and jnp.abs(actions).max() <= 1


def test_the_actor_and_its_momentum_rest_between_its_updates(name):
    agent, batch = state_case(name)
    agent, _ = update(agent, batch, KEY, 'finetune_actor')
    assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(agent.opt_states['actor'][0].mu))
    later, _ = update(agent, batch, jax.random.key(1), 'finetune')
    assert equal(agent.params['actor'], later.params['actor'])
    assert equal(agent.opt_states['actor'], later.opt_states['actor'])


@pytest.mark.parametrize('name', ['infom', 'rebrac', 'dino_rebrac', 'mbpo_rebrac'])
def test_no_target_asks_for_an_action_after_the_end(name):
    """Agents that take `task_ends` get a placeholder for a next action where the task ended."""
    agent, batch = state_case(name)
    assert 'task_ends' in agent.needs
    batch = {**batch, 'masks': batch['masks'].at[2].set(0.0)}
    replaced = {row: {**batch, 'next_actions': batch['next_actions'].at[row].add(-0.5)} for row in (2, 3)}

    def targets(batch):
        if name == 'infom':  # Its current term learns z of (s', a'), as in every row.
            latents, times = jnp.zeros((tiny.BATCH_SIZE, agent.config.latent_dim)), jnp.full((tiny.BATCH_SIZE, 1), 0.5)
            return agent.future_term(batch, latents, times, KEY)
        return agent.finetuning_loss(agent.params, batch, KEY)[0]

    assert equal(targets(batch), targets(replaced[2]))
    assert not equal(targets(batch), targets(replaced[3]))


@pytest.mark.parametrize('name', ['infom', 'crl_infonce', 'td_infonce', 'mbpo_rebrac'])
def test_weight_decay_shrinks_the_learned_reward_alone(name):
    """AdamW (arXiv 1711.05101): apart from the gradient's step, a share lr·decay of each parameter is taken away."""
    agent, batch = state_case(name)
    plain, _ = update(agent, batch, KEY, 'finetune_actor')
    decayed, _ = update(tiny_agents.with_config(agent, reward_weight_decay=2.0), batch, KEY, 'finetune_actor')
    rate = 2.0 * agent.config.lr
    for module in agent.params:
        share = rate if module == 'reward' else 0.0
        trees = decayed.params[module], plain.params[module], agent.params[module]
        for actual, new, old in zip(*map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_allclose(actual, new - share * old, atol=2e-7)
    for actual, expected in zip(*map(jax.tree.leaves, (decayed.opt_states, plain.opt_states)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)


def test_losses_and_updates_speak_of_the_same_metrics(name):
    """Validation reads the losses' metrics, training the updates': the same names, and an actor step adds to them."""
    agent, batch = state_case(name)
    names = {}
    for kind in UPDATES:
        loss, metrics = jax.eval_shape(lambda: loss_of(agent, agent.params, batch, KEY, kind))
        assert loss.shape == ()
        names[kind] = metrics.keys()
        assert 'loss' in names[kind]
        assert names[kind] == jax.eval_shape(lambda: update_of(agent, batch, KEY, kind))[1].keys()
    assert names['finetune'] < names['finetune_actor']
    with_actor = jax.eval_shape(lambda: agent.finetuning_loss(agent.params, batch, KEY))[1]
    assert with_actor.keys() == names['finetune_actor']


def test_methods_mutate_nothing(name):
    """Run uncompiled, where a dictionary that is written to would be the caller's own."""
    agent, batch = state_case(name)
    before = jax.tree.leaves((agent, batch))
    for kind in UPDATES:
        jax.eval_shape(lambda: (loss_of(agent, agent.params, batch, KEY, kind), update_of(agent, batch, KEY, kind)))
    jax.eval_shape(lambda: (agent.begin_finetuning(batch, KEY), agent.act(batch['observations'], KEY)))
    after = jax.tree.leaves((agent, batch))
    assert len(before) == len(after) and all(x is y for x, y in zip(before, after, strict=True))


# ------------------------------------------------------------------------------------------------ targets and buffers


def test_begin_finetuning_copies_every_online_network(name):
    agent, batch = state_case(name)
    begun = agent.begin_finetuning(batch, KEY)
    assert (name in tiny_agents.WITHOUT_TARGETS) == (not agent.target_params)
    assert begun.target_params.keys() == agent.target_params.keys()
    for module, target in begun.target_params.items():
        assert not equal(target, agent.target_params[module])
        assert equal(target, begun.params[module])
    assert jax.tree.structure(begun) == jax.tree.structure(agent)
    assert_no_shared_buffers(begun)


def test_a_fresh_agent_shares_no_buffers(name):
    """Uncompiled: XLA keeps outputs apart, and hides a target that is its online network and not a copy."""
    example = datasets.example_batch(dataset('pretraining'))
    agent = agents.load(name).AGENT.create(KEY, example, tiny_agents.make_config(name, const_std=False))
    assert_no_shared_buffers(agent)
    for module, target in agent.target_params.items():
        assert equal(target, agent.params[module])
    assert agent.opt_states.keys() == agent.params.keys() | {'acting_actor', common.STEP}
    assert equal(agent.opt_states['acting_actor'], agent.params['actor'])
    assert 'log_std' in agent.params['actor']


# ------------------------------------------------------------------------------------------- the schedule of the rates


def test_cosine(name):
    """In the middle of the schedule half the step is taken, after it none; pre-training, which comes before it, has the
    full rates."""
    agent, batch = state_case(name)
    plain = tiny_agents.with_config(agent, finetuning_schedule='constant')
    agent = tiny_agents.with_config(agent, finetuning_schedule='cosine', schedule_steps=100)
    step = displacement(plain, update(plain, batch, KEY, 'finetune_actor')[0])
    for at, scale in ((0, 1.0), (50, 0.5), (100, 0.0), (150, 0.0)):
        start = agent.replace(opt_states=agent.opt_states | {common.STEP: jnp.asarray(at, jnp.int32)})
        after, _ = update(start, batch, KEY, 'finetune_actor')
        assert after.opt_states[common.STEP] == at + 1
        assert_close(displacement(start, after), jax.tree.map(lambda x, s=scale: s * x, step), rtol=1e-7, atol=2e-7)
    pretrained = [update(each, batch, KEY, 'pretrain')[0] for each in (agent, plain)]
    assert_close(pretrained[0].params, pretrained[1].params, 1e-6, 1e-7)


def displacement(before, after):
    return jax.tree.map(jnp.subtract, after.params, before.params)


def test_settings_of_the_schedule(name):
    module, config = agents.load(name), tiny_agents.make_config(name)
    assert config.finetuning_schedule == ('cosine' if name == 'infom' else 'constant')
    assert module.has_schedule(config) == (name == 'infom')
    config.finetuning_schedule = 'cosine'
    assert module.has_schedule(config)
    for wrong in (dict(finetuning_schedule='linear'), dict(schedule_steps=0)):
        with pytest.raises(UserError, match=next(iter(wrong))):
            module.validate_config(tiny_agents.make_config(name, **wrong))


# -------------------------------------------------------------------------------------------------- the actor that acts


def test_the_actor_that_acts_is_the_average_of_the_trained_one(name):
    """After k updates of the actor at rate τ: Σ_i τ·(1−τ)^(k−i)·actor_i over the sum of these weights; updates of other
    modules do not move it, and actions are its own."""
    agent, batch = state_case(name)
    agent = tiny_agents.with_config(agent, actor_tau=0.25, actor_lr=1e-2)
    actors = []
    for kind in ('finetune_actor', 'finetune', 'finetune_actor', 'finetune_actor'):
        agent, _ = update(agent, batch, KEY, kind)
        if kind == 'finetune_actor':
            actors.append(agent.params['actor'])
        weights = 0.75 ** np.arange(len(actors))[::-1]
        expected = jax.tree.map(lambda *x: np.average(np.float64(x), axis=0, weights=weights), *actors)
        assert_close(agent.opt_states['acting_actor'], expected, rtol=1e-5, atol=1e-7)

    def modes(agent):
        return act(agent, batch['observations'], KEY, 0.0)

    trained, average = agent.params['actor'], agent.opt_states['acting_actor']
    np.testing.assert_array_equal(modes(agent), modes(agent.replace(params=agent.params | {'actor': average})))
    assert not np.array_equal(
        modes(agent), modes(agent.replace(opt_states=agent.opt_states | {'acting_actor': trained}))
    )


@pytest.mark.parametrize('count', [1, 2, 100_000])
def test_without_averaging_the_trained_actor_acts(count):
    new, old = ({'kernel': value * jnp.ones(3)} for value in (2.0, -1.0))
    np.testing.assert_array_equal(common.averaged_actor(new, old, jnp.int32(count), tau=1.0)['kernel'], 2.0)


# ------------------------------------------------------------------------------------------------------ chunks of it


@functools.cache
def chunk_result(name, phase, start=0, n=4):
    """(agents of all seeds on the host, metrics) after one chunk from fresh agents."""
    return run_chunk(fresh(name), phase, start, n)


def run_chunk(agents, phase, start=0, n=4):
    keys = training.stream_keys(SEEDS, phase)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # A buffer that cannot be donated would warn.
        trained, metrics = training.train_chunk(agents, dataset(phase), keys, jnp.int32(start), phase=phase, n=n)
    assert jax.tree.leaves(agents)[0].is_deleted()
    return jax.device_get((trained, metrics))


@pytest.mark.parametrize('phase', PHASES)
@pytest.mark.parametrize('name', ROWS)
def test_every_array_of_an_agent_keeps_its_buffer_in_a_chunk(name, phase):
    """On a GPU, what is handed on unchanged from one donated buffer to another comes out wrong (jax-ml/jax#39625)."""
    agents = fresh(name)
    lowered = training.train_chunk.lower(
        agents, dataset(phase), training.stream_keys(SEEDS, phase), jnp.int32(0), phase=phase, n=4
    )
    main = re.search(r'@main\(.*', lowered.as_text())[0]
    kept = re.findall(r'%arg(\d+): tensor<[^>]*> \{[^}]*?tf\.aliasing_output = (\d+) : i32', main)
    places = [str(place) for place in range(len(jax.tree.leaves(agents)))]
    assert kept == list(zip(places, places, strict=True))


@functools.partial(jax.jit, static_argnames=('needs', 'size'))
def sample(dataset, key, step, needs, size):
    batch_key, update_key = jax.random.split(jax.random.fold_in(key, step))
    return datasets.sample(dataset, batch_key, size, needs), update_key


def without_null_directions(*agents):
    """The agents with 0 for parameters whose gradient is 0 in exact arithmetic: of rounding errors Adam makes full
    steps.

    Such are the last biases of TD InfoNCE's goals: they add to each row of logits a constant, which softmax ignores.
    """

    def clear(name, params):
        if name not in agents[0].opt_states:
            return params
        second_moments = agents[0].opt_states[name][0].nu
        return jax.tree.map(lambda x, nu: x * (np.max(nu) > 1e-15), params, second_moments)

    return [
        agent.replace(
            params={name: clear(name, params) for name, params in agent.params.items()},
            target_params={name: clear(name, params) for name, params in agent.target_params.items()},
        )
        for agent in agents
    ]


@pytest.mark.parametrize('phase', PHASES)
def test_a_seed_in_a_donated_chunk_is_the_seed_alone_step_by_step(name, phase):
    trained, metrics = chunk_result(name, phase)
    agent, seen = seed_of(created(name), 1), []
    for step in range(4):
        key = training.stream_keys(SEEDS, phase)[1]
        batch, update_key = sample(dataset(phase), key, step, agent.needs, agent.config.batch_size)
        kind = 'pretrain' if phase == 'pretraining' else ('finetune_actor' if step % 2 else 'finetune')
        agent, values = update(agent, batch, update_key, kind)
        seen.append(values)
    assert_close(*without_null_directions(seed_of(trained, 1), agent), rtol=1e-3, atol=1e-4)
    for metric, (mean, bad) in metrics.items():
        assert np.isfinite(mean).all() and (bad < 0).all()
        values = [line[metric] for line in seen if metric in line]
        if metric != 'loss' or phase == 'pretraining':  # In fine-tuning it is that of the actor's steps alone.
            np.testing.assert_allclose(mean[1], np.mean(values), rtol=5e-3, atol=1e-4, err_msg=metric)
    assert not equal(seed_of(trained, 0).params, seed_of(trained, 1).params)


@pytest.mark.parametrize('phase', PHASES)
def test_saved_and_resumed_is_uninterrupted_bit_for_bit(name, phase, tmp_path):
    first, _ = chunk_result(name, phase)
    with checkpoints.CheckpointWriter(tmp_path) as writer:
        writer.save(4, jax.tree.map(jnp.asarray, first), {'phase': phase})
    resumed = checkpoints.restore(tmp_path, fresh(name))
    assert equal(jax.device_get(resumed), first)
    uninterrupted, _ = run_chunk(jax.tree.map(jnp.asarray, first), phase, start=4)
    resumed, _ = run_chunk(resumed, phase, start=4)
    assert equal(resumed, uninterrupted)
    assert not equal(resumed.params, first.params)


def test_validation_gives_a_number_for_each_seed(name):
    """In both phases, of a fresh agent, vmapped: before anything was learnt or imagined, too."""
    agents = fresh(name)
    keys = training.stream_keys(SEEDS, 'validation')
    for phase in PHASES:
        metrics = jax.eval_shape(
            lambda: training.validation_metrics(
                agents, dataset(phase), diagnostics.observed_ranges(dataset(phase)), keys, jnp.int32(0), phase=phase
            )
        )
        assert all(value.shape == (len(SEEDS),) for value in metrics.values())


def test_act(name):
    agent, batch = state_case(name)
    mode = act(agent, batch['observations'], KEY, 0.0)
    assert mode.shape == batch['actions'].shape
    np.testing.assert_array_equal(mode, act(agent, batch['observations'], jax.random.key(9), 0.0))
    noisy = act(agent, batch['observations'], KEY, 1.0)
    assert jnp.abs(noisy - mode).max() > 0.1
    assert not equal(noisy, act(agent, batch['observations'], jax.random.key(9), 1.0))
    assert jnp.abs(act(agent, 100 * batch['observations'], KEY, 100.0)).max() <= 1


def test_actions_and_values_are_those_of_the_online_networks(name):
    """In float64: the Gaussian of the actor that acts, and min_k Q_k of the trained critics, at the task's latent where
    there is one. Targets, which differ from both, have no say."""
    agent, batch = state_case(name)
    acting = tiny.perturb({**agent.params['actor'], 'log_std': np.zeros(tiny.ACTION_DIM, np.float32)}, 6, 0.5)
    actor = agent.networks.actor.clone(const_std=False)
    agent = tiny_agents.with_config(agent, const_std=False).replace(
        networks=agent.networks._replace(actor=actor), opt_states=agent.opt_states | {'acting_actor': acting}
    )
    config, params = agent.config, reference.float64(agent.params)
    s, a = np.float64(batch['observations']), np.float64(batch['actions'])
    if 'encoder' in params:
        s = reference.mlp(params['encoder'], s, len(config.encoder_hidden_dims), norm=True)
    latents = [np.tile(np.float64(agent.task_latent), (len(s), 1))] if hasattr(agent, 'task_latent') else []

    means, stds = reference.actor(reference.float64(acting), config, np.concatenate([s, *latents], axis=-1))
    assert np.abs(means).max() > 1
    noise = np.float64(jax.random.normal(KEY, means.shape))
    for temperature in (0.0, 0.3):
        actions = means + temperature * stds * noise
        actions = np.tanh(actions) if config.get('tanh_squash') else np.clip(actions, -1, 1)
        acted = act(agent, batch['observations'], KEY, temperature)
        np.testing.assert_allclose(acted, actions, rtol=1e-4, atol=1e-5)
    if hasattr(agent, 'q_values'):
        qs = heads(params['critic'], [s, a, *latents], config.value_hidden_dims)[..., 0]
        np.testing.assert_allclose(
            agent.q_values(batch['observations'], batch['actions']), qs.min(axis=0), rtol=1e-4, atol=1e-5
        )
