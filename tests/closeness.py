"""Pytrees of arrays and keys, compared."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def plain(leaf: Any) -> np.ndarray:
    """An array, or the words of a key."""
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf)


def assert_close(got: Any, want: Any, rtol: float = 2e-5) -> None:
    """Equal up to rounding of the largest element of each leaf."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = plain(a), plain(b)
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=rtol * max(1e-2, np.abs(b).max(initial=0.0)), rtol=0)
