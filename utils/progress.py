"""Progress bars that a log file can bear, too."""

import sys

from tqdm import tqdm

TERMINAL_INTERVAL, FILE_INTERVAL = 0.5, 20.0  # Seconds, at least, between two states of a bar.


def progress_bar(desc: str, total: int | None, unit: str, *, unit_scale=True, **options) -> tqdm:
    """A bar of tqdm, with its `options`, that is redrawn often on a terminal and seldom in a log file.

    Give `set_postfix` the option `refresh=False`: it would be redrawn with each call.
    """
    return tqdm(
        desc=desc,
        total=total,
        unit=f' {unit}',
        unit_scale=unit_scale,
        mininterval=TERMINAL_INTERVAL if sys.stderr.isatty() else FILE_INTERVAL,
        dynamic_ncols=True,
        smoothing=0.05,
        **options,
    )
