"""An agent's losses and their gradients against a float64 reference: the comparison, for any agent.

The references are beside the agents' tests, their building blocks in `tests/infom_reference.py`.
"""

import jax
import numpy as np

from tests import tiny
from tests.infom_reference import float64


@jax.jit
def evaluate(agent, batch, key):
    """{phase: (loss, metrics)} of pre-training, fine-tuning, and fine-tuning with the actor; {phase: gradient} of the
    first and the last, whose terms are those of all."""
    gradients, values = {}, {}
    for phase, loss in {
        'pretraining': lambda params: agent.pretraining_loss(params, batch, key),
        'finetuning_with_actor': lambda params: agent.finetuning_loss(params, batch, key, True),
    }.items():
        values[phase], gradients[phase] = jax.value_and_grad(loss, has_aux=True)(agent.params)
    values['finetuning'] = agent.finetuning_loss(agent.params, batch, key, False)
    return values, gradients


def assert_losses_match(agent, batch, key, reference, rtol=1e-4):
    """Values: `reference(params)` is {phase: {metric: value}}, 'loss' among them, for float64 parameters."""
    values, _ = evaluate(agent, batch, key)
    for phase, expected in reference(float64(agent.params)).items():
        loss, metrics = values[phase]
        np.testing.assert_allclose(loss, expected['loss'], rtol=rtol, err_msg=phase)
        for metric, value in expected.items():
            np.testing.assert_allclose(metrics[metric], value, rtol=rtol, atol=1e-6, err_msg=f'{phase}: {metric}')


def assert_gradients_match(agent, batch, key, reference, step=1e-5):
    """Directional derivatives of the phases' losses, one module at a time, against central differences of the
    reference.

    The reference holds fixed what the formulas put behind a stop-gradient, so agreement says that gradients flow where
    they should and nowhere else.
    """
    params, (_, gradients) = float64(agent.params), evaluate(agent, batch, key)
    for module in params:
        direction = tiny.perturb(jax.tree.map(np.zeros_like, params[module]), seed=3, scale=1.0)

        def shifted(size, module=module, direction=direction):
            return reference({**params, module: jax.tree.map(lambda p, d: p + size * d, params[module], direction)})

        up, down = shifted(step), shifted(-step)
        for phase, gradient in gradients.items():
            expected = (up[phase]['loss'] - down[phase]['loss']) / (2 * step)
            actual = tiny.dot(gradient[module], direction)
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5, err_msg=f'{phase}, {module}')
