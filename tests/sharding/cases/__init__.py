"""The table of equations that the rules are tested on: one module per family, named as its rules are.

Each module has ``CASES: dict[str, tuple]``: name -> (function, *arguments). The name is that of the primitive
under test and, if one row is not enough, what is special about it (``"reshape: merge"``). Arguments are
arrays or ``jax.ShapeDtypeStruct``, for which the test draws values. Every equation of the traced function
whose primitive's rule stands in the family's module is tested.
"""

import jax
import jax.numpy as jnp


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def of(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)
