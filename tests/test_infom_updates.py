"""Which modules each loss and each update of InFOM reaches, what targets and frozen modules do, and that methods are
pure and donate cleanly.

The values of the losses and of their gradients are in `test_infom_losses.py`.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.common import STEP
from agents.infom import InFOMAgent, get_config
from tests import tiny
from utils.errors import UserError

KEY = jax.random.key(3)
ALL = {'vector_field', 'intention_encoder', 'critic', 'reward', 'actor'}
OCCUPANCY = {'vector_field', 'intention_encoder'}
IMAGES = dict(encoder='impala_debug', clip_flow_goals=False, num_flow_steps=2, num_flow_goals=2)
STATES = dict(num_flow_steps=2)

# Loss → the modules that get gradient, and those that come on top with an image encoder in front.
LOSSES = {
    'occupancy': (lambda agent, params, batch: agent.occupancy_loss(params, batch, KEY)[0], OCCUPANCY, {'encoder'}),
    'reward': (lambda agent, params, batch: agent.reward_loss(params, batch)[0], {'reward'}, set()),
    'critic': (lambda agent, params, batch: agent.critic_loss(params, batch, KEY)[0], {'critic'}, set()),
    'cloning': (lambda agent, params, batch: agent.cloning_loss(params, batch)[0], {'actor'}, set()),
    'actor': (lambda agent, params, batch: agent.actor_loss(params, batch)[0], {'actor'}, set()),
}


@functools.cache
def state_case():
    batch = tiny.make_batch()
    return tiny.make_agent(batch, **STATES), batch


@functools.cache
def image_case():
    batch = tiny.make_image_batch()
    return tiny.make_agent(batch, **IMAGES), batch


def any_nonzero(tree):
    return any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(tree))


@jax.jit
def gradients(agent, batch):
    """{loss: gradient with respect to the parameters of all modules}."""
    return {name: jax.grad(loss, argnums=1)(agent, agent.params, batch) for name, (loss, *_) in LOSSES.items()}


def nonzero_modules(gradient):
    return {module for module in gradient if any_nonzero(gradient[module])}


@jax.jit
def occupancy_gradient(agent, batch):
    return jax.grad(LOSSES['occupancy'][0], argnums=1)(agent, agent.params, batch)


def equal(tree, other):
    """Bitwise equality of two trees of the same structure."""
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


def changed_modules(before, after):
    """Modules of which any parameter, and those of which any optimiser state, differs."""
    params = {name for name in before.params if not equal(before.params[name], after.params[name])}
    states = {name for name in before.opt_states if not equal(before.opt_states[name], after.opt_states[name])}
    return params, states


@pytest.mark.parametrize(('case', 'with_encoder'), [(state_case, False), (image_case, True)], ids=['states', 'images'])
def test_gradient_map_of_every_loss(case, with_encoder):
    reached = {name: nonzero_modules(gradient) for name, gradient in gradients(*case()).items()}
    expected = {name: modules | (extra if with_encoder else set()) for name, (_, modules, extra) in LOSSES.items()}
    assert reached == expected


def test_future_term_trains_the_field_alone():
    """With γ = 1 and λ = 0 only the future term is left: the intention encoder gets exactly nothing from it."""
    agent, batch = state_case()
    for discount, expected in ((1.0, {'vector_field'}), (0.0, OCCUPANCY)):
        variant = tiny.with_config(agent, discount=discount, kl_weight=0.0)
        assert nonzero_modules(occupancy_gradient(variant, batch)) == expected


def test_kl_term_trains_the_intention_encoder_alone():
    agent, batch = state_case()

    @jax.jit
    def kl_gradient(agent):
        return jax.grad(lambda params: agent.occupancy_loss(params, batch, KEY)[1]['kl_loss'])(agent.params)

    assert nonzero_modules(kl_gradient(agent)) == {'intention_encoder'}


def test_image_encoder_learns_through_x_t_of_the_current_term_alone():
    """Against the current term written out, with features where x_t is made and constants everywhere else."""
    agent, batch = image_case()
    agent = tiny.with_config(agent, discount=0.5)

    @jax.jit
    def expected_gradient(agent, batch):
        constants = agent.features(agent.params, batch['observations'])
        latent_key, time_key, noise_key, _ = jax.random.split(KEY, 4)
        latents, _, _ = agent.infer_intentions(agent.params, batch, latent_key)
        times = jax.random.uniform(time_key, (constants.shape[0], 1))
        noise = jax.random.normal(noise_key, constants.shape)
        condition = agent.condition(agent.params, constants, batch['actions'], latents)

        def current_term(encoder):
            x = times * agent.features({'encoder': encoder}, batch['observations']) + (1 - times) * noise
            return 0.5 * jnp.mean((agent.velocity(agent.params, x, times, condition) - (constants - noise)) ** 2)

        return jax.grad(current_term)(agent.params['encoder'])

    expected = expected_gradient(agent, batch)
    actual = occupancy_gradient(agent, batch)['encoder']
    assert any_nonzero(expected)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * largest), actual, expected)


def test_the_future_term_of_images_lives_in_the_features_of_the_target_encoder():
    """x_t and target from the target network alone; the critic's targets from the online one alone."""
    agent, batch = image_case()
    latents, times = (
        jnp.ones((len(batch['actions']), agent.config.latent_dim)),
        jnp.full((len(batch['actions']), 1), 0.5),
    )

    @jax.jit
    def results(agent):
        x, target = agent.future_term(batch, latents, times, KEY)
        return {'future term': (x, target), 'critic': agent.q_targets(agent.params, batch, KEY)}

    before = results(agent)
    for networks, moved in (('params', 'critic'), ('target_params', 'future term')):
        encoder = {'encoder': tiny.perturb(getattr(agent, networks)['encoder'], 5, 0.3)}
        after = results(agent.replace(**{networks: getattr(agent, networks) | encoder}))
        for name in before:
            assert equal(before[name], after[name]) == (name != moved), (networks, name)


@pytest.mark.parametrize(
    ('method', 'options', 'trained'),
    [
        ('pretrain', {}, OCCUPANCY | {'actor'}),
        ('finetune', {'update_actor': False}, ALL - {'actor'}),
        ('finetune', {'update_actor': True}, ALL),
    ],
    ids=['pretrain', 'finetune', 'finetune_with_actor'],
)
@pytest.mark.parametrize(
    ('case', 'encoder'), [(state_case, set()), (image_case, {'encoder'})], ids=['states', 'images']
)
def test_an_update_moves_the_listed_modules_and_no_others(case, encoder, method, options, trained):
    """Modules that a step does not train, and their Adam states, stay bitwise the same; targets follow with the new
    weights."""
    agent, batch = case()
    updated, metrics = tiny.compiled(method, **options)(agent, batch, KEY)
    beside = {'acting_actor'} & {f'acting_{module}' for module in trained}
    beside |= {STEP} if method == 'finetune' else set()
    assert changed_modules(agent, updated) == (trained | encoder, trained | encoder | beside)
    assert all(jnp.isfinite(value) for value in metrics.values())
    for name in updated.params:
        assert updated.opt_states[name][0].count == (name in trained | encoder)

    tau = agent.config.tau
    assert updated.target_params.keys() == {'vector_field'} | encoder
    for name, target in updated.target_params.items():
        expected = jax.tree.map(
            lambda online, old: tau * np.float64(online) + (1 - tau) * np.float64(old),
            updated.params[name],
            agent.target_params[name],
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), target, expected)


def test_frozen_actor_stays_frozen_after_it_has_moved():
    """Adam's momentum from an actor step must not move the actor in the steps between."""
    agent, batch = state_case()
    agent, _ = tiny.compiled('finetune', update_actor=True)(agent, batch, KEY)
    assert any_nonzero(agent.opt_states['actor'][0].mu)
    later = agent
    for step in range(3):
        later, _ = tiny.compiled('finetune', update_actor=False)(later, batch, jax.random.key(step))
    assert equal(agent.params['actor'], later.params['actor'])
    assert equal(agent.opt_states['actor'], later.opt_states['actor'])


def test_first_adam_step_has_the_size_of_the_learning_rate():
    """Adam's first step is lr·sign(gradient): the actor takes `actor_lr`, every other module `lr`."""
    agent, batch = state_case()
    agent = tiny.with_config(agent, lr=1e-3, actor_lr=2e-2)
    updated, _ = tiny.compiled('pretrain')(agent, batch, KEY)
    for module, size in {'vector_field': 1e-3, 'intention_encoder': 1e-3, 'actor': 2e-2}.items():
        moves = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), updated.params[module], agent.params[module])
        largest = max(float(move) for move in jax.tree.leaves(moves))
        np.testing.assert_allclose(largest, size, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(('case', 'joint_adam'), [(state_case, False), (state_case, True), (image_case, False)])
def test_the_occupancy_model_has_a_rate_of_its_own_in_fine_tuning(case, joint_adam):
    agent, batch = case()
    agent = tiny.compiled('begin_finetuning')(tiny.with_config(agent, joint_adam=joint_adam), batch, KEY)
    finetune = tiny.compiled('finetune', update_actor=True)

    def moves(rate):
        after, _ = finetune(tiny.with_config(agent, finetuning_field_rate=rate), batch, KEY)
        return jax.tree.map(lambda new, old: new - old, after.params, agent.params)

    full, tenth, none = moves(1.0), moves(0.1), moves(0.0)
    occupancy_model = {'vector_field', 'intention_encoder', 'encoder'} & agent.params.keys()
    for name in agent.params:
        assert any_nonzero(full[name]), name
        share = 0.1 if name in occupancy_model else 1.0
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, share * y, atol=1e-7), tenth[name], full[name])
        assert any_nonzero(none[name]) == (name not in occupancy_model), name
    pretrained, _ = tiny.compiled('pretrain')(tiny.with_config(agent, finetuning_field_rate=0.0), batch, KEY)
    assert not equal(pretrained.params['vector_field'], agent.params['vector_field'])


def test_begin_finetuning_copies_online_to_target():
    agent, batch = image_case()
    assert not equal(agent.params['encoder'], agent.target_params['encoder'])
    begun = tiny.compiled('begin_finetuning')(agent, batch, KEY)
    assert begun.target_params.keys() == {'vector_field', 'encoder'}
    for name, target in begun.target_params.items():
        assert equal(target, agent.params[name])
    assert equal(begun.params, agent.params) and equal(begun.opt_states, agent.opt_states)
    assert_no_shared_buffers(begun)


def assert_no_shared_buffers(tree):
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size]
    addresses = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize(('batch', 'overrides'), [(tiny.make_batch(), STATES), (tiny.make_image_batch(), IMAGES)])
def test_a_fresh_agent_has_targets_of_its_own(batch, overrides):
    example = {**batch, 'observation_min': tiny.OBSERVED_RANGE[0], 'observation_max': tiny.OBSERVED_RANGE[1]}
    config = tiny.make_config(const_std=False, **overrides)
    agent = jax.jit(lambda key: InFOMAgent.create(key, example, config))(KEY)
    for name, target in agent.target_params.items():
        assert equal(target, agent.params[name])
    assert_no_shared_buffers(agent)
    assert agent.opt_states.keys() == agent.params.keys() | {'acting_actor', STEP}
    if config.encoder is None:  # Op by op, too: what `jit` keeps apart must not depend on it.
        assert_no_shared_buffers(InFOMAgent.create(KEY, example, config))
        assert_no_shared_buffers(InFOMAgent.create(KEY, example, config).begin_finetuning(batch, KEY))


@pytest.mark.parametrize(
    ('method', 'options'), [('pretrain', {}), ('finetune', {'update_actor': True}), ('begin_finetuning', {})]
)
def test_methods_are_pure_and_donate_cleanly(method, options):
    """Inputs keep their values; the same inputs give the same outputs; a donated agent is used up without a warning."""
    agent, batch = state_case()
    before = jax.device_get((agent, batch))
    function = tiny.compiled(method, **options)
    first, second = (jax.device_get(function(agent, batch, KEY)) for _ in range(2))
    assert equal(before, jax.device_get((agent, batch)))
    assert equal(first, second)

    disposable = jax.tree.map(jnp.copy, agent)
    donating = jax.jit(functools.partial(getattr(InFOMAgent, method), **options), donate_argnums=0)
    with warnings.catch_warnings():
        if (
            method != 'begin_finetuning'
        ):  # There the old targets are thrown away: nothing to put into their buffers is fine.
            warnings.simplefilter('error')
        donated = donating(disposable, batch, KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(disposable.params))
    assert equal(first, jax.device_get(donated))


def test_act():
    agent, batch = state_case()
    act = tiny.compiled('act')
    means, stds = agent.networks.actor.apply({'params': agent.params['actor']}, batch['observations'])
    mode = act(agent, batch['observations'], KEY, 0.0)
    np.testing.assert_allclose(mode, jnp.clip(means, -1, 1), atol=1e-6)
    noisy = act(agent, batch['observations'], KEY, 0.1)
    noise = jax.random.normal(KEY, means.shape)
    np.testing.assert_allclose(noisy, jnp.clip(means + 0.1 * stds * noise, -1, 1), atol=1e-6)
    wild = act(agent, 100 * batch['observations'], KEY, 100.0)
    assert jnp.abs(wild).max() == 1


def test_actions_of_images():
    agent, batch = image_case()
    actions = tiny.compiled('act')(agent, batch['observations'], KEY, 1.0)
    assert actions.shape == batch['actions'].shape and jnp.isfinite(actions).all()


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (dict(encoder='impala_debug', clip_flow_goals=True), 'clip_flow_goals'),
        (dict(encoder='impala_tiny', clip_flow_goals=False), 'impala_tiny'),
        (dict(q_agg='max'), 'q_agg'),
        (dict(critic_latent_type='posterior'), 'critic_latent_type'),
        (dict(latent_dim=0), 'latent_dim'),
        (dict(num_flow_goals=0), 'num_flow_goals'),
        (dict(num_flow_steps=-1), 'num_flow_steps'),
        (dict(num_critic_latents=0), 'num_critic_latents'),
        (dict(finetuning_field_rate=-0.1), 'finetuning_field_rate'),
        (dict(finetuning_schedule='linear'), 'finetuning_schedule'),
        (dict(schedule_steps=0), 'schedule_steps'),
    ],
)
def test_impossible_configurations_are_user_errors(overrides, message):
    batch = tiny.make_image_batch() if 'encoder' in overrides else tiny.make_batch()
    with pytest.raises(UserError, match=message):
        tiny.make_agent(batch, **overrides)


def test_defaults_are_the_published_ones():
    """The common defaults and InFOM's own."""
    config = get_config()
    widths = (512, 512, 512, 512)
    expected = dict(
        lr=3e-4,
        actor_lr=None,
        batch_size=256,
        discount=0.99,
        tau=0.005,
        actor_freq=4,
        actor_layer_norm=False,
        const_std=True,
        expectile=0.9,
        encoder=None,
        latent_dim=512,
        kl_weight=0.01,
        alpha=10.0,
        q_agg='min',
        critic_latent_type='prior',
        num_flow_goals=16,
        num_flow_steps=10,
        clip_flow_goals=True,
        normalize_q_loss=False,
        intention_encoder_layer_norm=True,
        reward_layer_norm=True,
        value_layer_norm=True,
        **{f'{module}_hidden_dims': widths for module in ('intention_encoder', 'actor', 'value', 'reward')},
    )
    assert {name: config[name] for name in expected} == expected


# ------------------------------------------------------------------------------------------------ one step to the digit

PINNED = {
    'pretrain': {
        'actor_mse': 0.653994,
        'bc_loss': 3.73781,
        'current_flow_loss': 3.53926,
        'flow_loss': 4.34668,
        'future_flow_loss': 4.4364,
        'kl_loss': 2.67067,
        'loss': 8.11119,
    },
    'finetune': {
        'actor_loss': 38.6954,
        'actor_mse': 0.653994,
        'actor_q': -1.31738,
        'bc_loss': 3.73781,
        'critic_loss': 203.014,
        'current_flow_loss': 3.52154,
        'flow_loss': 3.52775,
        'future_flow_loss': 3.52845,
        'kl_loss': 2.67067,
        'loss': 248.41,
        'q_max': 1.30335,
        'q_mean': -0.418378,
        'q_min': -2.9924,
        'q_target_mean': 1.8318,
        'reward_loss': 3.14662,
        'reward_prediction': 0.722821,
    },
}


@pytest.mark.parametrize('method', PINNED)
def test_the_metrics_of_one_step_are_what_they_were(method):
    """Pinned, so that no change of what is computed, or of the order of random numbers, goes unnoticed. If a change is
    meant, put the new values here and say so in the commit: earlier runs can then not be reproduced to the digit."""
    batch = tiny.make_batch()
    options = {'update_actor': True} if method == 'finetune' else {}
    _, metrics = tiny.compiled(method, **options)(tiny.make_agent(batch), batch, jax.random.key(5))
    assert metrics.keys() == PINNED[method].keys()
    for name, value in PINNED[method].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
