"""The whole protocol in one command: reward-free pre-training, then fine-tuning on one labelled task, with evaluations
and checkpoints.

    python main.py --env_name=cube-single-play-singletask-task1-v0 [--agent=agents/infom.py --agent.alpha=30]
    [--preset=small]

The same command again resumes the run from its own directory. `pretrain.py` and `finetune.py` are the two phases by
themselves.
"""

import functools

from absl import flags

import envs
from envs import worker_pool
from utils import cli
from utils.flags import define_flags, resolve_settings, set_up_jax

FLAGS = flags.FLAGS


def make_experiment(phases=('pretraining', 'finetuning')):
    """The run that the command line asks for: flags → settings → data, environments and the directory of one
    `Experiment`."""
    config = set_up_jax(resolve_settings(FLAGS, phases))
    task = envs.task_spec(config.env_name, config.dataset)
    evaluates = config.eval_episodes and config.finetuning_steps
    films = evaluates and config.video_episodes
    if evaluates and (task.visual or (films and config.dataset is None)):
        envs.rendering.require_backend()  # Now, not after hours of pre-training.
    # After the flags are checked: these bring JAX in, which takes seconds.
    from envs import custom, data
    from utils.evaluation import Evaluator, check_rendering, environments_per_worker, record_video
    from utils.experiment import Experiment

    workers = config.eval_workers or worker_pool.available_cores()
    places = environments_per_worker(task.visual)
    if config.dataset is None:
        make_env = functools.partial(envs.make_env, config.env_name, config.seed, frame_stack=config.frame_stack)
        load_raw = functools.partial(data.load_raw, config.env_name, dataset_dir=config.dataset_dir)
    else:
        make_env = functools.partial(custom.make_env, task)
        load_raw = functools.partial(custom.load_raw, config.dataset)
        if evaluates:
            make_env().close()  # Its spaces are checked now, not after pre-training.
    make_rendering_env = functools.partial(make_env, render_mode='rgb_array')
    if films and config.dataset is not None:
        check_rendering(make_rendering_env)
    return Experiment(
        config,
        task,
        load_raw=lambda phase, split, size: load_raw(phase, split, max_transitions=size),
        make_evaluator=(lambda: Evaluator(make_env, workers, places)) if config.eval_episodes else None,
        record_video=lambda policy, path: record_video(
            make_rendering_env,
            policy,
            path,
            num_episodes=config.video_episodes,
            seed=config.seed,
            every=config.video_frame_skip,
        ),
        first_phase=phases[0],
    )


def main(_):
    with make_experiment() as experiment:
        experiment.pretrain()
        experiment.finetune()


if __name__ == '__main__':
    define_flags()
    cli.run(main)
