"""The exceptions that an entry point turns into one line and an exit code; everything else is a bug and shows its
traceback."""


class UserError(Exception):
    """Bad input: the message says what is wrong, what was expected, and what to do. Exit code 2."""


class TrainingDiverged(Exception):
    """A loss became NaN or infinite; the message names the step, the metric and the last good checkpoint. Exit code
    1."""


class ProcessLost(Exception):
    """Another process of a distributed run is gone; the message names the last checkpoint. Exit code 1."""
