"""Reward-free pre-training only: leaves a checkpoint that `finetune.py` takes to any task of the same domain.

    python pretrain.py --env_name=cube-single-play-singletask-task1-v0 --run_name=cube-single

The same command again resumes the run from its own directory. No reward is ever read.
"""

from main import make_experiment
from utils import cli
from utils.flags import define_flags


def main(_):
    with make_experiment(phases=('pretraining',)) as experiment:
        experiment.pretrain()


if __name__ == '__main__':
    define_flags()
    cli.run(main)
