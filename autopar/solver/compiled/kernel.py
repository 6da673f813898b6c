"""How kernels are compiled: once per machine (the result is kept on disk), free of the interpreter lock."""

from __future__ import annotations

import functools

import numba

# Costs may be infinite, so only the parts of fast arithmetic that leave infinities alone.
kernel = functools.partial(
    numba.njit, cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp", "nsz"}
)
