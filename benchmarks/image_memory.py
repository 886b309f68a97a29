"""Memory that a data set of images takes, from its file to the device, while an agent trains on it.

    python -m benchmarks.image_memory --frames=100000 [--dataset_location=host] [--agent=infom]

Pre-trains for a few updates, as `pretrain.py` does, on files of random images: a small one, and one of `--frames`. Each
run is a process of its own, whose peak memory is that of its whole life; the difference between the two, per frame, is
what a frame takes. 12,288 bytes are its pixels. Prints a table, then, as the last line, one JSON object. No simulator
is needed.
"""

import json
import multiprocessing
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from absl import flags

import envs
from envs import data, episode_parts
from utils import cli
from utils.errors import UserError

TASK = 'visual-cube-single-play-singletask-task1-v0'
FRAME_BYTES = int(np.prod(envs.IMAGE_SHAPE))
EPISODE_ROWS = 1001
SMALL_FRAMES = 2 * EPISODE_ROWS
UPDATES = 4


def define_flags() -> None:
    """Defines the command's flags; called only when this file is the command: its runs have flags of their own."""
    flags.DEFINE_integer('frames', 100_000, 'images of the large data set', lower_bound=2 * SMALL_FRAMES)
    flags.DEFINE_string('agent', 'infom', 'agent that trains on them, at the size of the smoke preset')
    flags.DEFINE_enum('dataset_location', 'auto', ['auto', 'device', 'host'], 'as in main.py')


def write_images(path: Path, frames: int) -> None:
    """A reward-free data file of random images, in episodes of the usual length; one episode is in memory at a time."""
    task = envs.task_spec(TASK)
    rng = np.random.default_rng(0)
    starts = range(0, frames, EPISODE_ROWS)
    lengths = [min(EPISODE_ROWS, frames - start) for start in starts]
    images = (rng.integers(0, 256, (length, *task.observation_shape), np.uint8) for length in lengths)
    terminals = np.isin(np.arange(frames), np.cumsum(lengths) - 1)
    with zipfile.ZipFile(path, 'w') as archive:
        shape = (frames, *task.observation_shape)
        episode_parts.write_array(archive, 'observations', shape, np.uint8, images)
        actions = rng.uniform(-0.9, 0.9, (frames, task.action_size))
        episode_parts.write_array(archive, 'actions', actions.shape, np.float32, [actions])
        episode_parts.write_array(archive, 'terminals', terminals.shape, bool, [terminals])


def measure(frames: int, agent: str, dataset_location: str) -> dict:
    """Peak memory of a pre-training run on `frames` images: `host_bytes`, and `device_bytes` (None on a CPU).

    Raises UserError if the run fails; its own message is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        for split, number in (('train', frames), ('val', 4)):
            write_images(data.dataset_path(folder, envs.task_spec(TASK).domain, 'pretraining', split), number)
        arguments = [
            'pretrain.py',
            f'--env_name={TASK}',
            f'--agent={agent}',
            '--preset=smoke',
            f'--pretraining_steps={UPDATES}',
            f'--log_interval={UPDATES}',
            f'--pretraining_size={frames}',
            f'--dataset_location={dataset_location}',
            f'--dataset_dir={folder}',
            f'--save_dir={folder}',
            '--nocompilation_cache',
        ]
        context = multiprocessing.get_context('spawn')
        ours, theirs = context.Pipe()
        process = context.Process(target=_pretrain, args=(theirs, arguments))
        process.start()
        theirs.close()
        try:
            return ours.recv()
        except EOFError:
            raise UserError(f'the run on {frames} images failed') from None
        finally:
            process.join()


def _pretrain(pipe, arguments: list[str]) -> None:
    """The life of the process that is measured: `pretrain.py` with its own command line."""
    import jax

    from main import make_experiment
    from utils.flags import define_flags

    define_flags(argv=arguments)
    flags.FLAGS(arguments)
    with make_experiment(('pretraining',)) as experiment:
        experiment.pretrain()
    status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    statistics = jax.local_devices()[0].memory_stats() or {}  # None on a CPU.
    pipe.send(
        {'host_bytes': int(status['VmHWM'].split()[0]) * 1024, 'device_bytes': statistics.get('peak_bytes_in_use')}
    )


def per_frame(small: dict, large: dict, more_frames: int) -> dict:
    """Bytes a frame of each memory, from runs that differ by `more_frames` images."""
    names = [name for name, value in large.items() if value is not None]
    return {name: (large[name] - small[name]) / more_frames for name in names}


def main(_):
    values = flags.FLAGS
    small, large = (measure(n, values.agent, values.dataset_location) for n in (SMALL_FRAMES, values.frames))
    each = per_frame(small, large, values.frames - SMALL_FRAMES)
    print(f'{"memory":<14}{"peak, MB":>12}{"bytes/frame":>14}{"of its pixels":>15}')
    for name, value in each.items():
        print(f'{name.removesuffix("_bytes"):<14}{large[name] / 1e6:12.1f}{value:14.1f}{value / FRAME_BYTES:15.3f}')
    report = {'frames': values.frames, 'agent': values.agent, 'dataset_location': values.dataset_location, **large}
    print(json.dumps(report | {f'{name}_per_frame': round(value, 1) for name, value in each.items()}))


if __name__ == '__main__':
    define_flags()
    cli.run(main)
