"""A run's metrics as they come in: to `metrics.jsonl` and to wandb, in the order of steps."""

import numpy as np

from utils import runs


def interval_lines(chunks, validated, updates_per_second: float, num_seeds: int):
    """One line for each seed on the updates since the last: {name: value}.

    chunks: {metric: (S,)} of each chunk, whose mean is training/<metric>. validated: {name: (S,)}, names complete.
    """
    speed = {
        'time/updates_per_second': updates_per_second,
        'time/seed_updates_per_second': updates_per_second * num_seeds,
    }
    return [
        {f'training/{name}': float(np.mean([chunk[name][i] for chunk in chunks])) for name in chunks[0]}
        | {name: float(values[i]) for name, values in validated.items()}
        | speed
        for i in range(num_seeds)
    ]


class RunLog:
    """Writes each line at once, or, while it is told to hold, keeps them until the lines that belong before are there.

    log: `runs.MetricsLog`. wandb: `WandbSink`. seeds (S): those that each call of `write` has lines for.
    """

    def __init__(self, log, wandb, seeds):
        self._log, self._wandb, self._seeds = log, wandb, seeds
        self._held = None  # A list while holding.

    def write(self, step, phase, lines, wall_seconds):
        """One line of metrics for each seed, {name: value}, and a copy to wandb."""
        if self._held is not None:
            self._held.append((step, phase, lines, wall_seconds))
            return
        for seed, line in zip(self._seeds, lines, strict=True):
            self._log.write(step, phase, seed, {**line, runs.WALL_TIME_KEY: wall_seconds})
        self._wandb.log_seeds(step, dict(zip(self._seeds, lines, strict=True)))

    def hold(self):
        """Keeps what is written from now on until `release`: lines of an earlier step are still to come."""
        self._held = []

    def release(self, *first):
        """Ends `hold`: writes the lines `first` (the arguments of `write`, if any) and then those that were kept."""
        held, self._held = self._held or [], None
        for lines in ([first] if first else []) + held:
            self.write(*lines)
