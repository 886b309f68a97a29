"""What the commands that make data files share: ending on a signal, progress bars, and files that are there already.

What is made, and how, is the business of each command.
"""

import signal
import sys
from pathlib import Path

from envs import episode_parts
from utils.errors import UserError


class Interrupted(BaseException):
    """A signal asked the command to stop."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def _interrupt(number, frame):
    raise Interrupted(number)


def run_interruptibly(command, advice: str) -> int | None:
    """Runs `command()`; SIGINT and SIGTERM end it, cleaning up on the way, with a line on stderr and a shell's code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        command()
    except Interrupted as interruption:
        print(f'stopped; {advice}', file=sys.stderr, flush=True)
        return 128 + interruption.number
    return None


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def is_finished(path: Path, settings: dict, overwrite: bool) -> bool:
    """Whether the npz file is there with these settings. Raises UserError if one with others is in the way."""
    if not path.exists():
        return False
    metadata = episode_parts.read_metadata(path) or {}
    if {name: metadata.get(name) for name in settings} == settings:
        say(f'{path} is already there, made with these settings')
        return True
    if overwrite:
        return False
    if metadata:
        differing = [name for name, value in settings.items() if metadata.get(name) != value]
        details = ', '.join(f'{name} {metadata.get(name)} instead of {settings[name]}' for name in differing)
        origin = f'was made with other settings ({details})'
    else:
        origin = 'was not made by this command (downloaded, perhaps, or damaged)'
    raise UserError(f'{path} {origin}; --overwrite replaces it, another --dataset_dir leaves it alone')
