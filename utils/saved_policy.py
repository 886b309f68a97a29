"""A trained policy, or the whole agents, from a run on disk, without its data: for videos, demonstrations and one's own
evaluations."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import agents as agent_registry
from utils import checkpoints, training
from utils.normalizers import Normalizer


def load_agents(path, task):
    """The agents of a run's newest checkpoint (or of one named checkpoint), all seeds: (agents with a leading seed
    axis, normaliser, the checkpoint's metadata).

    task: the `envs.TaskSpec` that the run was trained on. Raises UserError for a path that holds no readable
    checkpoint.
    """
    path = checkpoints.resolve(path)
    meta = checkpoints.load_meta(path)
    module = agent_registry.load(meta['agent_name'])
    config = ConfigDict(module.get_config())
    config.update(
        {name: tuple(value) if isinstance(value, list) else value for name, value in meta['agent_config'].items()}
    )
    # Shapes are all that the template needs: its values, the observed range included, are replaced.
    example = blank_example(task, meta.get('frame_stack', 1))
    seeds = list(range(meta['seed'], meta['seed'] + meta['num_seeds']))
    template = training.describe_agents(module.AGENT, seeds, example, config)
    agents = checkpoints.restore(path, template, getattr(template, 'finetuning_state', ()))
    # What a pre-training need not hold, and this one does not, starts from 0.
    agents = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, agents)
    return agents, Normalizer.from_dict(meta['normalizer']), meta


def blank_example(task, frame_stack=1):
    """Zeros in the shapes of `datasets.example_batch` for a task (`envs.TaskSpec`), for when there are no data."""
    *shape, last = task.observation_shape
    observation = jnp.zeros((1, *shape, last * frame_stack), jnp.uint8 if task.visual else jnp.float32)
    return {
        'observations': observation,
        'actions': jnp.zeros((1, task.action_size)),
        'observation_min': observation[0],
        'observation_max': observation[0],
    }


def load_policy(path, task):
    """The policy of a run's newest checkpoint (or of one named checkpoint): observations (W, …) → actions (S, W, A) as
    NumPy.

    task and errors as in `load_agents`.
    """
    agents, normalizer, meta = load_agents(path, task)
    return training.make_policy(agents, normalizer, list(range(meta['seed'], meta['seed'] + meta['num_seeds'])))
