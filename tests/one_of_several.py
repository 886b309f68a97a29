"""One process of the runs of `test_processes.py`: python -m tests.one_of_several <save_dir> [flags].

The run of `test_experiment.py`, on synthetic data and without a simulator.
"""

import sys

from tests.test_experiment import make_config, run
from utils import cli


def main(arguments):
    run(make_config(*arguments), calls=[])


if __name__ == '__main__':
    sys.argv, own = sys.argv[:1], sys.argv[1:]
    cli.run(lambda _: main(own))
