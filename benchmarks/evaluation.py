"""Time of an evaluation by number of workers, beside the same episodes one after the other in this process.

    python -m benchmarks.evaluation [--env_name=…] [--episodes=50] [--workers=2,4] [--repeats=3]

The policy is a fresh InFOM agent's of the preset's size, in float32 on the default device; each worker has as many
environments as in a run. All take turns (one after the other, 2 workers, …) after a first evaluation each, which starts
the environments and is reported apart: a run keeps them for the next one. Prints a Markdown table and, as the last
line, one JSON object; a share is the median over turns of the time with workers over the time without. The results must
be the same, or it fails.
"""

import functools
import json
import math
import statistics
import time

from absl import flags

import envs
from envs import worker_pool
from utils import cli, presets
from utils.evaluation import ENVIRONMENTS_PER_WORKER, Evaluator, environments_per_worker

FLAGS = flags.FLAGS


def make_policy(env_name: str, preset: str):
    """Actions (1, W, A) of an untrained actor for observations (W, …) of the task."""
    from agents import infom
    from utils import training
    from utils.normalizers import Normalizer
    from utils.saved_policy import blank_example

    settings = presets.resolve('infom', env_name, preset)
    config = infom.get_config()
    config.update(settings.agent)
    example = blank_example(envs.task_spec(env_name), settings.flags['frame_stack'])
    agents = training.create_agents(infom.AGENT, [0], example, config)
    return training.make_policy(agents, Normalizer('none'), [0])


def compare(make_env, policy, worker_counts, episodes: int, repeats: int, places: int = ENVIRONMENTS_PER_WORKER):
    """{workers: (seconds of the first evaluation, [seconds of each turn])}; raises RuntimeError where results differ.

    places: environments of each worker.
    """
    evaluators = {workers: Evaluator(make_env, workers, places if workers > 1 else 1) for workers in worker_counts}
    times: dict[int, list[float]] = {workers: [] for workers in worker_counts}
    results = []
    try:
        for _ in range(1 + repeats):
            for workers, evaluator in evaluators.items():
                began = time.perf_counter()
                results.append(evaluator.evaluate(policy, [0], episodes))
                times[workers].append(time.perf_counter() - began)
    finally:
        for evaluator in evaluators.values():
            evaluator.close()
    # A policy on more observations at once may round differently, and a simulator carries that on.
    if not all(math.isclose(r[0]['episode.return'], results[0][0]['episode.return'], rel_tol=1e-3) for r in results):
        raise RuntimeError(f'the evaluations differ: {results}')
    return {workers: (first, turns) for workers, (first, *turns) in times.items()}


def main(_):
    counts = [1, *FLAGS.workers]
    policy = make_policy(FLAGS.env_name, FLAGS.preset)
    frame_stack = presets.resolve('infom', FLAGS.env_name, FLAGS.preset).flags['frame_stack']
    make_env = functools.partial(envs.make_env, FLAGS.env_name, 0, frame_stack=frame_stack)
    places = environments_per_worker(envs.task_spec(FLAGS.env_name).visual)
    measured = compare(make_env, policy, counts, FLAGS.episodes, FLAGS.repeats, places)
    alone = measured[1][1]
    print(f'{FLAGS.env_name}, {FLAGS.episodes} episodes, {worker_pool.available_cores()} cores\n')
    print('| workers | s, first | s | of the time without |\n|---|---|---|---|')
    shares = {}
    for workers, (first, turns) in measured.items():
        shares[workers] = statistics.median(a / b for a, b in zip(turns, alone, strict=True))
        print(f'| {workers} | {first:.1f} | {statistics.median(turns):.1f} | {shares[workers]:.2f} |')
    report = {
        'env_name': FLAGS.env_name,
        'episodes': FLAGS.episodes,
        'seconds': {str(workers): turns for workers, (_, turns) in measured.items()},
        'share': {str(workers): share for workers, share in shares.items()},
    }
    print(json.dumps(report))


if __name__ == '__main__':
    flags.DEFINE_string('env_name', 'cube-single-play-singletask-task1-v0', 'Task to evaluate on.')
    flags.DEFINE_string('preset', 'paper', 'Preset that gives the size of the policy.')
    flags.DEFINE_integer('episodes', 50, 'Episodes of each evaluation.', lower_bound=1)
    flags.DEFINE_integer('repeats', 3, 'Turns of each number of workers.', lower_bound=1)
    cli.define_numbers('workers', [2, 4], 'Numbers of worker processes, beside none.', minimum=2)
    cli.run(main)
