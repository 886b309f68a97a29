"""How a run's step counts, intervals and chunk length fit together, and what to say where they do not.

A chunk of updates is one compiled call. It never crosses a log boundary, and in fine-tuning it is made of whole blocks
of `actor_freq` updates, so each of actor_freq, chunk_size, log_interval divides the next, and log_interval every count
of updates.
"""

import math
from collections.abc import Collection, Mapping

from utils.errors import UserError

MOST_LOG_LINES = 5_000  # A fitted interval that logs more often than this would spend the run on logging.


def largest_divisor(number: int, block: int, limit: int) -> int:
    """The largest divisor of `number` that is a multiple of `block` and at most `limit`, or else `block` itself.

    `block` must divide `number`.
    """
    for multiple in range(limit // block, 1, -1):
        if number % (multiple * block) == 0:
            return multiple * block
    return block


def fit_intervals(values: Mapping[str, int], explicit: Collection[str], block: int) -> dict[str, int]:
    """The log, evaluation and save intervals, made to fit the step counts where the user left them open.

    Args:
        values: pretraining_steps, finetuning_steps, log_interval, eval_interval, save_interval, keep_interval (0:
            none), chunk_size (0: open).
        explicit: names that the user set; these never change.
        block: updates that cannot be parted (`actor_freq`, or 1 without fine-tuning).

    Raises:
        UserError: two explicit values do not go together.
    """
    steps = {name: values[name] for name in ('pretraining_steps', 'finetuning_steps') if values[name]}
    counted = steps | {name: values[name] for name in ('eval_interval', 'save_interval') if name in explicit}
    counted |= {'keep_interval': values['keep_interval']} if values['keep_interval'] else {}
    actor_freq = f'--agent.actor_freq={block}'
    if 'log_interval' in explicit:
        log_interval = values['log_interval']
        _require_multiple('log_interval', log_interval, block, actor_freq)
        for name, value in counted.items():
            _require_multiple(name, value, log_interval, f'--log_interval={log_interval}')
    else:
        for name, value in counted.items():
            _require_multiple(name, value, block, actor_freq)
        log_interval = largest_divisor(math.gcd(*counted.values()), block, values['log_interval'])
        if log_interval < values['log_interval'] and sum(steps.values()) > MOST_LOG_LINES * log_interval:
            given = ', '.join(f'--{name}={value}' for name, value in counted.items())
            raise UserError(
                f'{given}: no log_interval from {log_interval + 1} to {values["log_interval"]} divides them all; '
                f'use rounder numbers, or log every {log_interval} updates with --log_interval={log_interval}'
            )
    if values['chunk_size']:
        _require_multiple('chunk_size', values['chunk_size'], block, actor_freq)
        _require_multiple('log_interval', log_interval, values['chunk_size'], f'--chunk_size={values["chunk_size"]}')
    fitted = {'log_interval': log_interval}
    for name in ('eval_interval', 'save_interval'):
        whole = max(values[name] // log_interval, 1) * log_interval
        fitted[name] = values[name] if name in explicit else whole
    return fitted


def _require_multiple(name: str, value: int, divisor: int, divisor_name: str) -> None:
    if value % divisor:
        below = value // divisor * divisor
        nearest = f'{below} or {below + divisor}' if below else f'{divisor}'
        raise UserError(f'--{name}={value} is not a multiple of {divisor_name}: use {nearest}')
