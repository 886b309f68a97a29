"""Settings by (agent, task, preset): the published table, the protocol around it, and the two scaled-down presets.

    python -m utils.presets --agent=infom --env_name=scene-play-singletask-task1-v0 [--preset=small] [main.py's flags]

prints what a run with these flags would use, with the origin of every value. A preset fills in what the command line
leaves open; `utils/flags.py` puts the command line on top and checks the result.
"""

import ast
import csv
import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import agents
from utils.errors import UserError

TABLE_PATH = Path(__file__).with_name('published_hyperparameters.csv')

# The table's columns and their types. `obs_norm_type` is a run's flag; every other one is a setting of the agent.
COLUMN_TYPES = {
    'obs_norm_type': str,
    'alpha': float,
    'alpha_actor': float,
    'alpha_critic': float,
    'alpha_repr': float,
    'alpha_awr': float,
    'expectile': float,
    'kl_weight': float,
    'latent_dim': int,
    'num_flow_goals': int,
    'clip_flow_goals': bool,
    'critic_latent_type': str,
    'value_layer_norm': bool,
    'repr_noise': float,
    'repr_noise_clip': float,
    'repr_temp': float,
    'target_repr_temp': float,
    'num_model_rollouts': int,
    'num_model_rollout_steps': int,
    'encoder': str,
}
RUN_COLUMNS = ('obs_norm_type',)

# The task that an OGBench name without a task number stands for (reward_task_id 0 in ogbench's environment classes).
DEFAULT_TASKS = {'cube-single': 2, 'cube-double': 2, 'scene': 2, 'puzzle-4x4': 4}

# The published protocol: what all agents share, whatever the task.
STATE_PROTOCOL = {
    'pretraining_steps': 1_000_000,
    'finetuning_steps': 500_000,
    'pretraining_size': 1_000_000,
    'finetuning_size': 500_000,
    'log_interval': 5_000,
    'eval_interval': 50_000,
    'eval_episodes': 50,
    'save_interval': 50_000,  # ours: the published code saves only at the end
    'obs_norm_type': 'normal',
    'obs_norm_per_split': False,
    'next_actions_across_episodes': False,
    'p_aug': 0.0,
    'frame_stack': 1,
}
IMAGE_PROTOCOL = STATE_PROTOCOL | {
    'pretraining_steps': 250_000,
    'finetuning_steps': 100_000,
    'eval_interval': 10_000,
    'save_interval': 10_000,
    'obs_norm_type': 'none',
    'p_aug': 0.5,
    'frame_stack': 3,
}
IMAGE_AGENT = {'encoder': 'impala_small', 'clip_flow_goals': False}
# The reward of these tasks is minus the number of unmet sub-goals, and they end where it is 0: a learned reward ends an
# imagined trajectory where it is nearer to 0 than to −1.
SINGLE_TASK_AGENT = {'termination_reward': -0.5}

HIDDEN_DIMS = 'hidden_dims'  # in a preset: every setting of the agent that ends in it, whatever network it sizes


@dataclasses.dataclass(frozen=True)
class Preset:
    """Values that replace the published ones; agent settings that an agent does not have are passed over.

    `one_agent`: settings by the agent's name, above those of all agents. `defaults`: the same, but these give way to
    the published table.
    """

    flags: Mapping[str, Any]
    agent: Mapping[str, Any]
    image_agent: Mapping[str, Any]
    one_agent: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


PRESETS = {
    'paper': Preset({}, {}, {}),
    # The paper's sizes with what the published code does otherwise (docs/deviations.md), as far as it can be chosen.
    'published': Preset(
        flags={'obs_norm_per_split': True, 'next_actions_across_episodes': True},
        agent={'joint_adam': True, 'actor_tau': 1.0},
        image_agent={},
        one_agent={'infom': {'absorbing_ends': False, 'finetuning_schedule': 'constant'}},
        defaults={'infom': {'value_layer_norm': False}},
    ),
    # Minutes on a laptop's CPU: small networks and data, and few updates at a higher rate, which the targets' average
    # has to follow (the product of updates and tau is what tells how often the flow bootstraps on itself).
    'small': Preset(
        flags={
            'pretraining_steps': 20_000,
            'finetuning_steps': 10_000,
            'pretraining_size': 100_000,
            'finetuning_size': 50_000,
            'log_interval': 250,
            'eval_interval': 2_000,
            'eval_episodes': 20,
            'save_interval': 1_000,
        },
        agent={
            HIDDEN_DIMS: (256, 256),
            'latent_dim': 32,
            'num_flow_goals': 4,
            'num_flow_steps': 5,
            'lr': 1e-3,
            'actor_lr': 3e-4,
            'tau': 0.02,
            'actor_freq': 2,
            'reward_weight_decay': 1.0,
        },
        image_agent={},
        # InFOM's futures come from bootstrapping alone: at γ = 0.99 the product has to be several hundred.
        one_agent={'infom': {'tau': 0.05}},
    ),
    # Seconds: everything runs, nothing is learnt.
    'smoke': Preset(
        flags={
            'pretraining_steps': 40,
            'finetuning_steps': 40,
            'pretraining_size': 5_000,
            'finetuning_size': 5_000,
            'log_interval': 20,
            'eval_interval': 40,
            'eval_episodes': 2,
            'save_interval': 40,
        },
        agent={HIDDEN_DIMS: (64, 64), 'latent_dim': 8, 'num_flow_goals': 2, 'num_flow_steps': 2, 'batch_size': 32},
        image_agent={'encoder': 'impala_debug'},
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a preset says of one agent on one task.

    Attributes:
        flags: values of a run's flags.
        agent: values of the agent's config; keys absent here keep the agent's defaults.
        source: where each value comes from; keys are the flags' names and, for the agent's, 'agent.<key>'.
    """

    flags: dict[str, Any]
    agent: dict[str, Any]
    source: dict[str, str]


def _parse_cell(column: str, text: str):
    kind = COLUMN_TYPES[column]
    return text if kind is str else kind(ast.literal_eval(text))


@functools.cache
def published_table() -> dict[tuple[str, str], dict[str, Any]]:
    """The published settings: (agent, task) → {column: value}.

    An empty cell is absent: the agent's default. Of two rows for a task the later one counts, alone.
    """
    with TABLE_PATH.open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    return {
        (row['agent'], row['env_name']): {
            column: _parse_cell(column, row[column]) for column in COLUMN_TYPES if row[column]
        }
        for row in rows
    }


def task_with_number(env_name: str) -> str:
    """`X-play-singletask-v0` with the number of the environment's default task; any other name as it is."""
    match = re.fullmatch(r'((?:visual-)?(.+))-play-singletask-v0', env_name)
    if match and match[2] in DEFAULT_TASKS:
        return f'{match[1]}-play-singletask-task{DEFAULT_TASKS[match[2]]}-v0'
    return env_name


def published_settings(agent_name: str, env_name: str) -> tuple[dict[str, Any], str]:
    """The table's row for an agent on a task, and the task whose row it is ('' and no settings where there is no row).

    Image domains have a row for task 1 only; their other tasks take it, too: the tasks of a state domain share theirs.
    """
    task = task_with_number(env_name)
    candidates = [task]
    if task.startswith('visual-'):
        candidates.append(re.sub(r'-task\d-', '-task1-', task))
    for name in candidates:
        if (agent_name, name) in published_table():
            return dict(published_table()[agent_name, name]), name
    return {}, ''


def _expand(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The values for an agent with these keys: HIDDEN_DIMS for each of its networks, and nothing that it lacks."""
    expanded = {key: values[HIDDEN_DIMS] for key in keys if HIDDEN_DIMS in values and key.endswith(HIDDEN_DIMS)}
    return expanded | {key: value for key, value in values.items() if key in keys}


def resolve(
    agent_name: str, env_name: str, preset: str = 'paper', agent_keys: Collection[str] | None = None
) -> Settings:
    """The settings of an agent on a task under a preset.

    Args:
        agent_name: a name of the agents/ folder, aliases resolved.
        env_name: a task's name. One that the table does not know gets the published protocol and the agent's defaults.
        preset: a key of `PRESETS`.
        agent_keys: the names of the agent's settings; None asks the agent itself.

    Raises:
        UserError: unknown preset or agent.
    """
    if preset not in PRESETS:
        raise UserError(f'unknown preset {preset!r}: expected one of {", ".join(PRESETS)}')
    if agent_keys is None:
        agent_keys = agents.load(agent_name).get_config().keys()
    visual = env_name.startswith('visual-')
    row, row_task = published_settings(agent_name, env_name)
    scaled = PRESETS[preset]

    protocol = f'published protocol, {"images" if visual else "states"}'
    table = f'published table, {agent_name} on {row_task}'
    layers = [
        (protocol, IMAGE_PROTOCOL if visual else STATE_PROTOCOL, _expand(IMAGE_AGENT, agent_keys) if visual else {}),
        ('rule of the task', {}, _expand(SINGLE_TASK_AGENT, agent_keys) if '-singletask-' in env_name else {}),
        (f'preset {preset}', {}, dict(scaled.defaults.get(agent_name, {}))),
        (
            table,
            {key: value for key, value in row.items() if key in RUN_COLUMNS},
            {key: value for key, value in row.items() if key not in RUN_COLUMNS},
        ),
        (
            f'preset {preset}',
            scaled.flags,
            _expand(
                {**scaled.agent, **(scaled.image_agent if visual else {}), **scaled.one_agent.get(agent_name, {})},
                agent_keys,
            ),
        ),
    ]
    settings = Settings({}, {}, {})
    for source, run_values, agent_values in layers:
        settings.flags.update(run_values)
        settings.agent.update(agent_values)
        settings.source.update({key: source for key in run_values} | {f'agent.{key}': source for key in agent_values})
    return settings


def main(_) -> None:
    from absl import flags

    from utils.flags import resolve_settings

    print(resolve_settings(flags.FLAGS).table())


if __name__ == '__main__':
    from utils import cli
    from utils.flags import define_flags

    define_flags()
    cli.run(main)
