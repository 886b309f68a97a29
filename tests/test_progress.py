"""The bar of long commands, as a log file gets it."""

import io
import sys

from utils import progress


def test_a_log_file_gets_a_few_states_and_a_terminal_many(monkeypatch):
    sizes = {}
    for is_terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda is_terminal=is_terminal: is_terminal
        monkeypatch.setattr(sys, 'stderr', stream)
        clock = iter(range(10_000))
        with progress.progress_bar('pretraining', 200, 'updates', unit_scale=False) as bar:
            bar._time = lambda clock=clock: next(clock)  # A second between one look at the clock and the next.
            bar.start_t = bar.last_print_t = next(clock)
            for step in range(200):
                bar.update()
                bar.set_postfix({'updates/s': step}, refresh=False)
        assert '200/200' in stream.getvalue()
        sizes[is_terminal] = stream.getvalue().count('\r')
    assert sizes[True] > 100 and sizes[False] < 20
