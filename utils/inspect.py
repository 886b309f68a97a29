"""A look inside one run: `report.html` in the run directory, a single page with everything embedded.

    python -m utils.inspect <run directory> [--seed=1] [--dataset_dir=…]

It reads what the run left on disk (config.json, metrics.jsonl, checkpoints) and the held-out files of its data; the
pictures and the numbers behind them go to `<run directory>/figures/inspect_*`. What the page says, and how to read it,
is in docs/inspect.md. The parts of the page are in `inspect_parts.py`, the drawing in `inspect_figures.py`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags

import envs
from utils import checkpoints, cli, runs
from utils.errors import UserError, expanded
from utils.report import Report

FLAGS = flags.FLAGS
CONFIG_KEYS = (
    'agent_name', 'env_name', 'preset', 'seed', 'num_seeds', 'pretraining_steps', 'finetuning_steps',
    'pretraining_size', 'finetuning_size', 'obs_norm_type', 'frame_stack', 'eval_episodes', 'dataset_dir',
)  # fmt: skip


@dataclasses.dataclass
class Look:
    """What the parts of the report work from: one seed of one run, its newest agent, and its held-out data.

    `raw` is what `envs.data.load_raw` gave of the held-out rows, `dataset` the same rows as the agent sees them;
    `phase` says which of the run's two held-out files they come from. `task` is the task's `envs.TaskSpec`.
    """

    directory: Path
    config: dict
    task: Any
    seed: int
    dataset_dir: str
    checkpoints: list[Path]
    num_states: int
    agent: Any = None
    normalizer: Any = None
    trained_on: str = ''  # The phase of the newest checkpoint.
    phase: str = ''
    raw: dict = dataclasses.field(default_factory=dict)
    dataset: Any = None

    def figure(self, name: str) -> Path:
        """Where a file of the report goes."""
        return self.directory / 'figures' / f'inspect_{name}'

    def load_agent(self, checkpoint: Path):
        """(this seed's agent, normaliser, metadata) of one of the run's checkpoints."""
        import jax

        from utils.saved_policy import load_agents

        agents, normalizer, meta = load_agents(checkpoint, self.task)
        return jax.tree.map(lambda x: x[self.seed - meta['seed']], agents), normalizer, meta

    def load_raw(self, phase: str, split: str = 'val') -> dict:
        """The held-out rows of a phase (or, `train`, those it is trained on), in the simulator's units."""
        from envs import custom, data

        if self.task.suite == custom.SUITE:
            return custom.load_raw(self.task.dataset_env, phase, split)
        return data.load_raw(self.task.name, phase, split, self.dataset_dir)

    def mind_another_file(self, phase: str, raw: dict, report: Report) -> None:
        """Says so where the held-out rows of a phase are not those that the run was validated on."""
        recorded = self.config['data'].get(f'{phase}/val')
        if recorded is not None and recorded['fingerprint'] != raw['source']['fingerprint']:
            report.text(f'Mind: {raw["source"]["file"]} is not the file that this run was validated on.')

    def make_dataset(self, raw: dict, normalizer=None):
        """Rows as the agent sees them, on the device; by the normaliser of the newest checkpoint if none is given."""
        import jax

        from utils.datasets import Dataset

        normalizer = self.normalizer if normalizer is None else normalizer
        return jax.device_put(
            Dataset.create(
                raw, normalizer, reward_at=self.task.reward_at, frame_stack=self.config.get('frame_stack', 1)
            )
        )

    def load(self) -> dict:
        """Loads the newest agent and the held-out data; returns the checkpoint's metadata."""
        from utils import devices

        if 'precision' in self.config:
            devices.set_matmul_precision(self.config['precision'])
        self.agent, self.normalizer, meta = self.load_agent(self.checkpoints[-1])
        self.trained_on = meta['phase']
        self.raw = self.load_raw(self.phase)
        self.dataset = self.make_dataset(self.raw)
        return meta

    def units(self, meta: dict) -> str:
        """What distances between a checkpoint's states are measured in, and on which held-out file: they compare only
        with others of the same. meta: the checkpoint's metadata."""
        if self.task.visual:  # Every checkpoint has an encoder, and so a feature space, of its own.
            return f'features of {self.directory} at step {meta["step"]}'
        source = self.raw['source']
        return f'{source["file"]} ({source["fingerprint"][:8]}), normaliser {runs.digest(meta["normalizer"])}'

    def score_occupancy(self, key, num_states: int, num_samples: int):
        """Yields (metadata, `occupancy.occupancy_report`) of every kept checkpoint on the held-out rows, oldest first.

        Each checkpoint sees the rows by its own normaliser; almost always it is the newest one's, and the rows are
        those that `load` has put on the device. Raises UserError where the agent models no occupancy.
        """
        from utils import occupancy

        for path in self.checkpoints:
            agent, normalizer, meta = self.load_agent(path)
            if not occupancy.models_occupancy(agent):
                raise UserError(f'{self.directory}: {self.config["agent_name"]} has no model of future states')
            known = normalizer.to_dict() == self.normalizer.to_dict()
            rows = self.dataset if known else self.make_dataset(self.raw, normalizer)
            yield meta, occupancy.occupancy_report(agent, rows, key, num_states, num_samples)


def open_run(directory, seed=None, dataset_dir=None, num_states=3) -> Look:
    """Everything about a run but its arrays. Raises UserError where it is no run directory, or has no such seed."""
    directory = expanded(directory)
    try:
        config = json.loads((directory / 'config.json').read_text())
        first, count, recorded = config['seed'], config['num_seeds'], config['data']
        task = envs.task_spec(config['env_name'], config.get('dataset'))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{directory} is not a run directory ({type(error).__name__}: {error}): expected one that main.py, '
            'pretrain.py or finetune.py made, with config.json and checkpoints/'
        ) from error
    saved = checkpoints.all_in(checkpoints.resolve(directory).parent)
    seed = first if seed is None else seed
    if not first <= seed < first + count:
        raise UserError(f'{directory} has no seed {seed}: expected {first} to {first + count - 1}')
    look = Look(directory, config, task, seed, dataset_dir or config['dataset_dir'], saved, num_states)
    look.phase = next((phase for phase in ('pretraining', 'finetuning') if f'{phase}/val' in recorded), 'pretraining')
    return look


def inspect_run(look: Look) -> Path:
    """Loads agent and data, writes the figures and the report, and returns the report's path."""
    from tqdm import tqdm

    from utils import inspect_parts as parts  # With these JAX comes in, which takes seconds.

    runs.require_writable(look.directory / 'figures')
    meta = look.load()
    report = Report(f'{look.config["agent_name"]} on {look.config["env_name"]}: {look.directory.name}')
    introduce(look, meta, report)
    sections = {
        'Scores': parts.scores,
        'Learning curves': parts.curves,
        'Videos': parts.videos,
        'Futures': parts.futures,
        'Intentions': parts.intentions,
        'Quality of the occupancy': parts.occupancy,
        'Values along an episode': parts.values,
    }
    bar = tqdm(sections.items(), desc='inspect', unit='section')
    for heading, part in bar:
        bar.set_postfix_str(heading)
        report.section(heading)
        part(look, report)
    configure(look, report)
    path = look.directory / 'report.html'
    report.write(path)
    return path


def introduce(look: Look, meta: dict, report: Report) -> None:
    """Which seed, which checkpoint and which data the page is about."""
    steps = ', '.join(path.name for path in look.checkpoints)
    report.text(
        f'Seed {look.seed}, the newest checkpoint: step {meta["step"]}, at the end of {meta["phase_step"]} updates of '
        f'{meta["phase"]} (kept checkpoints: {steps}). Held-out states: {len(look.raw["terminals"])} rows in '
        f'{int(look.raw["terminals"].sum())} episodes of {look.raw["source"]["file"]}, which no update has seen.'
    )
    look.mind_another_file(look.phase, look.raw, report)


def configure(look: Look, report: Report) -> None:
    """The settings and the software of the run."""
    report.section('Configuration')
    config = look.config
    environment = config.get('environment', {})
    rows = [(key, str(config[key])) for key in CONFIG_KEYS if key in config]
    rows += [(f'agent.{name}', str(value)) for name, value in config.get('agent', {}).items() if name != 'agent_name']
    rows += [(key, str(environment[key])) for key in ('git_commit', 'device_kind', 'python') if key in environment]
    rows += [(f'version of {name}', version) for name, version in environment.get('packages', {}).items()]
    report.table(('setting', 'value'), rows)


def main(argv):
    look = open_run(argv[1], FLAGS.seed, FLAGS.dataset_dir, FLAGS.num_states)
    print(f'wrote {inspect_run(look)}')


if __name__ == '__main__':
    flags.DEFINE_integer('seed', None, "Which of the run's seeds (default: the first).")
    flags.DEFINE_string('dataset_dir', None, 'Folder of the data files (default: where the run had them).')
    flags.DEFINE_integer('num_states', 3, 'Held-out states whose futures are shown.', lower_bound=1)
    cli.run(main, positional=('run directory',))
