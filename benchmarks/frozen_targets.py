"""What the critic's targets are worth over fine-tuning: critic and actor from the start, on targets that stand still.

    python finetune.py --env_name=… --restore_path=… --keep_interval=10000 --run_group=targets --run_name=ours_sd0
    python -m benchmarks.frozen_targets exp/targets/ours_sd0 [--updates=20000] [--output=exp/targets/results]

Where success falls in a long fine-tuning, either the policy has spoilt, or the critic, or what the critic is taught.
Here occupancy model and reward are those of a checkpoint and learn no more; a fresh critic, and the policy as
pre-training cloned it, learn from them as in fine-tuning. If they succeed as they did then, the targets are as good as
they were. Beside success, on held-out labelled rows: how the critic's values agree with the mean of the targets, over
rows, and over what another action (the data's, with noise) changes in a row; and how large that change is in the
targets, in units of their standard deviation over rows. InFOM, the run's first seed. Writes `frozen_targets.csv` and
prints a Markdown table.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from agents.infom import InFOMAgent
from utils import checkpoints, cli, datasets, training, values
from utils.errors import UserError, expanded
from utils.inspect import open_run
from utils.runs import require_writable, write_csv

FLAGS = flags.FLAGS

NUM_ROWS = 2_048  # Held-out rows of the agreements,
NUM_INTENTIONS = 64  # draws of the target for each,
ACTION_NOISE = 0.3  # and the standard deviation of what is added to their actions.
COLUMNS = (
    'run', 'seed', 'targets_of', 'updates', 'return', 'success', 'agreement_over_rows', 'agreement_over_actions',
    'change_by_action',
)  # fmt: skip


class OnFrozenTargets(InFOMAgent):
    """InFOM whose fine-tuning trains critic and actor alone."""

    def finetune(self, batch, key, *, update_actor: bool):
        def loss_fn(params):
            loss, metrics = self.critic_loss(params, batch, key)
            if update_actor:
                actor_loss, actor_metrics = self.actor_loss(params, batch)
                loss, metrics = loss + actor_loss, metrics | actor_metrics
            return loss, metrics

        return self._step(['critic'] + ['actor'] * update_actor, loss_fn, batch, key)


def on_frozen_targets(finetuned: InFOMAgent, pretrained: InFOMAgent) -> OnFrozenTargets:
    """Critic and actor of `pretrained`, Adam states and all, in front of the targets of `finetuned`."""
    fields = {field.name: getattr(finetuned, field.name) for field in dataclasses.fields(finetuned)}
    fresh = {name: pretrained.params[name] for name in ('critic', 'actor')}
    fields |= {'params': finetuned.params | fresh, 'opt_states': pretrained.opt_states}
    return OnFrozenTargets(**fields)


def agreements(agent: InFOMAgent, dataset, key) -> dict[str, float]:
    """The last three of `COLUMNS`, of an agent's Q and targets on up to `NUM_ROWS` of a labelled data set."""
    row_key, noise_key, target_key = jax.random.split(key, 3)
    rows = dataset.next_action_rows
    rows = jax.random.choice(row_key, rows, (min(NUM_ROWS, len(rows)),), replace=False)
    batch = datasets.gather_batch(dataset, rows, agent.needs)
    actions = batch['actions']
    others = jnp.clip(actions + ACTION_NOISE * jax.random.normal(noise_key, actions.shape), -1, 1)

    @jax.jit
    def of(actions):
        changed = {**batch, 'actions': actions}
        targets = values.intention_values(agent, changed, target_key, NUM_INTENTIONS).mean(axis=0)
        return agent.q_values(batch['observations'], actions), targets

    (qs, targets), (other_qs, other_targets) = jax.device_get((of(actions), of(others)))
    return {
        'agreement_over_rows': np.corrcoef(qs, targets)[0, 1],
        'agreement_over_actions': np.corrcoef(other_qs - qs, other_targets - targets)[0, 1],
        'change_by_action': np.std(other_targets - targets) / np.std(targets),
    }


def measure(
    directory: Path, evaluator, updates: int, interval: int, episodes: int, dataset_dir: str | None = None
) -> list:
    """Rows of `COLUMNS`: for each checkpoint of fine-tuning that the run kept, the scores every `interval` updates.

    evaluator: a `utils.evaluation.Evaluator` of the run's task.

    Raises:
        UserError: no run of InFOM with a checkpoint of fine-tuning; its data, or what it began with, are not where they
            were; `interval` does not divide `updates`, or is no multiple of the run's `actor_freq`.
    """
    look = open_run(directory, dataset_dir=dataset_dir)
    if look.config['agent_name'] != 'infom':
        raise UserError(f'{directory}: {look.config["agent_name"]}: expected InFOM')
    finetuned = [path for path in look.checkpoints if checkpoints.load_meta(path)['phase'] == 'finetuning']
    if not finetuned:
        raise UserError(f'{directory}: no checkpoint of fine-tuning')
    pretrained, _, _ = look.load_agent(_beginning(look))
    agent, normalizer, _ = look.load_agent(finetuned[0])
    if updates % interval or interval % agent.config.actor_freq:
        raise UserError(
            f"--interval={interval}: expected a divisor of --updates={updates} and a multiple of the run's "
            f'agent.actor_freq={agent.config.actor_freq}'
        )
    labelled = look.make_dataset(look.load_raw('finetuning', 'train'), normalizer)
    held_out = look.make_dataset(look.load_raw('finetuning'), normalizer)
    keys = training.stream_keys([look.seed], 'finetuning')
    name, rows = look.directory.resolve().name, []
    for path in finetuned:
        taught_by, _, meta = look.load_agent(path)
        agents = jax.tree.map(lambda x: x[None], on_frozen_targets(taught_by, pretrained))
        for start in tqdm(range(0, updates, interval), desc=f'targets of {meta["step"]:,}', unit='interval'):
            arguments = agents, labelled, keys, np.int32(start)
            agents, _ = training.train_chunk(*arguments, phase='finetuning', n=interval)
            policy = training.make_policy(agents, normalizer, [look.seed])
            (scores,) = evaluator.evaluate(policy, [look.seed], episodes)
            found = agreements(jax.tree.map(lambda x: x[0], agents), held_out, jax.random.key(0))
            success = scores.get('episode.success', np.nan)
            rows.append(
                (name, look.seed, meta['step'], start + interval, scores['episode.return'], success, *found.values())
            )
    return rows


def _beginning(look) -> Path:
    """The checkpoint of pre-training that a run's fine-tuning began with. Raises UserError where there was none."""
    if checkpoints.load_meta(look.checkpoints[0])['phase'] == 'pretraining':
        return look.checkpoints[0]
    if look.config.get('restore_path') is None:
        raise UserError(f'{look.directory}: it was fine-tuned without a pre-training: there is no clone to begin with')
    return checkpoints.resolve(Path(look.config['restore_path']), phase='pretraining')


def table(rows) -> str:
    """Markdown: a row for each checkpoint, success after so many updates, and the last agreements."""
    ends = sorted({row[3] for row in rows})
    head = ['targets of', *(f'success % after {end:,}' for end in ends), 'agreement over rows', 'over actions']
    head += ['change by action']
    output = [head, ['---'] * len(head)]
    for step in sorted({row[2] for row in rows}):
        of_step = [row for row in rows if row[2] == step]
        agreement = [f'{value:.2f}' for value in of_step[-1][6:]]
        output.append([f'{step:,}', *(f'{100 * row[5]:.0f}' for row in of_step), *agreement])
    return '\n'.join(f'| {" | ".join(row)} |' for row in output)


def main(argv):
    import envs
    from utils.evaluation import Evaluator

    directory = expanded(argv[1])
    config = open_run(directory).config  # Before a folder is made for what is measured of it.
    output = expanded(FLAGS.output) if FLAGS.output else directory
    require_writable(output)
    make_env = functools.partial(envs.make_env, config['env_name'], frame_stack=config.get('frame_stack', 1))
    with Evaluator(make_env, FLAGS.eval_workers) as evaluator:
        rows = measure(directory, evaluator, FLAGS.updates, FLAGS.interval, FLAGS.eval_episodes, FLAGS.dataset_dir)
    write_csv(output / 'frozen_targets.csv', COLUMNS, rows)
    print(table(rows))


if __name__ == '__main__':
    flags.DEFINE_string('dataset_dir', None, 'Folder of the data files (default: where the run had them).')
    flags.DEFINE_string('output', None, 'Where the CSV goes (default: into the run).')
    flags.DEFINE_integer('updates', 20_000, 'Updates of critic and actor.', lower_bound=1)
    flags.DEFINE_integer('interval', 5_000, 'Updates between two scores.', lower_bound=1)
    flags.DEFINE_integer('eval_episodes', 50, 'Episodes of a score.', lower_bound=1)
    flags.DEFINE_integer('eval_workers', 1, 'Processes that step environments.', lower_bound=1)
    cli.run(main, positional=('run',))
