"""Waiting for what other processes do."""

import time


def wait_until(reached, what, seconds=300, pause=0.01):
    """Returns as soon as reached() is true, asked every `pause` seconds; fails where that takes longer.

    what: is waited for; or a function that tells how far things are.
    """
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f'waited {seconds} s for {what() if callable(what) else what}'
        time.sleep(pause)


def has_lines(run_directory, lines):
    """Whether the log of a run has come to so many lines."""
    log = run_directory / 'metrics.jsonl'
    return log.exists() and log.read_bytes().count(b'\n') >= lines
