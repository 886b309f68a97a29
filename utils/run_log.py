"""A run's metrics as they come in: to `metrics.jsonl` and to wandb, in the order of steps."""

from utils import runs


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
