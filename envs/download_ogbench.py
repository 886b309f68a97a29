"""Downloads OGBench's published play data: reward-free files to pre-train on, for the state and the image environments.

    python -m envs.download_ogbench --env_name=cube-single-v0

An interrupted download continues where it stopped when the command is given again (`resumable_download.py`).
Fine-tuning data are on no server: `collect_ogbench.py` makes them, and can make these too.
"""

import zipfile
from pathlib import Path

from absl import flags

from envs import OGBENCH_DOMAINS, data, episode_parts, resumable_download, suggest
from utils import cli
from utils.errors import UserError

DOWNLOADABLE = tuple(f'{domain}-v0' for domain in OGBENCH_DOMAINS)

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; called only when this file is the command."""
    flags.DEFINE_string('env_name', 'cube-single-v0', f'Environment: {", ".join(DOWNLOADABLE)}.')
    flags.DEFINE_string('dataset_dir', data.DEFAULT_DATASET_DIR, 'Folder of the files.')
    flags.DEFINE_string(
        'base_url', None, "Where the files are, without their names; by default where OGBench's own loader looks."
    )
    flags.DEFINE_bool('overwrite', False, 'Replace files that were collected here, or are damaged.')


def download(
    env_name: str, dataset_dir: str, base_url: str | None = None, overwrite: bool = False, pause: float = 1.0
) -> list[Path]:
    """Downloads the train and val file of one environment, unless they are there.

    Args:
        env_name: one of `DOWNLOADABLE`.
        dataset_dir: folder, made if need be; ~ is expanded.
        base_url: URL of the folder on the server; None means the one that the `ogbench` package names.
        overwrite: whether to replace files that were collected here, or are damaged.
        pause: seconds before the first retry; each further one waits twice as long.

    Returns:
        The two paths.

    Raises:
        UserError: unknown environment, server out of reach, no such file there, something else in the way, another
            process fetching the same file, or no room on the disk.
        OSError: the file system refuses.
    """
    if env_name not in DOWNLOADABLE:
        hint = suggest(env_name, DOWNLOADABLE) or f'; expected one of {", ".join(DOWNLOADABLE)}'
        raise UserError(f'--env_name={env_name}: no published data{hint}')
    if base_url is None:
        from ogbench.utils import DATASET_URL as base_url
    resumable_download.check_base_url(base_url)
    domain = env_name.removesuffix('-v0')
    paths = [data.dataset_path(dataset_dir, domain, 'pretraining', split) for split in data.SPLITS]
    for path in paths:
        if _is_there(path, overwrite):
            continue
        episode_parts.make_folder(path.parent)
        refusal = f'another process is downloading {path}; wait for it, or stop it'
        with episode_parts.held(path.with_name(f'.{path.name}.lock'), refusal):
            if not _is_there(path, overwrite):  # Another process may have been at the end of it.
                url = f'{base_url.rstrip("/")}/{path.name}'
                command = (
                    f'python -m envs.collect_ogbench --split=pretrain --env_name={env_name} --dataset_dir={path.parent}'
                )
                resumable_download.fetch_or_advise(url, path, pause, 'npz file', command)
                print(f'wrote {path} ({path.stat().st_size / 1e6:.1f} MB)', flush=True)
    return paths


def _is_there(path: Path, overwrite: bool) -> bool:
    """Whether the file was downloaded before. Raises UserError if something else has its name."""
    if not path.exists() or overwrite:
        return False
    if not zipfile.is_zipfile(path):
        raise UserError(f'{path} is there but damaged; --overwrite downloads it anew')
    if episode_parts.read_metadata(path) is not None:
        raise UserError(f'{path} was collected here; --overwrite replaces it, another --dataset_dir keeps both')
    print(f'{path} is already there', flush=True)
    return True


def main(argv):
    del argv
    download(FLAGS.env_name, FLAGS.dataset_dir, FLAGS.base_url, FLAGS.overwrite)


if __name__ == '__main__':
    define_flags()
    cli.run(main)
