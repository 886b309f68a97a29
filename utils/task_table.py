"""Takes every task from nothing to an evaluated policy, in small, and writes down what worked: `docs/tasks.md`.

    python -m utils.task_table [--only=cheetah] [--again]

For each domain a few short episodes are collected and InFOM is pre-trained on them (`--preset=smoke`); for each of its
tasks the labels are checked and that checkpoint is fine-tuned and evaluated. All of it is done by the project's own
commands, as processes: one that fails is a cell of the table. Results are kept beside the table as JSON lines, the last
one of a task counts; tasks that passed are not run again without `--again`.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

from absl import flags
from tqdm import tqdm

import envs
from utils import cli, runs
from utils.errors import UserError, expanded, last_line

STAGES = {
    'data': 'data made',
    'labels': 'labels checked',
    'pretrained': 'pre-trained',
    'finetuned': 'fine-tuned',
    'evaluated': 'evaluated',
}
PASSED, NOT_RUN = '✓', '–'
VERSIONED_PACKAGES = ('jax', 'ogbench', 'dm_control', 'mujoco', 'gymnasium')
TIMEOUT = 1200  # Seconds for one command.
EPISODES, VAL_EPISODES = 3, 1
EPISODE_LENGTHS = {'states': 100, 'images': 40}  # Images take 0.1 s each to render on a CPU.

FLAGS = flags.FLAGS


class StageFailed(Exception):
    """A command of the project failed; the message is its last line."""


def run_command(*arguments) -> None:
    """Runs `python <arguments>`; raises `StageFailed` with the last line that it wrote if it does not end with 0."""
    try:
        result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise StageFailed(f'no end after {TIMEOUT} s') from None
    if result.returncode:
        raise StageFailed(last_line(result.stdout + result.stderr) or f'exit code {result.returncode}')


def collect(spec: envs.TaskSpec, directory: Path) -> None:
    """Makes the domain's data sets; those that are there already are left alone."""
    length = EPISODE_LENGTHS['images' if spec.visual else 'states']
    into = f'--dataset_dir={directory / "data"}'
    if spec.suite == 'ogbench':
        for split in ('pretrain', 'finetune'):
            run_command(
                '-m', 'envs.collect_ogbench', f'--env_name={spec.dataset_env}', f'--split={split}', into,
                f'--num_episodes={EPISODES}', f'--val_episodes={VAL_EPISODES}', f'--episode_length={length}',
                '--workers=1',
            )  # fmt: skip
        return
    source = f'--exorl_dir={directory / "exorl"}'
    size, val_size = EPISODES * length, VAL_EPISODES * length
    run_command(
        '-m', 'envs.collect_exorl', f'--domain={spec.domain}', '--policy=random', source, '--workers=1',
        f'--num_transitions={2 * (size + val_size)}', f'--episode_length={length}',
    )  # fmt: skip
    run_command(
        '-m', 'envs.convert_exorl', f'--domain={spec.domain}', '--algo=random', source, into, '--workers=1',
        f'--pretraining_size={size}', f'--pretraining_val_size={val_size}',
        f'--finetuning_size={size}', f'--finetuning_val_size={val_size}',
    )  # fmt: skip


def train(script: str, spec: envs.TaskSpec, directory: Path, run_name: str, *arguments) -> None:
    """Runs one phase anew."""
    shutil.rmtree(directory / 'runs' / run_name, ignore_errors=True)
    run_command(
        script, f'--env_name={spec.name}', '--preset=smoke', '--eval_episodes=1', '--eval_workers=1',
        f'--dataset_dir={directory / "data"}', f'--save_dir={directory}', '--run_group=runs', f'--run_name={run_name}',
        *arguments,
    )  # fmt: skip


def check_labels(spec: envs.TaskSpec, directory: Path) -> None:
    run_command('-m', 'envs.check_labels', f'--env_name={spec.name}', f'--dataset_dir={directory / "data"}')


def check_evaluations(run_directory: Path) -> None:
    """Raises `StageFailed` unless the run was evaluated before and after fine-tuning, with finite results."""
    rows = [row for row in runs.read_metrics(run_directory / 'metrics.jsonl') if 'evaluation/episode.return' in row]
    if len(rows) < 2:
        raise StageFailed(f'{len(rows)} evaluations were logged, not 2')
    for row in rows:
        for name, value in row.items():
            if name.startswith('evaluation/') and (value is None or not math.isfinite(value)):
                raise StageFailed(f'{name} is {value} at step {row["step"]}')


def attempt(stage, *arguments) -> str:
    """'✓', or why the stage failed."""
    try:
        stage(*arguments)
    except (StageFailed, UserError) as error:
        return str(error)
    return PASSED


def run_task(spec: envs.TaskSpec, directory: Path, domains: dict) -> dict[str, str]:
    """The result of each stage; those that a failed one is needed for are not run. domains: what is done already."""
    results = dict.fromkeys(STAGES, NOT_RUN)
    run_directory = directory / 'runs' / spec.name
    done = domains.setdefault(spec.domain, {})
    if not done:
        done['data'] = attempt(collect, spec, directory)
        if done['data'] == PASSED:
            done['pretrained'] = attempt(train, 'pretrain.py', spec, directory, spec.domain)
    results |= done
    if results['data'] == PASSED:
        results['labels'] = attempt(check_labels, spec, directory)
    if results['pretrained'] == PASSED:
        restore = f'--restore_path={directory / "runs" / spec.domain}'
        results['finetuned'] = attempt(train, 'finetune.py', spec, directory, spec.name, restore)
    if results['finetuned'] == PASSED:
        results['evaluated'] = attempt(check_evaluations, run_directory)
    return results


def has_passed(record: dict | None) -> bool:
    return record is not None and all(record[stage] == PASSED for stage in STAGES)


def read_records(path: Path) -> dict[str, dict]:
    """The last record of each task."""
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    try:
        return {record['task']: record for record in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} cannot be read ({type(error).__name__}: {error}): move it away') from error


def make_table(records: dict[str, dict], command: str) -> str:
    """The page: what was run with what, and a row for each task of `envs.TASKS`."""
    shown = [records[task] for task in envs.TASKS if task in records]
    passed = sum(map(has_passed, shown))
    lines = [
        '# The tasks, each from nothing to an evaluated policy',
        '',
        f'{passed} of {len(envs.TASKS)} tasks pass. Made with `{command}`, in small: {EPISODES} + {VAL_EPISODES} short '
        'episodes for each phase, `--preset=smoke`.',
        'It shows that everything runs and that labels are right (`python -m envs.check_labels`); in so few updates',
        'nothing is learned. Data and pre-training are those of the domain; their seconds count in its first task.',
        '',
        *(f'- {version}' for version in dict.fromkeys(_describe_versions(record) for record in shown)),
        '',
        '| task | ' + ' | '.join(STAGES.values()) + ' | seconds | date |',
        '| --- |' + ' --- |' * (len(STAGES) + 2),
    ]
    for task in envs.TASKS:
        record = records.get(task, dict.fromkeys(STAGES, NOT_RUN))
        cells = [record[stage].replace('|', '\\|') for stage in STAGES]
        seconds = f'{record["seconds"]:.0f}' if 'seconds' in record else NOT_RUN
        lines.append(f'| {task} | ' + ' | '.join([*cells, seconds, record.get('date', NOT_RUN)]) + ' |')
    return '\n'.join(lines) + '\n'


def _describe_versions(record: dict) -> str:
    return f'{record["date"]}: ' + ', '.join(f'{name} {version}' for name, version in record['versions'].items())


def main(_):
    tasks = [task for task in envs.TASKS if FLAGS.only in task]
    if not tasks:
        raise UserError(f'--only={FLAGS.only}: no task has that in its name; envs.TASKS lists them')
    output, directory = expanded(FLAGS.output), expanded(FLAGS.directory)
    runs.require_writable(output.parent)
    store = output.with_suffix('.jsonl')
    records = read_records(store)
    information = runs.environment_info()
    versions = {'commit': information['git_commit'] or 'unknown', 'Python': information['python']}
    versions |= {name: information['packages'][name] for name in VERSIONED_PACKAGES if name in information['packages']}
    domains = {}
    for task in tqdm([task for task in tasks if FLAGS.again or not has_passed(records.get(task))], unit='task'):
        began = time.monotonic()
        results = run_task(envs.task_spec(task), directory, domains)
        seconds = round(time.monotonic() - began, 1)
        records[task] = {'task': task, **results, 'seconds': seconds, 'date': time.strftime('%Y-%m-%d')}
        records[task]['versions'] = versions
        with store.open('a', encoding='utf-8') as file:
            file.write(json.dumps(records[task], ensure_ascii=False) + '\n')
        with runs.atomic_path(output) as temporary:
            Path(temporary).write_text(make_table(records, 'python -m utils.task_table'), encoding='utf-8')
        failures = {stage: result for stage, result in results.items() if result != PASSED}
        tqdm.write(f'{task}: {failures or "passed"} ({seconds:.0f} s)')
    failed = [task for task in tasks if not has_passed(records[task])]
    print(f'{len(tasks) - len(failed)} of {len(tasks)} tasks pass: {output}')
    return 1 if failed else None


if __name__ == '__main__':
    flags.DEFINE_string('only', '', 'Only tasks with this in their name.')
    flags.DEFINE_string('output', 'docs/tasks.md', 'The page; its records are kept beside it, as .jsonl.')
    flags.DEFINE_string('directory', 'exp/tasks', 'Where data and runs go; data that are there are used again.')
    flags.DEFINE_bool('again', False, 'Run tasks that have passed, too.')
    cli.run(main)
