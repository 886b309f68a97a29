"""Keys for what draws random numbers beside a function that splits its own key."""

import jax

_BESIDE = 1000  # More than any key is split into.


def beside(key):
    """A key that no split of `key` gives: the k-th of those is fold_in(key, k)."""
    return jax.random.fold_in(key, _BESIDE)
