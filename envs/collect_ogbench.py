"""Collects OGBench play data with the simulator's own scripted policies, in the published format, under its names.

    python -m envs.collect_ogbench --env_name=cube-single-v0 --split=pretrain --workers=8

writes `<dataset_dir>/cube-single-play-v0.npz` and `-val.npz` (split pretrain, reward-free) or
`cube-single-play-ft-v0.npz` and `-val.npz` (split finetune: other episodes, made the same way). Each episode follows
from (seed, split, file, its index) alone, so the files do not depend on the number of workers. An interrupted command
continues where it stopped when it is given again. One core makes some 400 to 800 transitions a second.

`--env_name=visual-cube-single-v0` makes the very episodes of `cube-single-v0`, observed as 64×64 images (uint8, 12 KB
a row: 12 GB for 1000 episodes). Without a GPU a core renders about 10 of them a second.

The scripts themselves are in `play.py`, the files in `episode_parts.py`.
"""

import contextlib
import importlib.metadata
import time
from pathlib import Path

from absl import flags

from envs import OGBENCH_DOMAINS, commands, data, episode_parts, rendering, suggest, worker_pool
from utils import cli
from utils.errors import UserError
from utils.progress import progress_bar

SPLITS = {'pretrain': 'pretraining', 'finetune': 'finetuning'}
DEFAULT_EPISODES = {'pretrain': {'train': 1000, 'val': 100}, 'finetune': {'train': 500, 'val': 50}}
COLLECTABLE = tuple(f'{domain}-v0' for domain in OGBENCH_DOMAINS)
VERSIONED_PACKAGES = ('ogbench', 'mujoco', 'dm_control', 'numpy', 'scipy')
FORMAT_VERSION = 1

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; called only when this file is the command."""
    flags.DEFINE_string('env_name', 'cube-single-v0', f'Environment: {", ".join(COLLECTABLE)}.')
    flags.DEFINE_enum('split', 'pretrain', list(SPLITS), 'Which of the two phases the data are for.')
    flags.DEFINE_integer(
        'num_episodes', None, 'Training episodes (1000 to pre-train, 500 to fine-tune).', lower_bound=1
    )
    flags.DEFINE_integer(
        'val_episodes', None, 'Validation episodes (100 to pre-train, 50 to fine-tune).', lower_bound=1
    )
    flags.DEFINE_integer('seed', 0, 'Seed; the same seed makes the same files.', lower_bound=0)
    flags.DEFINE_integer('workers', None, 'Processes (all cores).', lower_bound=1)
    flags.DEFINE_string('dataset_dir', data.DEFAULT_DATASET_DIR, 'Folder of the files.')
    flags.DEFINE_bool('overwrite', False, 'Replace files that were made with other settings, or downloaded.')
    flags.DEFINE_integer(
        'episode_length', 1000, 'Transitions an episode; the published data have 1000, tests use fewer.', lower_bound=1
    )


def make_writer(dataset_env: str, rows: int):
    """In a worker: a function that makes one episode and writes it; its job is (folder, index, seed)."""
    from envs import play

    scripted_play = play.ScriptedPlay(dataset_env)

    def write(job):
        folder, index, seed = job
        episode_parts.write_part(Path(folder), index, scripted_play.episode(seed, rows))

    return write


def episode_seed(seed: int, split: str, file: str, index: int) -> tuple[int, ...]:
    """The integers that name an episode: no two episodes of any two files share them."""
    return (seed, list(SPLITS).index(split), ('train', 'val').index(file), index)


def collect(
    env_name: str,
    split: str,
    episodes: dict[str, int],
    seed: int,
    workers: int,
    dataset_dir: str,
    overwrite: bool = False,
    episode_length: int = 1000,
) -> list[Path]:
    """Makes the train and val file of one split; files that are already there with the same settings are left alone.

    Args:
        env_name: one of `COLLECTABLE`.
        split: 'pretrain' or 'finetune'.
        episodes: number of episodes of the 'train' and of the 'val' file.
        seed: non-negative.
        workers: number of processes.
        dataset_dir: folder, made if need be; ~ is expanded.
        overwrite: whether to replace files made with other settings.
        episode_length: transitions in each episode.

    Returns:
        The two paths.

    Raises:
        UserError: unknown environment; a file of other settings is in the way; another process makes the same file;
            nothing here renders the images asked for.
        OSError: the file system refuses.
    """
    if env_name not in COLLECTABLE:
        hint = suggest(env_name, COLLECTABLE) or f'; expected one of {", ".join(COLLECTABLE)}'
        raise UserError(f'--env_name={env_name}: no environment that data can be collected in{hint}')
    domain = env_name.removesuffix('-v0')
    versions = {package: importlib.metadata.version(package) for package in VERSIONED_PACKAGES}
    paths = {file: data.dataset_path(dataset_dir, domain, SPLITS[split], file) for file in ('train', 'val')}
    settings = {
        file: {
            'format': FORMAT_VERSION,
            'made_by': 'python -m envs.collect_ogbench',
            'env_name': env_name,
            'split': split,
            'file': file,
            'seed': seed,
            'episode_length': episode_length,
        }
        for file in paths
    }

    wanted = [
        file
        for file in paths
        if not commands.is_finished(paths[file], settings[file] | {'episodes': episodes[file]}, overwrite)
    ]
    for file in paths.keys() - set(wanted):
        episode_parts.discard_joined(paths[file])
    if wanted and domain.startswith('visual-'):
        versions['renderer'] = rendering.require_backend()  # Pixels are its own.
    parts = {file: episode_parts.EpisodeParts(paths[file], settings[file] | {'versions': versions}) for file in wanted}
    jobs, found = [], 0
    for file in wanted:
        if parts[file].started_over:
            commands.say(f'the parts in {parts[file].folder} were made with other settings: starting over')
        missing = parts[file].missing(episodes[file])
        found += episodes[file] - len(missing)
        jobs += [(str(parts[file].folder), index, episode_seed(seed, split, file, index)) for index in missing]
    if found:
        commands.say(f'continuing: {found} of {found + len(jobs)} episodes are already there')

    began = time.monotonic()
    finished = worker_pool.run_jobs(make_writer, (env_name, episode_length + 1), jobs, workers)
    # Closing stops the workers at once, whatever ends the loop.
    bar = progress_bar(
        f'{env_name} {split}',
        total=(found + len(jobs)) * episode_length,
        unit='transitions',
        initial=found * episode_length,
        disable=not jobs,
    )
    try:
        with contextlib.closing(finished), bar:
            for _ in finished:
                bar.update(episode_length)
    finally:  # The workers have ended, and one may have been stopped while it was writing.
        for file in wanted:
            parts[file].discard_unfinished()
    if jobs:
        seconds = time.monotonic() - began
        made = len(jobs) * episode_length
        commands.say(
            f'{made} transitions in {seconds:.1f} s: {made / seconds:.0f} a second, {min(workers, len(jobs))} workers'
        )
    for file in wanted:
        parts[file].join(episodes[file], settings[file] | {'episodes': episodes[file], 'versions': versions})
        commands.say(f'wrote {paths[file]} ({episodes[file]} episodes, {paths[file].stat().st_size / 1e6:.1f} MB)')
    return list(paths.values())


def main(argv):
    del argv
    chosen = {'train': FLAGS.num_episodes, 'val': FLAGS.val_episodes}
    return commands.run_interruptibly(
        lambda: collect(
            env_name=FLAGS.env_name,
            split=FLAGS.split,
            episodes={file: number or DEFAULT_EPISODES[FLAGS.split][file] for file, number in chosen.items()},
            seed=FLAGS.seed,
            workers=FLAGS.workers or worker_pool.available_cores(),
            dataset_dir=FLAGS.dataset_dir,
            overwrite=FLAGS.overwrite,
            episode_length=FLAGS.episode_length,
        ),
        'the finished episodes are kept, and the same command continues with them',
    )


if __name__ == '__main__':
    define_flags()
    cli.run(main)
