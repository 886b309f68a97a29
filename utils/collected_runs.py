"""The evaluations of many runs, collected for tables and figures: which runs count, which are the same method, and what
has to be said of them.

A run counts when it is finished and intact; all others are named with a reason. What the command line of a run chose
(its explicit settings) makes the method; what the presets chose per task does not. Runs of one method on one task that
differ in any other setting, or in their data, are told apart by it: two different things are never averaged.
Runs of different lengths are compared at a common one: `collect(…, finetuning_steps=…)`. One that has come so far
counts there, though it was stopped later on, or still goes on.
"""

import dataclasses
import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import envs
from envs import custom
from utils.errors import UserError, expanded
from utils.presets import task_with_number
from utils.run_config import COMMAND_LINE, OPERATIONAL_FLAGS
from utils.run_status import FINISHED, read_json, run_start, run_status
from utils.runs import read_metrics, score_summary

AGENT_TITLES = {
    'infom': 'InFOM',
    'iql': 'IQL',
    'rebrac': 'ReBRAC',
    'dino_rebrac': 'DINO+ReBRAC',
    'mbpo_rebrac': 'MBPO+ReBRAC',
    'crl_infonce': 'CRL+IS',
    'td_infonce': 'TD InfoNCE+IS',
    'fb_iql': 'FB+IQL',
    'hilp_iql': 'HILP+IQL',
}
# The metric that a suite is scored by, its unit, and the factor from the metric to the unit.
SUITE_SCORES = {
    'ogbench': ('evaluation/episode.success', 'success %', 100.0),
    'exorl': ('evaluation/episode.return', 'return', 1.0),
    custom.SUITE: ('evaluation/episode.return', 'return', 1.0),
}
# What config.json says that is no setting of the method: which task and seeds, and how the run was done and watched.
NOT_SETTINGS = OPERATIONAL_FLAGS | {
    'agent', 'agent_name', 'env_name', 'dataset', 'sources', 'start', 'data', 'environment', 'seed', 'num_seeds',
    'log_interval',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Curve:
    """The evaluations of one seed of one run.

    Attributes:
        run: the run directory, relative to the directory that was collected.
        variant: the settings that set its method apart, as its name shows them: ('alpha=30', 'expectile=0.95').
        settings: the values of the agent's settings that differ anywhere in the collection; None where this run has
            none, for instance because its code was older.
        steps: fine-tuning updates at each evaluation, from 0.
        values: the score at each evaluation: success in per cent (OGBench), return (ExORL).
    """

    run: str
    agent: str
    variant: tuple[str, ...]
    env_name: str
    seed: int
    settings: dict[str, Any]
    steps: np.ndarray
    values: np.ndarray

    @property
    def method(self) -> str:
        return method_title(self.agent, self.variant)

    @property
    def domain(self) -> str:
        return domain_of(self.env_name)

    @property
    def unit(self) -> str:
        return SUITE_SCORES[suite_of(self.env_name)][1]

    @property
    def training(self) -> tuple:
        """What was trained, under whatever name: curves with the same one are of one and the same training."""
        settings = tuple(sorted((key, repr(value)) for key, value in self.settings.items()))
        return self.agent, self.env_name, settings, self.seed

    @property
    def scores(self) -> dict[str, float | None]:
        """`runs.score_summary` of the values, and `drop` = best − final_three."""
        scores = score_summary(self.values.tolist())
        return scores | {'drop': scores['best'] - scores['final_three']}

    @property
    def score(self) -> float:
        """Mean of the last three evaluations."""
        return self.scores['final_three']


@dataclasses.dataclass
class CollectedRun:
    """One finished run: its directory, its config, and the method that it turned out to be."""

    name: str
    directory: Path
    config: dict[str, Any]
    rows: dict[int, list[dict]]  # the evaluation lines of each seed
    end: float  # the last step that counts
    explicit: dict[str, Any]  # settings that its command line chose
    resolved: dict[str, Any]  # all settings, and a digest of the data
    last: dict[int, dict[str, Any]]  # last value of every metric, by seed
    apart: dict[str, Any] = dataclasses.field(default_factory=dict)  # settings that set the method apart

    @property
    def agent(self) -> str:
        return self.config['agent_name']

    @property
    def env_name(self) -> str:
        return task_of(self.config)

    @property
    def variant(self) -> tuple[str, ...]:
        return tuple(f'{key.removeprefix("agent.")}={value}' for key, value in sorted(self.apart.items()))

    @property
    def method(self) -> str:
        return method_title(self.agent, self.variant)


@dataclasses.dataclass
class Collection:
    """`curves` is what counts; `left_out` are (run, reason); `notes` is what a reader of the figures has to know."""

    runs: list[CollectedRun]
    curves: list[Curve]
    left_out: list[tuple[str, str]]
    notes: list[str]


def task_of(config: dict) -> str:
    """What results call a run's task: the benchmark's name, or that of a user's own data.

    A default task goes by its number, where the benchmark has it under one: the two names are one task.
    """
    if config.get('dataset'):
        return custom.task_name(config['dataset'])
    numbered = task_with_number(config['env_name'])
    return numbered if numbered in envs.TASKS else config['env_name']


def suite_of(task: str) -> str:
    """'ogbench', 'exorl' or 'custom', without a look at the data."""
    return custom.SUITE if task.startswith(custom.PREFIX) else envs.task_spec(task).suite


def task_position(task: str) -> tuple[int, str]:
    """Sorts tasks in the order of `envs.TASKS`, others by name after them."""
    return envs.TASKS.index(task) if task in envs.TASKS else len(envs.TASKS), task


def domain_of(task: str) -> str:
    """The domain that a task is reported under: the four image tasks are one, as in the paper; own data, one each."""
    if suite_of(task) == custom.SUITE:
        return task
    spec = envs.task_spec(task)
    return 'visual' if spec.visual else spec.domain


def method_title(agent: str, variant: Sequence[str] = ()) -> str:
    """What rows and legends call a method: 'InFOM alpha=30, expectile=0.95' (see `Curve.variant`)."""
    return f'{AGENT_TITLES.get(agent, agent)} {", ".join(variant)}'.strip()


def collect(directory: str | os.PathLike, finetuning_steps: int | None = None) -> Collection:
    """Everything under a directory that is a run.

    finetuning_steps: count every run as if it had ended after so many updates; shorter ones are left out.

    Raises:
        UserError: no such directory, no run in it, or none that counts.
    """
    directory = expanded(directory)
    if not directory.is_dir():
        raise UserError(f'{directory} is not a directory: expected the --save_dir of some runs')
    found = sorted(find_runs(directory))
    if not found:
        raise UserError(
            f'no run in {directory}: expected directories with config.json and metrics.jsonl, as main.py writes'
        )
    collected, left_out = [], []
    for path in found:
        name = str(path.relative_to(directory)) if path != directory else path.resolve().name
        try:
            collected.append(_read_run(name, path, finetuning_steps))
        except UserError as error:
            left_out.append((name, str(error)))
    _tell_methods_apart(collected)
    varied = _varied_settings(collected)
    of_agent: dict[str, set[str]] = defaultdict(set)
    for run in collected:
        of_agent[run.agent] |= varied & run.resolved.keys()
    curves = [_curve(run, seed, sorted(of_agent[run.agent])) for run in collected for seed in run.rows]
    curves, duplicates = _without_duplicates(curves)
    left_out += duplicates
    if not curves:
        reasons = '; '.join(f'{name}: {reason}' for name, reason in left_out)
        raise UserError(f'no finished run with evaluations in {directory}: {reasons}')
    notes = [f'All runs as after {finetuning_steps} fine-tuning updates.'] if finetuning_steps is not None else []
    return Collection(collected, curves, left_out, notes + _notes(collected, curves))


def find_runs(directory: Path) -> Iterator[Path]:
    """The run directories at or under a directory, hidden ones left out."""
    for parent, folders, files in os.walk(directory):
        if 'config.json' in files or 'metrics.jsonl' in files:
            folders.clear()
            yield Path(parent)
        folders[:] = [folder for folder in folders if not folder.startswith('.')]


# --- Reading ---


def _read_run(name: str, directory: Path, finetuning_steps: int | None) -> CollectedRun:
    """Raises `UserError` with the reason why the run does not count."""
    status = run_status(directory, finetuning_steps)
    if status != FINISHED:
        raise UserError(status)
    config = read_json(directory / 'config.json')
    try:
        metric = SUITE_SCORES[suite_of(task_of(config))][0]
        seeds = range(config['seed'], config['seed'] + config['num_seeds'])
        explicit, resolved = _settings(config)
        end = math.inf
        if finetuning_steps is not None:
            length = config['finetuning_steps']
            if length < finetuning_steps:
                raise UserError(f'it has {length} fine-tuning updates, fewer than {finetuning_steps}')
            end = run_start(config) + config['pretraining_steps'] + finetuning_steps
            explicit.pop('finetuning_steps', None)
            resolved.pop('finetuning_steps', None)
        rows: dict[int, list[dict]] = {seed: [] for seed in seeds}
        last: dict[int, dict] = {seed: {} for seed in seeds}
        for row in read_metrics(directory / 'metrics.jsonl'):
            if row['step'] > end:
                continue
            last[row['seed']].update(row)
            if row['phase'] == 'finetuning' and row.get(metric) is not None:
                rows[row['seed']].append(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f'damaged: config.json or metrics.jsonl lacks or mistakes {error}') from error
    if finetuning_steps is not None and any(rows[seed] and rows[seed][-1]['step'] != end for seed in seeds):
        raise UserError(f'it was not evaluated after {finetuning_steps} fine-tuning updates')
    empty = [seed for seed in seeds if not rows[seed]]
    if empty:
        raise UserError(f'no {metric} of seed {empty[0]}: it never evaluated a fine-tuned policy')
    for seed in seeds:
        steps = [row['step'] for row in rows[seed]]
        if sorted(set(steps)) != steps:
            raise UserError(f'damaged: the evaluations of seed {seed} are not in the order of steps, each once')
        if steps != [row['step'] for row in rows[seeds[0]]]:
            raise UserError(f'damaged: the evaluations of seed {seed} are not at the steps of seed {seeds[0]}')
    return CollectedRun(name, directory, config, rows, end, explicit, resolved, last)


def _settings(config: dict) -> tuple[dict[str, Any], dict[str, Any]]:
    """(explicit, resolved) settings by flag name. Lists become tuples, so that they can be compared in sets."""
    values = {key: value for key, value in config.items() if key not in NOT_SETTINGS}
    values |= {f'agent.{key}': value for key, value in config['agent'].items() if key != 'agent_name'}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    sources = config.get('sources', {})
    explicit = {key: value for key, value in values.items() if sources.get(key) == COMMAND_LINE}
    fingerprints = sorted(f'{key} {source["fingerprint"]}' for key, source in config.get('data', {}).items())
    values['data'] = hashlib.sha256('\n'.join(fingerprints).encode()).hexdigest()[:8]
    if restored := config.get('start', {}).get('pretraining'):
        values['pretraining'] = restored['digest']
    if config.get('dataset'):  # Elsewhere the task says both.
        values['env_id'] = config['env_name']
    return explicit, values


def _tell_methods_apart(collected: list[CollectedRun]) -> None:
    """Fills in `apart`: explicit settings that not all runs share, and whatever else differs within a method and
    task."""
    shared = set.intersection(*(set(run.explicit.items()) for run in collected)) if collected else set()
    groups: dict[tuple, list[CollectedRun]] = defaultdict(list)
    for run in collected:
        run.apart = dict(set(run.explicit.items()) - shared)
        groups[run.agent, run.env_name, frozenset(run.explicit.items())].append(run)
    for group in groups.values():
        differing = _differing(group)
        for run in group:
            run.apart |= {key: run.resolved.get(key) for key in differing}


def _varied_settings(collected: list[CollectedRun]) -> set[str]:
    """The settings that tell methods apart, and those without which runs of two methods on a task would look the
    same."""
    varied = {key for run in collected for key in run.apart}
    alike: dict[tuple, list[CollectedRun]] = defaultdict(list)
    for run in collected:
        alike[run.agent, run.env_name, frozenset((key, run.resolved.get(key)) for key in varied)].append(run)
    return varied.union(*map(_differing, alike.values()))


def _differing(group: list[CollectedRun]) -> set[str]:
    """The settings that not all runs of a group have with the same value."""
    keys = {key for run in group for key in run.resolved}
    return {key for key in keys if len({run.resolved.get(key) for run in group}) > 1}


def _curve(run: CollectedRun, seed: int, varied: Iterable[str]) -> Curve:
    metric, _, factor = SUITE_SCORES[suite_of(run.env_name)]
    rows = run.rows[seed]
    return Curve(
        run=run.name,
        agent=run.agent,
        variant=run.variant,
        env_name=run.env_name,
        seed=seed,
        settings={key: run.resolved.get(key) for key in varied},
        steps=np.array([row['step'] - rows[0]['step'] for row in rows]),
        values=factor * np.array([row[metric] for row in rows], np.float64),
    )


def _without_duplicates(curves: list[Curve]) -> tuple[list[Curve], list[tuple[str, str]]]:
    """Leaves out every seed of a method that several runs hold: which of them is meant is not ours to guess."""
    holders: dict[tuple, list[Curve]] = defaultdict(list)
    for curve in curves:
        holders[curve.method, curve.env_name, curve.seed].append(curve)
    left_out = []
    for (method, env_name, seed), same in holders.items():
        for curve in same if len(same) > 1 else []:
            others = ', '.join(other.run for other in same if other is not curve)
            left_out.append(
                (curve.run, f'seed {seed} of {method} on {env_name} is in {others}, too: move all but one away')
            )
    return [same[0] for same in holders.values() if len(same) == 1], left_out


# --- What a reader has to know ---


def _notes(collected: list[CollectedRun], curves: list[Curve]) -> list[str]:
    notes = []
    shared = set.intersection(*(set(run.explicit.items()) for run in collected))
    if shared:
        notes.append(f'All runs: {", ".join(f"{key}={value}" for key, value in sorted(shared, key=str))}.')
    notes += _version_notes(collected)
    notes += [*_data_notes(collected), *_pretraining_notes(collected), *_name_notes(curves)]
    short = sorted({curve.run for curve in curves if len(curve.values) < 3})
    if short:
        notes.append(f'Fewer than three evaluations, all of which make the score: {", ".join(short)}.')
    seeds: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for curve in curves:
        seeds[curve.method][curve.env_name].add(curve.seed)
    most = {
        env: max(len(tasks[env]) for tasks in seeds.values() if env in tasks)
        for tasks in seeds.values()
        for env in tasks
    }
    for method, tasks in sorted(seeds.items()):
        fewer = [f'{len(tasks[env])} of {most[env]} on {env}' for env in sorted(tasks) if len(tasks[env]) < most[env]]
        if fewer:
            notes.append(f'{method} has fewer seeds than others: {", ".join(fewer)}.')
    return notes


def _data_notes(collected: list[CollectedRun]) -> list[str]:
    """One line for each task whose methods were fine-tuned on different data: scores that do not compare."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for run in collected:
        source = run.config.get('data', {}).get('finetuning/train')
        if source is not None:
            found[run.env_name][source['fingerprint'][:8]].add(run.method)
    return [
        f'{task}: fine-tuned on different data: '
        + '; '.join(f'{data} ({", ".join(sorted(methods))})' for data, methods in sorted(of_task.items()))
        + '.'
        for task, of_task in sorted(found.items())
        if len(of_task) > 1
    ]


def _pretraining_notes(collected: list[CollectedRun]) -> list[str]:
    """One line for each run whose seeds fine-tune the pre-training of other seeds."""
    return [
        f'{run.name}: seed {run.config["seed"]} is of fine-tuning alone, its pre-training has seed {restored["seed"]}.'
        for run in collected
        if (restored := run.config.get('start', {}).get('pretraining')) and restored['seed'] != run.config['seed']
    ]


def _name_notes(curves: list[Curve]) -> list[str]:
    """One line for each set of methods that are names of the same trainings: they chose what others have anyway."""
    names: dict[tuple, set[str]] = defaultdict(set)
    for curve in curves:
        names[curve.training].add(curve.method)
    tasks: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for (_, env_name, *_), methods in names.items():
        tasks[tuple(sorted(methods))].add(env_name)
    return [
        f'The same settings and seeds under {len(methods)} names: {"; ".join(methods)} '
        f'(on {", ".join(sorted(of_methods, key=task_position))}). Sensitivities count each seed once.'
        for methods, of_methods in sorted(tasks.items())
        if len(methods) > 1
    ]


def _version_notes(collected: list[CollectedRun]) -> list[str]:
    """One line for each method whose runs are of several versions of the code, of its packages or of the machine."""
    notes = []
    methods: dict[str, list[CollectedRun]] = defaultdict(list)
    for run in collected:
        methods[run.method].append(run)
    for method, runs in sorted(methods.items()):
        versions: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for run in runs:
            environment = run.config.get('environment', {})
            named = {
                key: environment.get(key) for key in ('git_commit', 'git_changed', 'python', 'backend', 'device_kind')
            }
            for key, value in {**named, **environment.get('packages', {})}.items():
                versions[key][str(value)[:12]].append(run.name)
        mixed = [
            f'{key} ' + ' / '.join(f'{value} ({", ".join(names)})' for value, names in sorted(values.items()))
            for key, values in sorted(versions.items())
            if len(values) > 1
        ]
        if mixed:
            notes.append(f'{method}: its runs are of mixed versions: {"; ".join(mixed)}.')
    return notes
