"""`make demo`: from nothing to a fine-tuned policy on one benchmark task, with a table, a figure and a video.

It runs the project's own commands (collect, train) and reads what they leave on disk, so a second start reuses the
data and resumes the runs. `--seeds=0,1,2,3,4 --output=results/demo` trains several seeds on the same data and writes
the comparison that the README quotes.
"""

import functools
import json
import subprocess
import sys
import time

import numpy as np
from absl import flags

import envs
from envs import worker_pool
from utils import cli, plots, runs
from utils.errors import UserError, expanded
from utils.evaluation import Evaluator, record_video

FLAGS = flags.FLAGS

TASK = 'scene-play-singletask-task1-v0'
# What ten minutes allow, and enough validation to see the flow loss diverge: (split, training episodes, validation
# episodes).
COLLECTED = (('pretrain', 60, 3), ('finetune', 30, 3))
# A third of the published weight of cloning: after so few updates Q has little slope in the actions, and at the full
# weight the policy would stay the clone; at a tenth it leaves the data (results/demo).
SETTINGS = (
    '--preset=small',
    '--agent.alpha=100',
    '--pretraining_steps=8000',
    '--finetuning_steps=15000',
    '--eval_interval=3000',
)
POLICIES = ('random policy', 'pre-trained clone', 'fine-tuned policy')


def run_command(*arguments):
    """Runs one of the project's commands with its progress bars on this terminal; raises UserError if it fails."""
    command = [sys.executable, *arguments]
    print('\n$ python', *arguments, flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise UserError(f'`python {" ".join(arguments)}` ended with exit code {code}: see its message above')


def collect(directory):
    """Collects the two data sets with the simulator's scripted policies; says so where they are there already."""
    domain = envs.task_spec(TASK).dataset_env
    for split, episodes, val_episodes in COLLECTED:
        sizes = f'--num_episodes={episodes}', f'--val_episodes={val_episodes}'
        run_command(
            '-m',
            'envs.collect_ogbench',
            f'--env_name={domain}',
            f'--split={split}',
            *sizes,
            f'--dataset_dir={directory}',
        )


def train(directory, seed):
    """Pre-trains, fine-tunes and evaluates one seed; returns its run directory."""
    run_directory = directory / 'runs' / f'seed_{seed}'
    if (run_directory / 'config.json').exists():
        print(f'\n{run_directory} exists: resuming or reusing it', flush=True)
    run_command(
        'main.py',
        f'--env_name={TASK}',
        *SETTINGS,
        f'--seed={seed}',
        f'--dataset_dir={directory / "data"}',
        f'--save_dir={directory}',
        '--run_group=runs',
        f'--run_name=seed_{seed}',
    )
    return run_directory


def random_policy(seeds, num_episodes):
    """Statistics of uniformly random actions on the evaluation episodes of each seed."""
    with Evaluator(functools.partial(envs.make_env, TASK), num_workers=worker_pool.available_cores()) as evaluator:
        return [evaluator.evaluate_random(seed=seed, num_episodes=num_episodes) for seed in seeds]


def film(run_directory, path):
    """Two episodes of the final policy, unless the video is newer than the run."""
    if path.exists() and path.stat().st_mtime > (run_directory / 'summary.json').stat().st_mtime:
        return
    from utils.saved_policy import load_policy  # Brings JAX in: not before the commands above have had the cores.

    policy = load_policy(run_directory, envs.task_spec(TASK))
    make_env = functools.partial(envs.make_env, TASK, render_mode='rgb_array')
    record_video(make_env, lambda observation: policy(observation[None])[0, 0], path, num_episodes=1, every=4)


def evaluations(run_directory):
    """The run's evaluation lines, in the order of steps; the first is the clone's, the last the fine-tuned policy's."""
    rows = runs.read_metrics(run_directory / 'metrics.jsonl')
    return [row for row in rows if 'evaluation/episode.return' in row]


def table(scores, num_seeds, num_episodes):
    """The printed table; scores: {policy: list over seeds of {return, return_std, success, success_std}}."""
    over = f'{num_seeds} seeds' if num_seeds > 1 else f'{num_episodes} episodes'
    lines = [f'{TASK} (mean ± standard deviation over {over})', f'{"":20} {"return":>16} {"success %":>16}']
    for policy in POLICIES:
        cells = []
        for name, scale in (('return', 1), ('success', 100)):
            if num_seeds > 1:
                values = [scale * score[name] for score in scores[policy]]
                cells.append(f'{np.mean(values):7.1f} ± {np.std(values, ddof=1):5.1f}')
            else:
                score = scores[policy][0]
                cells.append(f'{scale * score[name]:7.1f} ± {scale * score[f"{name}_std"]:5.1f}')
        lines.append(f'{policy:20} {cells[0]:>16} {cells[1]:>16}')
    if num_seeds > 1:
        for name, scale, unit in (('return', 1, 'return'), ('success', 100, 'points of success')):
            pairs = zip(scores[POLICIES[1]], scores[POLICIES[2]], strict=True)
            gains = [scale * (fine_tuned[name] - clone[name]) for clone, fine_tuned in pairs]
            standard_error = np.std(gains, ddof=1) / np.sqrt(num_seeds)
            ratio = f' = {np.mean(gains) / standard_error:.1f} standard errors' if standard_error > 0 else ''
            lines.append(
                f'fine-tuned minus clone: {np.mean(gains):.1f} ± {standard_error:.1f} (standard error) {unit}{ratio}'
            )
    return '\n'.join(lines)


def score(row):
    """{return, return_std, success, success_std} of one evaluation line or of the random policy's statistics."""
    row = {key.removeprefix('evaluation/'): value for key, value in row.items()}
    return {name: row[f'episode.{name}'] for name in ('return', 'return_std', 'success', 'success_std')}


def write_scores(path, scores, seeds):
    names = ('return', 'return_std', 'success', 'success_std')
    rows = (
        (policy, seed, *(values[name] for name in names))
        for policy in POLICIES
        for seed, values in zip(seeds, scores[policy], strict=True)
    )
    runs.write_csv(path, ['policy', 'seed', *names], rows)


def main(_):
    began = time.monotonic()
    directory = expanded(FLAGS.directory)
    output = runs.require_writable(expanded(FLAGS.output) if FLAGS.output else directory)
    seeds = FLAGS.seeds
    collect(directory / 'data')
    run_directories = [train(directory, seed) for seed in seeds]
    lines = [evaluations(run_directory) for run_directory in run_directories]
    num_episodes = json.loads((run_directories[0] / 'config.json').read_text())['eval_episodes']
    scores = {
        POLICIES[0]: [score(row) for row in random_policy(seeds, num_episodes)],
        POLICIES[1]: [score(rows[0]) for rows in lines],
        POLICIES[2]: [score(rows[-1]) for rows in lines],
    }
    figure = output / 'learning_curves.png'
    members = {'InFOM': list(zip(run_directories, seeds, strict=True))}
    plots.draw_learning_curves(
        members, figure, TASK, reference={'random policy': np.mean([row['success'] for row in scores[POLICIES[0]]])}
    )
    write_scores(output / 'scores.csv', scores, seeds)
    text = table(scores, len(seeds), num_episodes)
    with runs.atomic_path(output / 'table.txt') as temporary:
        temporary.write_text(text + '\n')
    print(f'\n{text}\n\nfigure: {figure}\nruns:   {directory / "runs"}', flush=True)
    # Last: a machine that cannot render has all else by then.
    video = output / 'final_policy.mp4'
    film(run_directories[0], video)
    print(f'video:  {video}\ntook {time.monotonic() - began:.0f} s')


if __name__ == '__main__':
    cli.define_numbers('seeds', [0], 'Seeds to train, one after the other.')
    flags.DEFINE_string('directory', 'exp/demo', 'Where data and runs go; what is there is reused.')
    flags.DEFINE_string('output', None, 'Where the table, figure and video go (default: the directory itself).')
    cli.run(main)
