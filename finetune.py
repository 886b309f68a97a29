"""Fine-tuning only: one pre-trained checkpoint, one labelled task of the same domain.

    python finetune.py --env_name=cube-single-play-singletask-task2-v0 --restore_path=exp/<group>/<pre-trained run>

`--restore_path` takes a run directory or one of its checkpoints. The same command again resumes the run from its own
directory.
"""

from main import make_experiment
from utils import cli
from utils.flags import define_flags


def main(_):
    with make_experiment(phases=('finetuning',)) as experiment:
        experiment.finetune()


if __name__ == '__main__':
    define_flags()
    cli.run(main)
