"""How a command starts: parse absl flags, run `main`, turn a user's mistake into one line on stderr and exit code 2.

Anything that is not the user's mistake keeps its traceback: it is a bug. Flags themselves are defined by the commands.
"""

import errno
import sys

from absl import app, flags

from utils.errors import ProcessLost, TrainingDiverged, UserError

USER_ERROR_CODE = 2
INTERRUPTED_CODE = 130  # 128 + SIGINT, as shells report it

# What the file system may answer to a user's path or a user's disk.
FILE_SYSTEM_REFUSALS = frozenset(
    {
        errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
        errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
    }
)  # fmt: skip
# What parsing raises for a flag that is unknown or has a bad value, and for a --flagfile that cannot be read.
FLAG_ERRORS = (flags.Error, ValueError, OSError)


flags.disclaim_key_flags()  # A flag defined through this module belongs to the command that asked for it.


class _NumbersParser(flags.ArgumentParser):
    """Numbers separated by commas, as a rising list that holds each once; ValueError where that cannot be read."""

    def __init__(self, kind: type, minimum: float):
        self._kind, self._minimum = kind, minimum
        self.syntactic_help = f'numbers from {minimum} up, separated by commas'

    def parse(self, argument) -> list:
        parts = argument.split(',') if isinstance(argument, str) else argument
        try:
            values = sorted({self._kind(part) for part in parts})
        except ValueError:
            values = []
        if not values or not self._minimum <= values[0] <= values[-1] < float('inf'):
            raise ValueError(f'expected {self.syntactic_help}')
        return values

    def flag_type(self) -> str:
        return f'{self._kind.__name__} list'


def define_numbers(name: str, default: list, help_text: str, minimum: float = 0, kind: type = int) -> None:
    """Defines a flag that is a list of numbers of `kind` (int or float), none below `minimum`, as in --seeds=0,1,2."""
    flags.DEFINE(_NumbersParser(kind, minimum), name, default, help_text, serializer=flags.CsvListSerializer(','))


def run(main, positional: tuple[str, ...] = ()) -> None:
    """Runs `main(argv)` under absl and exits; `argv` holds the program's name and one argument for each name of
    `positional`.

    Exit codes: 0 when main returns None (else what it returns), 2 for a `UserError`, a bad flag or a path that cannot
    be used, 1 for diverged training, a lost process or a bug, 130 when interrupted.
    """
    flags.FLAGS.set_gnu_getopt(bool(positional))  # Flags may then stand behind them.
    app.run(lambda argv: _guarded(main, argv, positional), flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except SystemExit:
        sys.exit(0)  # --help and the like, which absl ends with 1.
    except FLAG_ERRORS as error:
        _fail(f'{error} (--help lists the flags)', USER_ERROR_CODE)


def _guarded(main, argv: list[str], positional: tuple[str, ...]):
    given = len(argv) - 1
    if given > len(positional):
        _fail(f'unexpected argument {argv[len(positional) + 1]!r}: flags are written --name=value', USER_ERROR_CODE)
    if given < len(positional):
        _fail(f'missing argument: <{positional[given]}> (--help lists the flags)', USER_ERROR_CODE)
    try:
        return main(argv)
    except UserError as error:
        _fail(error, USER_ERROR_CODE)
    except (TrainingDiverged, ProcessLost) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail('interrupted', INTERRUPTED_CODE)
    except OSError as error:
        if error.errno in FILE_SYSTEM_REFUSALS:
            _fail(f'{error.strerror}: {error.filename or "while writing"}', USER_ERROR_CODE)
        raise


def _fail(message, code: int):
    print(f'error: {" ".join(str(message).split())}', file=sys.stderr, flush=True)
    sys.exit(code)
