"""From the command line to a checked `RunConfig`: flags over the preset over the defaults; and JAX, configured for it.

The flags themselves are the fields of `RunConfig` (`utils/run_config.py`), the presets' values are in
`utils/presets.py`, and `utils/cli.py` is how errors reach the user. `resolve_settings` touches neither a simulator nor
a device: bad input is refused before anything starts.
"""

import ast
import dataclasses
import importlib.metadata
import itertools
import logging
import os
import re
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

import agents
import envs
from utils import presets, processor
from utils.errors import UserError, expanded
from utils.intervals import fit_intervals, largest_divisor
from utils.run_config import (
    COMMAND_LINE,
    DEFAULT,
    RunConfig,
    block_size,
    check_agent,
    check_encoder,
    check_flags,
    flag_fields,
)

PHASES = ('pretraining', 'finetuning')
CRASHING_JAXLIB = ('0.10.2', '0.11.0')
DEFAULT_AGENT = 'agents/infom.py'


# ---------------------------------------------------------------------------------------------------------- defining


class _AgentParser(flags.ArgumentParser):
    """Accepts what `agents.resolve` knows; the value is the agent's path."""

    syntactic_help = 'an agent: its file, or its name'

    def parse(self, argument):
        try:
            return f'agents/{agents.resolve(argument)}.py'
        except UserError as error:
            raise ValueError(str(error)) from None


class _TupleParser(flags.ArgumentParser):
    """Accepts '(256, 256)', '[256, 256]', '256,256' and '256'."""

    syntactic_help = 'a tuple, as in (256, 256)'

    def parse(self, argument):
        if isinstance(argument, tuple):
            return argument
        try:
            value = ast.literal_eval(argument)
        except (SyntaxError, ValueError):
            raise ValueError(f'expected {self.syntactic_help}') from None
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)


class _OptionalParser(flags.ArgumentParser):
    """Accepts what another parser does; 'none' is None."""

    def __init__(self, parser):
        self._parser = parser
        self.syntactic_help = f'{parser.syntactic_help or parser.flag_type()}, or none'

    def parse(self, argument):
        none = argument is None or (isinstance(argument, str) and argument.lower() == 'none')
        return None if none else self._parser.parse(argument)

    def flag_type(self):
        return self._parser.flag_type()


_PARSERS = {int: flags.IntegerParser, float: flags.FloatParser, str: flags.ArgumentParser, tuple: _TupleParser}


def _define(name, parser_or_type, default, help_text, flag_values, choices=None, optional=False):
    if parser_or_type is bool:
        flag = flags.BooleanFlag(name, default, help_text)
        flag.parser = _OptionalParser(flag.parser) if optional else flag.parser
        flags.DEFINE_flag(flag, flag_values)
    elif choices:
        flags.DEFINE_enum(name, default, choices, help_text, flag_values=flag_values)
    else:
        parser = _PARSERS[parser_or_type]() if isinstance(parser_or_type, type) else parser_or_type
        parser = _OptionalParser(parser) if optional else parser
        flags.DEFINE(parser, name, default, help_text, flag_values, serializer=flags.ArgumentSerializer())
    # --help lists the flags of the main module only: count ours among them.
    flag_values.register_key_flag_for_module(sys.argv[0], flag_values[name])


def define_flags(flag_values: flags.FlagValues = flags.FLAGS, argv: Sequence[str] | None = None) -> None:
    """Defines a run's flags, and a flag `--agent.<key>` for each setting of the agent that the command line names.

    Call once, before the flags are parsed, and under `if __name__ == '__main__'`: it imports the agent (hence JAX),
    which processes that only step environments must not. It never fails on bad input: that is left to the parsing.

    Args:
        flag_values: where to define them.
        argv: the command line, program name first; `sys.argv` by default.
    """
    for field in flag_fields().values():
        help_text = field.metadata['help'] + (' (default: from the preset)' if field.metadata['preset'] else '')
        _define(field.name, field.type, field.default, help_text, flag_values, field.metadata['choices'])
    _define('agent', _AgentParser(), DEFAULT_AGENT, 'The algorithm: a file of agents/.', flag_values)
    path = _agent_argument(sys.argv if argv is None else argv, flag_values)
    config = agents.load(path).get_config()
    help_text = f'Setting of {path}; a preset may replace the default: python -m utils.presets shows which.'
    for key, value in config.items():
        if key == 'agent_name':  # It is the file's name.
            continue
        kind = str if value is None and config.get_type(key) is type(None) else config.get_type(key)
        # Of an encoder none is the absence, also where an agent has one by default.
        optional = value is None or key == 'encoder'
        _define(f'agent.{key}', kind, value, help_text, flag_values, optional=optional)


def _agent_argument(argv: Sequence[str], flag_values: flags.FlagValues) -> str:
    """The agent that a command line names last, or the default where it names none or one that does not exist."""
    try:
        arguments = flag_values.read_flags_from_files(list(argv[1:]), force_gnu=False)
    except flags.Error:  # An unreadable --flagfile, which parsing will report.
        arguments = list(argv[1:])
    named = DEFAULT_AGENT
    for argument, following in itertools.pairwise([*arguments, DEFAULT_AGENT]):
        match = re.fullmatch(r'--?agent(?:=(.*))?', argument)
        if match:
            named = following if match[1] is None else match[1]
    try:
        return f'agents/{agents.resolve(named)}.py'
    except UserError:
        return DEFAULT_AGENT


# --------------------------------------------------------------------------------------------------------- resolving


def resolve_settings(flag_values: flags.FlagValues = flags.FLAGS, phases: Sequence[str] = PHASES) -> RunConfig:
    """The run that parsed flags ask for: explicit flags over the preset over the defaults, intervals made to fit.

    Args:
        flag_values: parsed flags.
        phases: those the command runs; the steps of the others are 0.

    Raises:
        UserError: the first thing that is wrong, what was expected, and what to do.
    """
    explicit = {name for name in flag_values if not flag_values[name].using_default_value}
    values = {name: flag_values[name].value for name in flag_fields()}
    if values['env_name'] is None:
        if values['dataset']:
            raise UserError('--env_name is missing: with --dataset, name a gymnasium environment, or none')
        raise UserError('--env_name is missing: name the task, as in --env_name=cube-single-play-singletask-task1-v0')
    task = envs.task_spec(values['env_name'], values['dataset'])
    agent_name = agents.resolve(flag_values['agent'].value)
    module = agents.load(agent_name)
    agent = ConfigDict(module.get_config())

    table_task = 'custom' if values['dataset'] else task.name  # A file may have the name of a published task.
    settings = presets.resolve(agent_name, table_task, values['preset'], agent.keys())
    values |= {name: value for name, value in settings.flags.items() if name not in explicit}
    agent.update(settings.agent)
    agent.update({key: flag_values[f'agent.{key}'].value for key in agent if f'agent.{key}' in explicit})
    names = [*values, *(f'agent.{key}' for key in agent)]
    sources = {name: COMMAND_LINE if name in explicit else settings.source.get(name, DEFAULT) for name in names}

    for phase in set(PHASES) - set(phases):
        name = f'{phase}_steps'
        if name in explicit and values[name]:
            raise UserError(f'--{name}={values[name]}: this command has no such phase; main.py runs both')
        values[name], sources[name] = 0, 'this command has no such phase'
    if values['dataset'] and values['env_name'] == envs.NO_ENV:
        for name in ('eval_episodes', 'video_episodes'):
            if name in explicit and values[name]:
                raise UserError(f'--{name}={values[name]}: --env_name=none has no environment to evaluate in')
            values[name], sources[name] = 0, 'there is no environment'

    scheduled = hasattr(module, 'has_schedule') and module.has_schedule(agent)
    if scheduled and agent.schedule_steps is None and values['finetuning_steps']:
        agent.schedule_steps = values['finetuning_steps']
        sources['agent.schedule_steps'] = 'as many as finetuning_steps'

    check_flags(values, task)
    check_agent(agent)
    check_encoder(agent, task, module.get_config().get('encoder'))
    module.validate_config(agent)
    for name, value in fit_intervals(values, explicit, block_size(agent, values['finetuning_steps'])).items():
        if value != values[name]:
            sources[name] = f'made to fit the steps (preset: {values[name]})'
            values[name] = value

    run_name = f'{task.name}_{agent_name}_sd{values["seed"]}'
    if len(phases) == 1:  # Pre-training and fine-tuning of one task by themselves are two runs.
        run_name += f'_{phases[0]}'
    for name, value in (('run_group', values['preset']), ('run_name', run_name)):
        if values[name] is None:
            values[name], sources[name] = value, 'derived'
    values['dataset_dir'] = str(expanded(values['dataset_dir']))
    return RunConfig(agent=FrozenConfigDict(agent), agent_name=agent_name, sources=sources, **values)


# --------------------------------------------------------------------------------------------------------------- JAX


def set_up_jax(config: RunConfig) -> RunConfig:
    """Configures JAX for a run, before its first computation: XLA's options, the other processes, precision,
    compilation cache.

    Returns:
        The configuration with `chunk_size` chosen for the device where it was 0.

    Raises:
        UserError: there is no device of the kind that JAX_PLATFORMS asks for, or the other processes are not found.
    """
    append_xla_flags(config.xla_flags)
    if config.agent.get('encoder') not in (None, 'mlp'):
        avoid_crash_on_images()
    import jax

    asked = jax.config.jax_platforms
    without_host = with_host(asked) != asked
    if without_host:
        jax.config.update('jax_platforms', with_host(asked))
    if config.distributed:
        from utils import processes

        processes.join(config.coordinator_address, config.num_processes, config.process_id)
    from utils import devices

    try:
        backend = jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS names what is not there, or a driver does not answer.
        raise UserError(f'JAX finds no device: {error}') from error
    if backend == 'cpu' and without_host:  # JAX passes over cuda where it sees no GPU.
        raise UserError(f'JAX finds no device of JAX_PLATFORMS={asked}: unset it to train on the processor')
    devices.set_matmul_precision(config.precision, backend)
    if config.compilation_cache:
        _use_compilation_cache(config.distributed)
    if config.chunk_size:
        return config
    # Long chunks hide the dispatch of an accelerator's short updates; on a CPU the progress bar should move.
    chunk_size = largest_divisor(config.log_interval, config.block, 100 if backend == 'cpu' else 1_000)
    sources = config.sources | {'chunk_size': f'chosen for this device ({backend})'}
    return dataclasses.replace(config, chunk_size=chunk_size, sources=sources)


def with_host(platforms: str | None) -> str | None:
    """JAX_PLATFORMS with the host's processor in it, on which batches are drawn and policies may act, too."""
    return f'{platforms},cpu' if platforms and 'cpu' not in platforms.split(',') else platforms


def avoid_crash_on_images() -> None:
    """Switches off what ends the process in gradients of convolutions, on the CPU of some versions of jaxlib (see
    https://github.com/jax-ml/jax/issues/40412); to be called before JAX's first computation."""
    # Only where it is needed: XLA refuses to start with an option that it does not know.
    if importlib.metadata.version('jaxlib') in CRASHING_JAXLIB:
        append_xla_flags('--xla_cpu_experimental_ynn_fusion_type=')


def append_xla_flags(options: str) -> None:
    """Adds options to XLA_FLAGS behind what is there; XLA reads the variable once, when a computation first starts."""
    if options:
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {options}'.strip()


def _use_compilation_cache(distributed: bool) -> None:
    """Keeps compiled programs on disk. A folder that cannot be written costs a warning, never the run.

    Processes of one run must find the same programs, or those that compile wait for those that do not: they share a
    folder only where JAX_COMPILATION_CACHE_DIR names one.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        if distributed:
            return
        cache = expanded(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'infom' / 'xla'
        cache /= processor.instruction_set()
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logging.warning('no compilation cache: %s', error)
            return
        jax.config.update('jax_compilation_cache_dir', str(cache))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
