"""Turns ExORL's episode files into one compact file a set: reward-free sets for a domain, labelled sets for its tasks.

    python -m envs.convert_exorl --domain=cheetah --task=run,walk

reads `<exorl_dir>/<domain>/<algo>/buffer/` (see `download_exorl.py` and `collect_exorl.py`) and writes to
`<dataset_dir>/` `exorl-cheetah.npz` and `-val.npz` (reward-free) and `exorl-cheetah_run-ft.npz` and `-val.npz` for each
task. The four sets share no episode. Labels are computed anew: each stored state is put into the task's simulator. Only
one episode at a time is in memory, plus one number for each label.
"""

import contextlib
import datetime
import importlib.metadata
import json
import zipfile
from pathlib import Path

import numpy as np
from absl import flags

from envs import (
    EXORL_PHYSICS_SIZES,
    EXORL_SIZES,
    EXORL_TASKS,
    commands,
    data,
    episode_parts,
    exorl_episodes,
    suggest,
    task_spec,
    worker_pool,
)
from utils import cli
from utils.errors import UserError, expanded
from utils.progress import progress_bar

# The sets in the order in which they take episodes, and how many transitions of each the published protocol has.
SETS = (('pretraining', 'train'), ('finetuning', 'train'), ('finetuning', 'val'), ('pretraining', 'val'))
DEFAULT_SIZES = (5_000_000, 500_000, 50_000, 50_000)
SIZE_FLAGS = ('pretraining_size', 'finetuning_size', 'finetuning_val_size', 'pretraining_val_size')
VERSIONED_PACKAGES = ('mujoco', 'dm_control', 'numpy')
FORMAT_VERSION = 1

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; called only when this file is the command."""
    flags.DEFINE_string('domain', 'cheetah', f'Domain: {", ".join(EXORL_TASKS)}.')
    flags.DEFINE_list('task', None, "Tasks to label for, separated by commas, as in run,walk (all of the domain's).")
    flags.DEFINE_string('algo', 'rnd', 'Which of the domain’s buffers to take episodes from.')
    flags.DEFINE_string('exorl_dir', exorl_episodes.DEFAULT_EXORL_DIR, 'Folder of the episode files.')
    flags.DEFINE_string('dataset_dir', data.DEFAULT_DATASET_DIR, 'Folder of the compact files.')
    for (phase, split), name, size in zip(SETS, SIZE_FLAGS, DEFAULT_SIZES, strict=True):
        flags.DEFINE_integer(name, size, f'Transitions of the {phase} {split} set, at most.', lower_bound=1)
    flags.DEFINE_integer('workers', None, 'Processes that label (all cores).', lower_bound=1)
    flags.DEFINE_bool('overwrite', False, 'Replace files that were made from other episodes.')


def convert(
    domain: str,
    tasks: list[str] | None,
    algo: str,
    exorl_dir: str,
    dataset_dir: str,
    sizes: tuple[int, int, int, int] = DEFAULT_SIZES,
    workers: int = 1,
    overwrite: bool = False,
) -> list[Path]:
    """Makes the files of one domain; those that are already there, made from the same episodes, are left alone.

    Args:
        domain: a key of `envs.EXORL_TASKS`.
        tasks: names of tasks, with the domain in front or without; None takes all.
        algo: folder of the episodes within the domain's.
        exorl_dir: folder of the domains' folders; ~ is expanded.
        dataset_dir: where to write; made if need be, ~ is expanded.
        sizes: transitions of each of `SETS`, cut down to whole episodes.
        workers: number of processes.
        overwrite: whether to replace files made from other episodes.

    Returns:
        The paths of all files of these sets.

    Raises:
        UserError: unknown names, no or too few episodes, a bad episode file, something else in the way, or another
            process converting the same domain.
        OSError: the file system refuses.
    """
    exorl_episodes.require_domain(domain)
    tasks = _full_names(domain, tasks)
    buffer = exorl_episodes.buffer_path(exorl_dir, domain, algo)
    episodes = exorl_episodes.list_episodes(buffer)
    get = f'--domain={domain} --exorl_dir={expanded(exorl_dir)}'
    if not episodes:
        raise UserError(
            f'{buffer} holds no episodes: get some with python -m envs.download_exorl {get} --algo={algo}, or '
            f'python -m envs.collect_exorl {get} --policy={algo if algo in ("ou", "random") else "rnd"}'
        )
    steps = exorl_episodes.common_steps(episodes)
    ranges = _split(episodes, steps, sizes, get)

    source = exorl_episodes.read_metadata(buffer) or {'source': f'episode files in {buffer}'}
    versions = {package: importlib.metadata.version(package) for package in VERSIONED_PACKAGES}
    wanted, paths = {}, []
    for (phase, split), chosen in ranges.items():
        for task in [None] if phase == 'pretraining' else tasks:
            path = data.exorl_dataset_path(dataset_dir, domain, task and task.removeprefix(f'{domain}_'), phase, split)
            settings = {
                'format': FORMAT_VERSION,
                'made_by': 'python -m envs.convert_exorl',
                'domain': domain,
                'task': task,
                'algo': algo,
                'source': source,
                'first_episode': chosen[0].name,
                'last_episode': chosen[-1].name,
                'episodes': len(chosen),
            }
            paths.append(path)
            if not commands.is_finished(path, settings, overwrite):
                wanted[path] = (task, chosen, split == 'val', settings)
    if not wanted:
        return paths

    folder = paths[0].parent
    episode_parts.make_folder(folder)
    refusal = f'another process is converting episodes of {domain} into {folder}; wait for it, or stop it'
    with episode_parts.held(folder / f'.exorl-{domain}.lock', refusal):
        for leftover in folder.glob(f'.exorl-{domain}*.tmp'):  # Of a killed process.
            leftover.unlink()
        # Another process may have been at the end of it.
        wanted = {path: job for path, job in wanted.items() if not commands.is_finished(path, job[-1], overwrite)}
        labels = _label(domain, wanted.values(), workers)
        for path, (task, chosen, with_physics, settings) in wanted.items():
            _write_set(path, domain, chosen, labels.get(task), with_physics, settings | {'versions': versions})
            commands.say(f'wrote {path} ({len(chosen)} episodes, {path.stat().st_size / 1e6:.1f} MB)')
    return paths


def _full_names(domain: str, tasks: list[str] | None) -> list[str]:
    names = list(EXORL_TASKS[domain])
    if tasks is None:
        tasks = names
    tasks = [task.removeprefix(f'{domain}_') for task in tasks]
    for task in tasks:
        if task not in names:
            hint = suggest(task, names) or f'; expected some of {", ".join(names)}'
            raise UserError(f'--task={task}: {domain} has no such task{hint}')
    return [f'{domain}_{task}' for task in dict.fromkeys(tasks)]


def _split(episodes: list[Path], steps: int, sizes: tuple[int, ...], get: str) -> dict:
    """The episodes of each set, one set after the other in the order of the files."""
    counts = [size // steps for size in sizes]
    for flag, size, count in zip(SIZE_FLAGS, sizes, counts, strict=True):
        if not count:
            raise UserError(f'--{flag}={size}: these episodes have {steps} transitions each; ask for at least one')
    if sum(counts) > len(episodes):
        wishes = ' '.join(f'--{flag}={size}' for flag, size in zip(SIZE_FLAGS, sizes, strict=True))
        left = len(episodes) - sum(counts[1:])  # For the first set, by far the largest.
        less = f' (--{SIZE_FLAGS[0]}={left * steps})' if left > 0 else ''
        raise UserError(
            f'{episodes[0].parent} holds {len(episodes)} episodes of {steps} transitions, and {wishes} need '
            f'{sum(counts)}: ask for less{less}, or {_get_more(episodes[0].parent, get, sum(counts) * steps)}'
        )
    ends = np.cumsum(counts)
    return {name: episodes[end - count : end] for name, count, end in zip(SETS, counts, ends, strict=True)}


def _get_more(buffer: Path, get: str, transitions: int) -> str:
    """How there can be that many transitions, which depends on where the episodes came from."""
    origin = exorl_episodes.read_metadata(buffer) or {}
    collect = f'{exorl_episodes.COLLECTED_BY} {get}'
    if origin.get('made_by') == exorl_episodes.COLLECTED_BY:
        names = [name for name in ('policy', 'seed', 'num_envs', 'episode_length') if name in origin]
        same = ' '.join(f'--{name}={origin[name]}' for name in names)
        return f'get more with {collect} {same} --num_transitions={transitions}'
    if origin.get('made_by') == exorl_episodes.DOWNLOADED_BY:
        fetch = f'{exorl_episodes.DOWNLOADED_BY} {get} --algo={buffer.parent.name} --overwrite'
        return f'fetch them all anew with {fetch} if some were deleted'
    return f'make others in another --exorl_dir with {collect} --num_transitions={transitions}'


def make_labeller(domain: str):
    """In a worker: a function that labels one episode's rows; its job is (path of the episode, names of tasks)."""
    from envs import exorl_env

    made = {}

    def label(job) -> dict[str, np.ndarray]:
        path, tasks = job
        physics = exorl_episodes.read_episode(path, domain, ('physics',))['physics']
        labels = {}
        for task in tasks:
            if task not in made:
                made[task] = exorl_env.make_task_env(task_spec(task), seed=0, render_mode=None)
            # A row's reward is that of the state its action leads to; the final row's action leads nowhere.
            labels[task] = np.append(exorl_env.label_physics(made[task], physics[1:]), np.float32(0.0))
        return labels

    return label


def _label(domain: str, wanted, workers: int) -> dict[str, dict[Path, np.ndarray]]:
    """The rewards (T + 1,) of the rows of all episodes that labelled files need, by task and episode."""
    needed: dict[Path, list[str]] = {}
    for task, chosen, *_ in wanted:
        if task is not None:
            for path in chosen:
                needed.setdefault(path, []).append(task)
    labels: dict[str, dict[Path, np.ndarray]] = {}
    finished = worker_pool.run_jobs(make_labeller, (domain,), list(needed.items()), workers)
    total = sum(exorl_episodes.named_steps(path) * len(tasks) for path, tasks in needed.items())
    bar = progress_bar(f'{domain} labels', total, 'states', disable=not total)
    # Closing stops the workers at once, whatever ends the loop.
    with contextlib.closing(finished), bar:
        for (path, tasks), rewards in finished:
            for task in tasks:
                labels.setdefault(task, {})[path] = rewards[task]
            bar.update(exorl_episodes.named_steps(path) * len(tasks))
    return labels


def _write_set(
    target: Path, domain: str, episodes: list[Path], labels: dict | None, with_physics: bool, metadata: dict
) -> None:
    """Writes one set, wholly or not at all; episodes are read one by one."""
    rows = exorl_episodes.named_steps(episodes[0]) + 1
    total = rows * len(episodes)
    observation_size, action_size = EXORL_SIZES[domain]
    bar = progress_bar(target.name, (3 if with_physics else 2) * len(episodes), 'reads')

    def each(name):
        for path in episodes:
            yield exorl_episodes.read_episode(path, domain, (name,))[name]
            bar.update()

    def at_the_row_they_are_taken_in(actions):  # ExORL has them in the row that they lead to.
        return np.concatenate([actions[1:], np.zeros_like(actions[:1])])

    terminals = np.arange(rows) == rows - 1
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    with (
        episode_parts.atomic_path(target) as temporary,
        bar,
        zipfile.ZipFile(temporary, 'w', zipfile.ZIP_STORED) as archive,
    ):
        episode_parts.write_array(archive, 'observations', (total, observation_size), np.float32, each('observation'))
        actions = map(at_the_row_they_are_taken_in, each('action'))
        episode_parts.write_array(archive, 'actions', (total, action_size), np.float32, actions)
        episode_parts.write_array(archive, 'terminals', (total,), bool, (terminals for _ in episodes))
        if with_physics:  # For pictures of held-out states (`state_views.py`); training sets would double in size.
            shape = (total, EXORL_PHYSICS_SIZES[domain])
            episode_parts.write_array(archive, 'physics', shape, np.float64, each('physics'))
        if labels is not None:
            rewards = (labels[path] for path in episodes)
            episode_parts.write_array(archive, 'rewards', (total,), np.float32, rewards)
        episode_parts.write_text(archive, episode_parts.METADATA_KEY, json.dumps(metadata, sort_keys=True))
        episode_parts.write_text(archive, 'created', created)


def main(argv):
    del argv
    return commands.run_interruptibly(
        lambda: convert(
            domain=FLAGS.domain,
            tasks=FLAGS.task,
            algo=FLAGS.algo,
            exorl_dir=FLAGS.exorl_dir,
            dataset_dir=FLAGS.dataset_dir,
            sizes=tuple(FLAGS[name].value for name in SIZE_FLAGS),
            workers=FLAGS.workers or worker_pool.available_cores(),
            overwrite=FLAGS.overwrite,
        ),
        'files that were finished are kept, and the same command makes the others',
    )


if __name__ == '__main__':
    define_flags()
    cli.run(main)
