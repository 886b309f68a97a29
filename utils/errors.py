"""The exceptions that an entry point turns into one line and an exit code; everything else is a bug and shows its
traceback. Beside them, what reading a user's paths and files may raise, and how that becomes a line."""

import os
import zipfile
import zlib
from pathlib import Path

# What reading a damaged npz file, or one of another format, raises.
UNREADABLE_NPZ = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def last_line(output: str) -> str | None:
    """The last line of a program's output that has something in it; a progress bar's line ends at its last state."""
    lines = (line.strip() for line in reversed(output.splitlines()))  # '\r' ends a line, too.
    return next(filter(None, lines), None)


def expanded(path: str | os.PathLike) -> Path:
    """`path` with ~ and ~user expanded. Raises `UserError` if there is no such home folder."""
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError as error:  # What pathlib raises.
        raise UserError(
            f'{path}: the home folder {path.parts[0]} is not known; expected the name of a user of this machine after '
            '~, or a path without it'
        ) from error


class UserError(Exception):
    """Bad input: the message says what is wrong, what was expected, and what to do. Exit code 2."""


class TrainingDiverged(Exception):
    """A loss became NaN or infinite; the message names the step, the metric and the last good checkpoint. Exit code
    1."""


class ProcessLost(Exception):
    """Another process of a distributed run is gone; the message names the last checkpoint. Exit code 1."""
