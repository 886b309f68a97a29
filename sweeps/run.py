"""What wandb's agents start: main.py with the flags that the sweep chose, in a run directory named after them.

    python -m sweeps.run --env_name=… --agent.alpha=30 …

becomes main.py with `--run_name` added: the name under which the launcher would run it, so that the two never collide
and each finds what the other has done.
"""

import os
import sys

from sweeps.sweep_files import parse_flags, run_name


def command(arguments: list[str]) -> list[str]:
    """The command line of main.py for flags `--name=value`."""
    flags = parse_flags(arguments)
    name = [] if 'run_name' in flags else [f'--run_name={run_name(flags)}']
    return [sys.executable, 'main.py', *arguments, *name]


if __name__ == '__main__':
    line = command(sys.argv[1:])
    os.execv(line[0], line)
