"""From a sweep file to runs: the grid's combinations, each with a name that its settings alone decide.

The files are wandb's own format (method grid; parameters with `value` or `values`), so that `wandb sweep` takes them as
they are. A parameter is a flag of the program.
"""

import dataclasses
import hashlib
import itertools
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import agents
from utils.errors import UserError, expanded
from utils.run_config import OPERATIONAL_FLAGS, flag_fields

# Flags that say where a run goes and how it is watched: no part of its name.
NOT_IN_NAME = OPERATIONAL_FLAGS - {'restore_path'} | {'env_name', 'agent', 'seed', 'num_seeds', 'log_interval'}
FLOAT = re.compile(r'[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+')  # YAML takes 1e-3 for text.
TEXT_FLAGS = ('run_group', 'run_name', 'save_dir', 'dataset_dir')  # 20261128 is a fine name of a folder.
LONGEST_NAME = 180  # Characters; file systems allow 255, and files beside the run add suffixes.


@dataclasses.dataclass(frozen=True)
class Run:
    """One process: the program and its flags, `run_group` and `run_name` among them."""

    program: str
    flags: dict[str, Any]

    @property
    def label(self) -> str:
        return f'{self.flags["run_group"]}/{self.flags["run_name"]}'

    @property
    def directory(self) -> Path:
        return expanded(self.flags['save_dir']) / self.flags['run_group'] / self.flags['run_name']

    def command(self, python: str = sys.executable) -> list[str]:
        return [python, self.program, *(f'--{key}={value}' for key, value in self.flags.items())]


def read_sweep(path: Path) -> dict[str, Any]:
    """The content of a sweep file. Raises `UserError`: not readable, or not a grid of flags."""
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f'cannot read {path}: {error}') from error
    if not isinstance(content, dict) or not isinstance(content.get('parameters'), dict):
        raise UserError(f'{path} is no sweep file: expected `parameters`, each with `value` or `values`')
    if content.get('method') != 'grid':
        raise UserError(f'{path} has method {content.get("method")!r}: only grids can be expanded; use wandb sweep')
    if not isinstance(content.get('program', ''), str):
        raise UserError(f'{path} has program {content["program"]!r}: expected the name of a file, as in main.py')
    for name, parameter in content['parameters'].items():
        if not isinstance(name, str):
            raise UserError(f'{path} has a parameter {name!r}: expected the name of a flag, as in agent.alpha')
        if not isinstance(parameter, dict) or set(parameter) not in ({'value'}, {'values'}):
            raise UserError(f'{path}: parameter {name} is {parameter!r}: expected `value: …` or `values: […]`')
        if 'values' in parameter and not (isinstance(parameter['values'], list) and parameter['values']):
            raise UserError(f'{path}: parameter {name} has no list of values')
        if name in TEXT_FLAGS and None in parameter.get('values', [parameter.get('value')]):
            raise UserError(f'{path}: parameter {name} has no value: give one, or leave the parameter out')
    return content


def expand(path: Path, overrides: Mapping[str, Any] | None = None) -> list[Run]:
    """Every run of a sweep file, in the grid's order (the last parameter runs fastest), each once.

    overrides: flags that replace the file's for all runs.

    Raises:
        UserError: see `read_sweep`; a parameter or override that is no flag of the runs; or two runs of one name.
    """
    content, overrides = read_sweep(path), dict(overrides or {})
    values = {
        name: parameter.get('values', [parameter.get('value')]) for name, parameter in content['parameters'].items()
    }
    values |= {name: [value] for name, value in overrides.items()}
    values = {name: [_typed(name, value) for value in of_name] for name, of_name in values.items()}
    program = content.get('program', 'main.py')
    runs = {}
    for combination in itertools.product(*values.values()):
        flags = dict(zip(values, combination, strict=True))
        flags.setdefault('run_group', str(content.get('name') or path.stem))
        flags.setdefault('run_name', run_name(flags))
        flags.setdefault('save_dir', 'exp')
        run = Run(program, flags)
        same = runs.setdefault(run.label, run)  # An override may have made several the same.
        differing = [name for name in flags if same.flags[name] != flags[name]]
        if differing:
            raise UserError(f'{path}: runs that differ in --{differing[0]} are all called {run.label}')
    _check_flags(path, runs.values())
    return list(runs.values())


def run_name(flags: Mapping[str, Any]) -> str:
    """`<env_name>_<agent>_<key=value,…>_sd<seeds>`: the settings decide it alone, so that the same run finds itself
    again. A long one is cut before its seeds, with a digest of what was there."""
    agent = Path(str(flags.get('agent', 'infom'))).stem
    settings = [
        f'{key.removeprefix("agent.")}={_written(value)}'
        for key, value in sorted(flags.items())
        if key not in NOT_IN_NAME
    ]
    first, count = flags.get('seed', 0), flags.get('num_seeds', 1)
    for name, value in (('seed', first), ('num_seeds', count)):
        if type(value) is not int:
            raise UserError(f'--{name}={value}: expected one whole number; several seeds are `values: […]` of a file')
    seeds = f'sd{first}' if count == 1 else f'sd{first}-{first + count - 1}'
    parts = [str(flags.get('env_name', '')), agent, ','.join(settings)]
    name = re.sub(r'[^\w+=@,.-]', '-', '_'.join(part for part in parts if part))
    if len(name) + 1 + len(seeds) > LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        name = f'{name[: LONGEST_NAME - len(digest) - len(seeds) - 2]}_{digest}'
    return f'{name}_{seeds}'


def _typed(name: str, value: Any) -> Any:
    return str(value) if name in TEXT_FLAGS else _number(value)


def _number(value: Any) -> Any:
    if isinstance(value, str) and value.isdecimal():  # Quoted.
        return int(value)
    return float(value) if isinstance(value, str) and FLOAT.fullmatch(value) else value


def _written(value: Any) -> str:
    """3.0 and 3 alike: what goes through wandb's server may come back as the other."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def parse_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """{'preset': 'small', 'agent.alpha': 3.0} from 'preset=small' and 'agent.alpha=3.0', hyphens before it or not.

    Values are read as in a sweep file. Raises `UserError` for one without '='.
    """
    flags = {}
    for argument in arguments:
        name, equals, value = argument.lstrip('-').partition('=')
        if not (name and equals):
            raise UserError(f'{argument!r} is no setting: expected name=value, as in preset=small')
        try:
            flags[name] = value if name in TEXT_FLAGS or not value else _number(yaml.safe_load(value))
        except yaml.YAMLError:
            flags[name] = value
    return flags


def _check_flags(path: Path, runs: Iterable[Run]) -> None:
    settings: dict[str, set[str]] = {}
    for run in runs:
        agent = str(run.flags.get('agent', 'infom'))
        if agent not in settings:
            config = agents.load(agent).get_config()
            settings[agent] = {f'agent.{key}' for key in config}
        unknown = sorted(set(run.flags) - set(flag_fields()) - settings[agent] - {'agent'})
        if unknown:
            raise UserError(f'{path}: --{unknown[0]} is no flag of {run.program} with --agent={agent}')
