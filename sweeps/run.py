"""What wandb's agents start: main.py with the flags that the sweep chose, in a run directory named after them.

    python -m sweeps.run --env_name=… --agent.alpha=30 …

becomes main.py with `--run_name` added: the name under which the launcher would run it, so that the two never collide
and each finds what the other has done.
"""

import os
import re
import sys

from sweeps.sweep_files import parse_flags, run_name
from utils import cli
from utils.errors import UserError


def command(arguments: list[str]) -> list[str]:
    """The command line of main.py for flags `--name=value`, `--name` and `--noname`.

    Raises:
        UserError: one of them is no flag, or a seed no whole number.
    """
    flags = parse_flags([_with_value(argument) for argument in arguments])
    name = [] if 'run_name' in flags else [f'--run_name={run_name(flags)}']
    return [sys.executable, 'main.py', *arguments, *name]


def _with_value(argument: str) -> str:
    """`--name` and `--noname` as `--name=True` and `--name=False`; what else there is as it is."""
    if '=' in argument or not re.fullmatch(r'--?[a-z].*', argument):
        return argument
    name = argument.lstrip('-')
    return f'{name.removeprefix("no")}={not name.startswith("no")}'  # No flag's own name begins with 'no'.


if __name__ == '__main__':
    try:
        line = command(sys.argv[1:])
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(cli.USER_ERROR_CODE)
    os.execv(line[0], line)
