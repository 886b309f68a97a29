"""DINO + ReBRAC: losses and gradients against float64 NumPy, the centre, the views, and features that do not collapse.
What holds for every agent is in `test_agents.py`."""

import functools

import jax
import numpy as np
import pytest

import agents
from tests import infom_reference as reference
from tests import loss_checks, rebrac_reference, tiny, tiny_agents
from tests.learning import train
from utils import datasets, training
from utils.errors import UserError

KEY = jax.random.key(7)
# Two configurations that differ in every switch that a loss depends on.
VARIANTS = {
    'defaults': dict(),
    'switched': dict(
        repr_temp=0.5,
        target_repr_temp=0.3,
        repr_noise=0.5,
        repr_noise_clip=0.3,
        tanh_squash=False,
        normalize_q_loss=False,
        alpha_critic=1.3,
    ),
}


@functools.cache
def make_case(name):
    """(agent, batch) with a centre that is not at its start, and some transitions that end their episode."""
    batch = tiny_agents.make_batch()
    batch['masks'] = batch['masks'].at[::3].set(0.0)
    agent = tiny_agents.make_agent('dino_rebrac', batch, **VARIANTS[name])
    return agent.replace(center=tiny.perturb(agent.center, 4, 0.5)), batch


def features(params, config, s):
    return reference.mlp(params['encoder'], s, len(config.encoder_hidden_dims), norm=True)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def views(config, s, key):
    """Both views in float64, from the agent's draws."""
    noises = [np.float64(config.repr_noise * jax.random.normal(k, s.shape)) for k in jax.random.split(key)]
    return [s + np.clip(noise, -config.repr_noise_clip, config.repr_noise_clip) for noise in noises]


def distillation_loss(params, teacher, center, config, s, key, crossed=True):
    v1, v2 = views(config, s, key)

    def cross_entropy(target_view, view):
        targets = softmax((features(teacher, config, target_view) - center) / config.target_repr_temp)
        return -(targets * np.log(softmax(features(params, config, view) / config.repr_temp))).sum(-1).mean()

    if not crossed:
        return (cross_entropy(v1, v1) + cross_entropy(v2, v2)) / 2
    return (cross_entropy(v1, v2) + cross_entropy(v2, v1)) / 2


def make_reference(agent, batch):
    config = agent.config
    frozen, target, batch = (reference.float64(x) for x in (agent.params, agent.target_params, batch))
    noise = np.float64(jax.random.normal(KEY, batch['actions'].shape))
    encoded = {**batch, **{k: features(frozen, config, batch[k]) for k in ('observations', 'next_observations')}}

    def losses(params):
        terms = rebrac_reference.losses(params, frozen, target, config, encoded, noise)
        repr_loss = distillation_loss(params, target, np.float64(agent.center), config, batch['observations'], KEY)
        cloning = terms['pretraining']['bc_loss']
        pretraining = {'loss': repr_loss + cloning, 'repr_loss': repr_loss, 'bc_loss': cloning}
        return {**terms, 'pretraining': pretraining}

    return losses


@pytest.mark.parametrize('name', VARIANTS)
def test_losses(name):
    agent, batch = make_case(name)
    loss_checks.assert_losses_match(agent, batch, KEY, make_reference(agent, batch))


@pytest.mark.parametrize('name', VARIANTS)
def test_gradients(name):
    agent, batch = make_case(name)
    loss_checks.assert_gradients_match(agent, batch, KEY, make_reference(agent, batch))


def test_views_are_crossed_at_work():
    """Targets of the same view would give another loss: otherwise the crossing would go untested above."""
    for name in VARIANTS:
        agent, batch = make_case(name)
        params, target = reference.float64(agent.params), reference.float64(agent.target_params)
        arguments = (params, target, np.float64(agent.center), agent.config, np.float64(batch['observations']), KEY)
        assert abs(distillation_loss(*arguments) - distillation_loss(*arguments, crossed=False)) > 1e-2


def test_the_centre_follows_the_teacher_in_pretraining_alone():
    """c ← 0.9·c + 0.1·(mean over both views and the batch of the teacher before the step)."""
    agent, batch = make_case('switched')
    teacher = reference.float64(agent.target_params)
    outputs = [features(teacher, agent.config, v) for v in views(agent.config, np.float64(batch['observations']), KEY)]
    expected = 0.9 * np.float64(agent.center) + 0.1 * np.mean(outputs, axis=(0, 1))
    step = jax.jit(lambda agent: agent.pretrain(batch, KEY)[0].center)
    np.testing.assert_allclose(step(agent), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - np.float64(agent.center)).max() > 1e-2
    assert agent.begin_finetuning(batch, KEY).center is agent.center
    # Of what fine-tuning does to it, only the centre is computed: an input that is handed on.
    finetuned = jax.jit(lambda agent: agent.finetune(batch, KEY, update_actor=True)[0].center)(agent)
    np.testing.assert_array_equal(finetuned, agent.center)


def test_views_of_images_are_independent_crops():
    batch = tiny_agents.make_batch(images=True, size=24)
    agent = tiny_agents.make_agent('dino_rebrac', batch, images=True)
    images = np.asarray(batch['observations'])
    pad, size = datasets.CROP_PADDING, images.shape[1]
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode='edge')
    offsets = []
    for view in np.asarray(jax.jit(lambda agent: agent.views(batch['observations'], KEY))(agent)):
        assert view.shape == images.shape and view.dtype == np.uint8
        for image, whole in zip(view, padded, strict=True):
            crops = {(y, x): whole[y : y + size, x : x + size] for y in range(2 * pad + 1) for x in range(2 * pad + 1)}
            found = [offset for offset, crop in crops.items() if np.array_equal(crop, image)]
            assert len(found) == 1, 'every view is one crop of its own image'
            offsets += found
    assert len(set(offsets)) > len(images), 'rows and views are cropped independently'
    for along in np.transpose(offsets):
        assert set(along) == set(range(2 * pad + 1)), 'every offset, up to the very edges'


@pytest.mark.parametrize(('images', 'encoder'), [(True, 'mlp'), (False, 'impala_debug')])
def test_the_encoder_must_suit_the_observations(images, encoder):
    with pytest.raises(UserError, match=r'agent.encoder=.* for (images|states): use'):
        tiny_agents.make_agent('dino_rebrac', tiny_agents.make_batch(images), images, encoder=encoder)


def test_features_do_not_collapse():
    """States of four clusters: after pre-training the features of different states differ, and two views of one state
    are far closer to each other than to views of another."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(4, tiny.STATE_DIM))
    states = centers[rng.integers(0, 4, (40, 16))] + 0.3 * rng.normal(size=(40, 16, tiny.STATE_DIM))
    terminals = np.zeros((40, 16), bool)
    terminals[:, -1] = True
    raw = {
        'observations': states.reshape(-1, tiny.STATE_DIM).astype(np.float32),
        'actions': rng.uniform(-0.9, 0.9, (640, tiny.ACTION_DIM)).astype(np.float32),
        'terminals': terminals.reshape(-1),
    }
    dataset, seeds = tiny.make_dataset(raw), [0, 1]
    config = tiny_agents.make_config('dino_rebrac', encoder_hidden_dims=(32, 32), batch_size=64, lr=1e-3, tau=0.02)
    module = agents.load('dino_rebrac')
    trained = training.create_agents(module.AGENT, seeds, datasets.example_batch(dataset), config)
    trained = train(trained, seeds, dataset, 'pretraining', 1000)

    @jax.jit
    @jax.vmap
    def both_views(agent):
        return agent.features(agent.params, agent.views(dataset.observations, KEY))

    for first, second in np.asarray(both_views(trained)):
        assert first.std(axis=0).mean() > 0.3, 'LayerNorm gives each row a spread of 1: the batch must vary as well'
        same = np.linalg.norm(first - second, axis=-1).mean()
        shuffled = np.linalg.norm(first - second[rng.permutation(len(second))], axis=-1).mean()
        assert same < 0.5 * shuffled
