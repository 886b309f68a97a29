"""How well a learned reward knows the reward of episodes that it was not fitted to.

    python -m benchmarks.reward_fit --env_name=cube-single-play-singletask-task1-v0 --dataset_dir=… \
        [--weight_decays=0,1,3] [--layer_norms=true,false] [--steps=1000,2000,4000,8000]

Cross-validation over the labelled episodes: InFOM's reward network is fitted, as in fine-tuning but alone, to all folds
but one, and scored on that one's rows. Prints a Markdown table: the loss on the rows that it is fitted to, and on those
held out the correlation with the true reward and the share of its variance that is explained (1 − loss / variance;
below 0 a constant would do better).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import envs
from agents import common, infom
from envs.data import load_raw
from utils import cli, presets
from utils.datasets import Dataset, example_batch, gather_batch
from utils.errors import UserError, expanded
from utils.normalizers import Normalizer

FLAGS = flags.FLAGS

ROWS_AT_ONCE = 10_000


def folds(dataset: Dataset, count: int) -> np.ndarray:
    """The fold of each transition, (transitions,): whole episodes in turn."""
    episodes = np.unique(dataset.ends[dataset.transition_rows], return_inverse=True)[1]
    if episodes.max() + 1 < count:
        raise UserError(f'{episodes.max() + 1} episodes cannot be parted into {count} folds: choose fewer --folds')
    return episodes % count


@functools.partial(jax.jit, static_argnames='steps')
def fit(agent, dataset, rows, key, steps):
    """The agent after `steps` updates of its reward on batches from `rows`, and the mean loss of the last hundred."""

    def update(agent, key):
        batch = gather_batch(dataset, jax.random.choice(key, rows, (agent.config.batch_size,)))
        params, opt_states, metrics = common.adam_step(
            agent, ['reward'], lambda params: agent.reward_loss(params, batch)
        )
        return agent.replace(params=params, opt_states=opt_states), metrics['reward_loss']

    agent, losses = jax.lax.scan(update, agent, jax.random.split(key, steps))
    return agent, losses[-100:].mean()


@jax.jit
def predict(agent, dataset, rows):
    """Learned rewards of `rows`: (rows,)."""
    return agent.predicted_rewards(agent.params, gather_batch(dataset, rows)['reward_observations'])


def cross_validate(dataset: Dataset, config, milestones, num_folds: int, seed: int):
    """For each of `milestones` (updates): loss on the fitted rows, held-out correlation and explained variance, over
    the rows of all folds."""
    fold_of = folds(dataset, num_folds)
    on_device = jax.device_put(dataset)
    create = jax.jit(lambda key: infom.InFOMAgent.create(key, example_batch(dataset), config))
    losses, predictions = ([[] for _ in milestones] for _ in range(2))
    truths = []
    for fold in range(num_folds):
        fitted, held_out = (
            jnp.asarray(dataset.transition_rows[chosen]) for chosen in (fold_of != fold, fold_of == fold)
        )
        truths.append(on_device.rewards[held_out])
        agent, done = create(jax.random.fold_in(jax.random.key(seed), fold)), 0
        for i, milestone in enumerate(milestones):
            key = jax.random.fold_in(jax.random.key(seed + 1), fold * len(milestones) + i)
            agent, loss = fit(agent, on_device, fitted, key, steps=milestone - done)
            losses[i].append(loss)
            # In parts: the activations of all rows at once would take hundreds of megabytes.
            predictions[i] += [
                predict(agent, on_device, held_out[start : start + ROWS_AT_ONCE])
                for start in range(0, len(held_out), ROWS_AT_ONCE)
            ]
            done = milestone
    truth = np.concatenate(truths)
    for loss, parts in zip(losses, predictions, strict=True):
        prediction = np.concatenate(parts)
        explained = 1 - np.mean((prediction - truth) ** 2) / truth.var()
        yield float(np.mean(loss)), float(np.corrcoef(prediction, truth)[0, 1]), float(explained)


def main(_):
    spec = envs.task_spec(FLAGS.env_name)
    if spec.visual:
        raise UserError(f'{spec.name} has images, whose reward is fitted to features that learn with the rest')
    milestones, decays = FLAGS.steps, FLAGS.weight_decays
    raw = load_raw(spec.name, 'finetuning', 'train', expanded(FLAGS.dataset_dir), FLAGS.finetuning_size)
    if np.ptp(raw['rewards']) == 0:
        raise UserError(f'every reward of {spec.name} there is {raw["rewards"][0]:g}: nothing to learn')
    settings = presets.resolve('infom', spec.name, FLAGS.preset)
    normalizer = Normalizer.fit(raw['observations'], settings.flags['obs_norm_type'])
    dataset = Dataset.create(raw, normalizer, reward_at=spec.reward_at)
    print(f'{spec.name}, preset {FLAGS.preset}: {len(dataset.transition_rows):,} transitions, {FLAGS.folds} folds\n')
    print(
        '| weight decay | LayerNorm | updates | loss | held out: correlation | explained |\n|---|---|---|---|---|---|'
    )
    for decay, norm in itertools.product(decays, FLAGS.layer_norms):
        config = infom.get_config()
        config.update({**settings.agent, 'reward_weight_decay': decay, 'reward_layer_norm': norm == 'true'})
        for step, values in zip(
            milestones, cross_validate(dataset, config, milestones, FLAGS.folds, FLAGS.seed), strict=True
        ):
            print(
                f'| {decay:g} | {norm} | {step:,} | {values[0]:.4f} | {values[1]:.2f} | {values[2]:.2f} |', flush=True
            )


if __name__ == '__main__':
    flags.DEFINE_string(
        'env_name', 'cube-single-play-singletask-task1-v0', 'Task whose labels are fitted; states only.'
    )
    flags.DEFINE_string('dataset_dir', '~/.ogbench/data', 'Folder of the data files.')
    flags.DEFINE_string('preset', 'small', 'Preset that gives the sizes of the network and the learning rate.')
    flags.DEFINE_integer('finetuning_size', 50_000, 'Transitions used, at most.', lower_bound=1)
    cli.define_numbers('weight_decays', [0, 1], 'Values of reward_weight_decay to compare.', kind=float)
    flags.DEFINE_list('layer_norms', ['true'], 'Values of reward_layer_norm to compare: true, false.')
    flags.register_validator('layer_norms', lambda values: {*values} <= {'true', 'false'}, 'expected true or false')
    cli.define_numbers('steps', [1_000, 2_000, 4_000, 8_000], 'Numbers of updates after which to score.', minimum=100)
    flags.DEFINE_integer('folds', 5, 'Parts of the episodes, each held out once.', lower_bound=2)
    flags.DEFINE_integer('seed', 0, 'Seed of networks and batches.')
    cli.run(main)
