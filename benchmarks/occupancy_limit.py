"""What a run's vector field could know of the future at best: the same field, taught by the futures that came.

    python -m benchmarks.occupancy_limit exp/occupancy/ours_sd0 [--updates=20000] [--output=exp/occupancy/limit]

InFOM's field never sees where a trajectory led: it learns from its own samples at the next state. Here a fresh field of
the run's sizes is fitted, on the run's reward-free data, to the states that came after (s, a), discounted, and scored
as `python -m benchmarks.occupancy` scores the run's own, on the same held-out states. If that is no better, what is
missing in the run's field is not in these data, or no field of this size finds it; if it is, bootstrapping lost it.
The run's first seed; InFOM on states. Writes `occupancy_limit.csv` and prints a Markdown table.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from agents.infom import InFOMAgent
from benchmarks.occupancy import COLUMNS, NUM_FUTURES, report_rows, table
from utils import cli, datasets, occupancy, training
from utils.errors import UserError, expanded
from utils.goals import Goals
from utils.inspect import open_run
from utils.runs import require_writable, write_csv

FLAGS = flags.FLAGS

LABEL = 'taught by the futures'


class TaughtByFutures(InFOMAgent):
    """InFOM's field, fitted by flow matching to true futures instead of by the TD-flow loss."""

    @property
    def needs(self) -> frozenset:
        future = Goals('future', future=1.0, discount=self.config.discount, first_offset=0)
        return super().needs | {future}

    def matching_loss(self, params, batch, key):
        """E‖v(x_t, t, s, a, z) − (s_f − ε)‖² (arXiv 2210.02747, eq. 23), x_t = t·s_f + (1−t)·ε, s_f a true future and z
        of the prior, which then says nothing."""
        latent_key, time_key, noise_key = jax.random.split(key, 3)
        futures = batch['futures']
        latents = occupancy.prior_intentions(self, latent_key, len(futures))
        times = jax.random.uniform(time_key, (len(futures), 1))
        noise = jax.random.normal(noise_key, futures.shape)
        condition = self.condition(params, batch['observations'], batch['actions'], latents)
        velocities = self.velocity(params, times * futures + (1 - times) * noise, times, condition)
        loss = jnp.mean((velocities - (futures - noise)) ** 2)
        return loss, {'flow_loss': loss}

    def pretrain(self, batch, key):
        return self._step(['vector_field'], lambda params: self.matching_loss(params, batch, key), batch, key)


def measure(directory: Path, updates: int, interval: int, num_states: int, dataset_dir: str | None = None) -> list:
    """Rows of `benchmarks.occupancy.COLUMNS`: the run's kept checkpoints of pre-training, then the taught field every
    `interval` updates.

    Raises:
        UserError: no run of InFOM on states that kept a checkpoint of pre-training, or its data are not where they
            were.
    """
    look = open_run(directory, dataset_dir=dataset_dir)
    if look.config['agent_name'] != 'infom' or look.task.visual:
        raise UserError(f'{directory}: {look.config["agent_name"]} on {look.task.name}: expected InFOM on states')
    look.load()
    agent, normalizer, meta = look.load_agent(look.checkpoints[0])
    if meta['phase'] != 'pretraining':
        raise UserError(f'{directory}: its first checkpoint is of {meta["phase"]}: expected one of pre-training')
    name, key = look.directory.resolve().name, jax.random.key(0)
    rows = []
    for scored, report in look.score_occupancy(key, num_states, NUM_FUTURES):
        if scored['phase'] != 'pretraining':
            break
        rows += report_rows(name, look.seed, 'pretraining', scored['step'], report)

    training_rows = look.make_dataset(look.load_raw('pretraining', 'train'), normalizer)
    held_out = look.make_dataset(look.raw, normalizer)
    example = datasets.example_batch(training_rows)
    taught = training.create_agents(TaughtByFutures, [look.seed], example, agent.config)
    keys = training.stream_keys([look.seed], 'pretraining')
    for start in tqdm(range(0, updates, interval), desc='teaching', unit='interval'):
        end = min(start + interval, updates)
        arguments = taught, training_rows, keys, np.int32(start)
        taught, _ = training.train_chunk(*arguments, phase='pretraining', n=end - start)
        one = jax.tree.map(lambda x: x[0], taught)
        report = occupancy.occupancy_report(one, held_out, key, num_states, NUM_FUTURES)
        rows += report_rows(LABEL, look.seed, 'pretraining', end, report)
    return rows


def main(argv):
    directory = expanded(argv[1])
    open_run(directory)  # Before a folder is made for what is measured of it.
    output = expanded(FLAGS.output) if FLAGS.output else directory
    require_writable(output)
    rows = measure(directory, FLAGS.updates, FLAGS.interval, FLAGS.num_states, FLAGS.dataset_dir)
    write_csv(output / 'occupancy_limit.csv', COLUMNS, rows)
    print(table(rows))


if __name__ == '__main__':
    flags.DEFINE_string('dataset_dir', None, 'Folder of the data files (default: where the run had them).')
    flags.DEFINE_string('output', None, 'Where the CSV goes (default: into the run).')
    flags.DEFINE_integer('num_states', 256, 'Held-out states.', lower_bound=1)
    flags.DEFINE_integer('updates', 20_000, 'Updates of the taught field.', lower_bound=1)
    flags.DEFINE_integer('interval', 5_000, 'Updates between two scores.', lower_bound=1)
    cli.run(main, positional=('run',))
