"""A fingerprint is equal for equal programs in any process, and differs with anything that a plan depends on."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autopar.ir.fingerprint import fingerprint
from autopar.ir.trace import trace


def step(w: Any, x: Any, *, rate: float = 0.1, axis: int = 0, length: int = 2) -> Any:
    h, _ = lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=length)
    h = jax.nn.softmax(jax.nn.relu(h) + jnp.cumsum(h, axis), axis=-1)
    key = jax.random.key(3)
    return w - rate * jnp.sum(jax.random.normal(key, h.shape) * h)


def key(width: int = 4, dtype: Any = jnp.float32, **options: Any) -> str:
    shapes = [jax.ShapeDtypeStruct((width, width), dtype), jax.ShapeDtypeStruct((8, width), dtype)]
    return fingerprint(trace(lambda w, x: step(w, x, **options), *shapes).program)


def test_it_is_the_same_at_every_trace_and_in_every_process():
    here = key()
    assert here == key()
    source = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_fingerprint as t; print(t.key())"
    )
    root = Path(__file__).parents[2]
    other = subprocess.run([sys.executable, "-c", source], cwd=root, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == here


def test_it_changes_with_every_constant_shape_dtype_and_parameter():
    changed = [key(), key(rate=0.2), key(axis=1), key(length=3), key(width=5), key(dtype=jnp.bfloat16)]
    assert len(set(changed)) == len(changed)


def test_it_changes_with_the_names_of_the_arguments():
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    found = {fingerprint(trace(lambda tree: jax.tree.map(jnp.sin, tree), {name: shape}).program) for name in "ab"}
    assert len(found) == 2


def test_it_does_not_depend_on_what_a_table_holds():
    def with_table(fill: float) -> str:
        table = jnp.full((4, 4), fill)
        return fingerprint(trace(lambda x: x @ table, jax.ShapeDtypeStruct((4,), jnp.float32)).program)

    assert with_table(1.0) == with_table(2.0)
