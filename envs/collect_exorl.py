"""Collects exploratory episodes in ExORL's domains, in its format: by random actions, by noise that wanders, or by RND.

    python -m envs.collect_exorl --domain=cheetah --policy=rnd --num_transitions=5600000

writes `<exorl_dir>/<domain>/<policy>/buffer/episode_<index>_<T>.npz` as it goes. An interrupted command continues where
it stopped when it is given again, and one that asks for more adds to what is there. `random` and `ou` make each episode
from (seed, policy, its index) alone, whatever the number of workers; `rnd` learns as it goes, from `--num_envs`
episodes side by side (`collect_rnd.py`). `convert_exorl.py` makes data sets of the episodes.
"""

import contextlib
import importlib.metadata
import shutil
import time
from pathlib import Path

import numpy as np
from absl import flags

from envs import (
    EXORL_EPISODE_LENGTHS,
    EXORL_TASKS,
    commands,
    coverage,
    episode_parts,
    exorl_episodes,
    worker_pool,
)
from utils import cli
from utils.errors import UserError
from utils.progress import progress_bar

POLICIES = ('random', 'ou', 'rnd')
VERSIONED_PACKAGES = ('mujoco', 'dm_control', 'numpy')

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; called only when this file is the command."""
    flags.DEFINE_string('domain', 'cheetah', f'Domain: {", ".join(EXORL_TASKS)}.')
    flags.DEFINE_enum('policy', 'rnd', POLICIES, 'How to explore.')
    flags.DEFINE_integer('num_transitions', 5_600_000, 'Transitions, at least; whole episodes are made.', lower_bound=1)
    flags.DEFINE_integer('seed', 0, 'Seed; the same seed makes the same episodes.', lower_bound=0)
    flags.DEFINE_integer('workers', None, 'Processes that simulate (all cores).', lower_bound=1)
    flags.DEFINE_integer('num_envs', 8, 'Episodes side by side; for --policy=rnd, which they change.', lower_bound=1)
    flags.DEFINE_string('exorl_dir', exorl_episodes.DEFAULT_EXORL_DIR, 'Folder of the episode files.')
    flags.DEFINE_bool(
        'overwrite', False, 'Throw away episodes of other settings, downloaded ones, and those rnd cannot go on from.'
    )
    flags.DEFINE_integer(
        'episode_length', None, "Steps an episode (the domain's time limit); tests use fewer.", lower_bound=2
    )


def collect(
    domain: str,
    policy: str,
    num_transitions: int,
    seed: int,
    workers: int,
    exorl_dir: str,
    num_envs: int = 8,
    episode_length: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Makes episodes until there are enough; those that are already there, made with the same settings, are kept.

    Args:
        domain: a key of `envs.EXORL_TASKS`.
        policy: one of `POLICIES`.
        num_transitions: how many there should be at the end, at least.
        seed: non-negative.
        workers: number of processes that simulate.
        exorl_dir: folder of the domains' folders, made if need be; ~ is expanded.
        num_envs: number of episodes side by side, of rnd.
        episode_length: steps of each episode; None takes the domain's.
        overwrite: whether to throw away episodes that were made with other settings, or that rnd cannot go on from.

    Returns:
        The folder of the episodes.

    Raises:
        UserError: unknown domain; episodes of other settings are in the way, or such as rnd cannot go on from; another
            process writes there.
        OSError: the file system refuses.
    """
    exorl_episodes.require_domain(domain)
    length = episode_length or EXORL_EPISODE_LENGTHS[domain]
    settings = {
        'source': f'collected with --policy={policy}',
        'made_by': exorl_episodes.COLLECTED_BY,
        'domain': domain,
        'policy': policy,
        'seed': seed,
        'episode_length': length,
    }
    if policy == 'rnd':
        settings['num_envs'] = num_envs
    buffer = exorl_episodes.buffer_path(exorl_dir, domain, policy)
    episode_parts.make_folder(buffer)
    with episode_parts.hold(*exorl_episodes.lock(buffer)):
        _claim(buffer, settings, overwrite)
        for folder in (buffer, buffer.parent):
            for leftover in folder.glob('*.tmp'):  # Of a killed process.
                leftover.unlink()
        progress = Progress(domain, policy, length, num_transitions)
        with progress:
            if policy == 'rnd':
                from envs import collect_rnd  # Brings JAX in, which only this policy needs.

                collect_rnd.collect(buffer, settings, num_transitions, min(workers, num_envs), progress, overwrite)
            else:
                _collect_independent(buffer, settings, num_transitions, workers, progress)
        commands.say(progress.summary())
    return buffer


def _claim(buffer: Path, settings: dict, overwrite: bool) -> None:
    """Makes sure that the folder's episodes were made with these settings, or that there are none."""
    found = exorl_episodes.read_metadata(buffer)
    # Other versions of the packages may differ in the last bits: no reason to throw episodes away.
    if found is not None and {name: found.get(name) for name in settings} == settings:
        return
    episodes = exorl_episodes.list_episodes(buffer)
    if episodes and not overwrite:
        known = found if found and found.get('made_by') == settings['made_by'] else {}
        details = ', '.join(
            f'{name} {known.get(name)} instead of {value}'
            for name, value in settings.items()
            if known.get(name) != value
        )
        origin = f'made with other settings ({details})' if known else 'not made by this command'
        raise UserError(
            f'{buffer} holds episodes {origin}; --overwrite throws them away, another --exorl_dir leaves them alone'
        )
    # First the learner: without episodes, it would be taken for one that has lost them.
    for name in (exorl_episodes.EXPLORER_NAME, exorl_episodes.HISTORY_NAME):
        (buffer.parent / name).unlink(missing_ok=True)
    if episodes:
        shutil.rmtree(buffer)
        buffer.mkdir()
    versions = {package: importlib.metadata.version(package) for package in VERSIONED_PACKAGES}
    exorl_episodes.write_metadata(buffer, settings | {'versions': versions})


class Progress:
    """The bar, and what has been visited; use as a context manager."""

    def __init__(self, domain: str, policy: str, episode_length: int, num_transitions: int):
        self._domain, self._policy, self._length = domain, policy, episode_length
        self._total = -(-num_transitions // episode_length) * episode_length
        self._cells: set[int] = set()
        self.found = self.made = 0

    def __enter__(self):
        self._bar = progress_bar(f'{self._domain} {self._policy}', self._total, 'transitions')
        self._began = time.monotonic()
        return self

    def __exit__(self, *_):
        self._bar.close()

    def found_episodes(self, paths) -> None:
        """Counts episodes that an earlier command made, without hurry: one is in memory at a time."""
        for path in paths:
            self._cells.update(visited_cells(path, self._domain).tolist())
            self.found += self._length
            self._bar.update(self._length)
        self._bar.initial = self._bar.n  # The rate is that of this command.
        self._bar.unpause()
        self._began = time.monotonic()

    def finished_episode(self, cells: np.ndarray, **shown) -> None:
        """Counts an episode that visited these cells; `shown` is put beside the bar."""
        self._cells.update(cells.tolist())
        self.made += self._length
        self._bar.set_postfix(coverage=f'{self.coverage:.2%}', **shown, refresh=False)
        self._bar.update(self._length)

    @property
    def coverage(self) -> float:
        """Visited cells over all cells of the grid."""
        return len(self._cells) / coverage.grid_size(self._domain)

    def summary(self) -> str:
        """What happened, in one line."""
        seconds = time.monotonic() - self._began
        rate = f'{self.made} transitions in {seconds:.1f} s, {self.made / max(seconds, 1e-9):.0f} a second; '
        earlier = f'{self.found} were already there; ' if self.found else ''
        cells = f'{len(self._cells)} of {coverage.grid_size(self._domain)} cells visited ({self.coverage:.2%})'
        return rate + earlier + cells


def visited_cells(path: Path, domain: str) -> np.ndarray:
    """The cells of the coverage grid that an episode's file visits. Raises UserError where it cannot be read."""
    episode = exorl_episodes.read_episode(path, domain, ('observation', 'physics'))
    return coverage.visited_cells(domain, episode['observation'], episode['physics'])


def make_explorer(domain: str, policy: str, episode_length: int, buffer: str):
    """In a worker: `exploration.make_explorer`, and with it the simulator, which the parent has no use for."""
    from envs import exploration

    return exploration.make_explorer(domain, policy, episode_length, buffer)


def _collect_independent(buffer: Path, settings: dict, num_transitions: int, workers: int, progress: Progress) -> None:
    """The episodes of a policy that learns nothing, in any order."""
    length, policy = settings['episode_length'], settings['policy']
    jobs, found = [], []
    for index in range(-(-num_transitions // length)):
        path = buffer / exorl_episodes.episode_name(index, length)
        if episode_parts.is_readable(path):
            found.append(path)
        else:
            jobs.append((index, (settings['seed'], POLICIES.index(policy), index)))
    if found:
        commands.say(f'continuing: {len(found)} of {len(found) + len(jobs)} episodes are already there')
    progress.found_episodes(found)
    arguments = (settings['domain'], policy, length, str(buffer))
    # Closing stops the workers at once, whatever ends the loop.
    with contextlib.closing(worker_pool.run_jobs(make_explorer, arguments, jobs, workers)) as finished:
        for _, cells in finished:
            progress.finished_episode(cells)


def main(argv):
    del argv
    return commands.run_interruptibly(
        lambda: collect(
            domain=FLAGS.domain,
            policy=FLAGS.policy,
            num_transitions=FLAGS.num_transitions,
            seed=FLAGS.seed,
            workers=FLAGS.workers or worker_pool.available_cores(),
            exorl_dir=FLAGS.exorl_dir,
            num_envs=FLAGS.num_envs,
            episode_length=FLAGS.episode_length,
            overwrite=FLAGS.overwrite,
        ),
        'the finished episodes are kept, and the same command continues with them',
    )


if __name__ == '__main__':
    define_flags()
    cli.run(main)
