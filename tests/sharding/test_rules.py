"""Every rule against ground truth: each strategy of an equation runs on fake devices and equals the whole.

For one row of a table of cases: trace the function, find the equations of the primitive under test, list the
strategies of its rule on a mesh, run the local program of each under ``shard_map`` on operands cut as the
strategy says (a partial operand is fed as random terms that add up), put the results together, and compare.
"""

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import autopar.sharding.rules  # noqa: F401  (fills the tables)
from autopar.lowering.local import run_local
from autopar.sharding.factors import ShardingRule, check_shapes
from autopar.sharding.registry import SHARDING_RULES
from autopar.sharding.strategies import Strategy, strategies
from autopar.spec import Spec

FAMILIES = {m.name: importlib.import_module(f"cases.{m.name}") for m in pkgutil.iter_modules(cases.__path__)}
CASES = {f"{family}/{name}": row for family, module in FAMILIES.items() for name, row in module.CASES.items()}
COMBINE = {"sum": np.sum, "max": np.max, "min": np.min, "and": np.all, "or": np.any}
# XLA contracts, vectorises and reduces a block in another order than the whole: some units in the last place.
TOLERANCE = {"float32": 2e-6, "complex64": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}


# These programs run once: half of the time would go into optimising them.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def is_key(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def draw(spec: Any, seed: int) -> Any:
    """Values for one argument: keys, coins, small integers, odd sixteenths (not 0, exact when added)."""
    if not isinstance(spec, jax.ShapeDtypeStruct):
        return spec
    rng = np.random.default_rng(seed)
    if is_key(spec):
        return jax.random.split(jax.random.key(seed), spec.shape)
    if spec.dtype == jnp.bool_:
        return rng.integers(0, 2, spec.shape) == 1
    if jnp.issubdtype(spec.dtype, jnp.integer):
        return rng.integers(0, 8, spec.shape).astype(spec.dtype)
    values = (2 * rng.integers(-16, 16, spec.shape) + 1) / 16
    if jnp.issubdtype(spec.dtype, jnp.complexfloating):
        values = values + 1j * (2 * rng.integers(-16, 16, spec.shape) + 1) / 16
    return np.asarray(values).astype(spec.dtype)


def equations_of(function: Callable[..., Any], args: tuple[Any, ...], family: str) -> Iterator[tuple]:
    """(equation, values of its operands) of each traced equation that ``family`` has a rule for."""
    closed = jax.make_jaxpr(function)(*args)
    yield from _equations(closed.jaxpr, closed.consts, args, f"autopar.sharding.rules.{family}")


def module_of(primitive: str) -> str:
    rule = SHARDING_RULES.get(primitive)
    return getattr(rule.func if isinstance(rule, functools.partial) else rule, "__module__", "")


def _equations(jaxpr: Any, consts: Any, args: Any, module: str) -> Iterator[tuple]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for equation in jaxpr.eqns:
        operands = [v.val if isinstance(v, Literal) else values[v] for v in equation.invars]
        if equation.primitive.name == "jit":
            inner = equation.params["jaxpr"]
            yield from _equations(inner.jaxpr, inner.consts, operands, module)
        elif module_of(equation.primitive.name) == module:
            yield equation, operands
        if equation is jaxpr.eqns[-1]:
            return  # nothing needs its value
        results = equation.primitive.bind(*operands, **equation.params)
        results = results if equation.primitive.multiple_results else [results]
        values |= dict(zip(equation.outvars, results, strict=True))


def rule_of(equation: Any) -> ShardingRule | None:
    rule = SHARDING_RULES[equation.primitive.name](*(v.aval for v in equation.invars), **equation.params)
    if rule is not None:
        check_shapes(rule, tuple(v.aval.shape for v in (*equation.invars, *equation.outvars)))
    return rule


def terms(value: np.ndarray, spec: Spec, sizes: dict[str, int], seed: int) -> np.ndarray:
    """A value with one leading dimension per partial axis, along which random terms add up to it."""
    counts = tuple(sizes[axis] for axis in sorted(spec.partial))
    if not counts:
        return value
    rest = draw(jax.ShapeDtypeStruct((math.prod(counts) - 1, *value.shape), value.dtype), seed)
    first = (value - rest.sum(0, dtype=rest.dtype)).astype(value.dtype)
    return np.concatenate([first[None], rest]).reshape(counts + value.shape)


def partition(spec: Spec) -> PartitionSpec:
    return PartitionSpec(*sorted(spec.partial), *(dim or None for dim in spec.dims))


def in_parallel(equation: Any, rule: ShardingRule, mesh: Mesh, found: tuple[Strategy, ...]) -> Callable[..., Any]:
    """The local programs of all strategies, as one function of the global operands."""
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))

    def program(inputs: list[list[Any]]) -> list[list[Any]]:
        return [one(strategy, blocks) for strategy, blocks in zip(found, inputs, strict=True)]

    def one(strategy: Strategy, blocks: list[Any]) -> list[Any]:
        operands = [
            block.reshape(block.shape[len(spec.partial) :]) for block, spec in zip(blocks, strategy.inputs, strict=True)
        ]
        results = run_local(equation.primitive, equation.params, rule, strategy, sizes, operands)
        return [
            result.reshape((1,) * len(spec.partial) + result.shape)
            for result, spec in zip(results, strategy.outputs, strict=True)
        ]

    in_specs = [[partition(spec) for spec in strategy.inputs] for strategy in found]
    out_specs = [[partition(spec) for spec in strategy.outputs] for strategy in found]
    return jax.shard_map(program, mesh=mesh, in_specs=(in_specs,), out_specs=out_specs, check_vma=False)


def raw(value: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(value) if is_key(value) else value)


def compare(got: Any, expected: Any, message: str) -> None:
    assert got.shape == expected.shape, f"{message}: shape {got.shape}, not {expected.shape}"
    assert got.dtype == expected.dtype, f"{message}: dtype {got.dtype}, not {expected.dtype}"
    rtol = TOLERANCE.get(str(expected.dtype), 0.0)
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64 if rtol else expected.dtype
    got, expected = got.astype(wide), expected.astype(wide)
    finite = np.abs(expected[np.isfinite(expected)]) if rtol else np.zeros(0)
    atol = rtol * (1 + finite.max(initial=0.0))
    np.testing.assert_allclose(got, expected, rtol, atol, equal_nan=True, err_msg=message)


def few(found: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
    """Each factor and linear group once, on the last axis that it fits, and three with several axes."""
    used = {strategy: tuple(split for _, split in strategy.splits if split is not None) for strategy in found}
    alone = {used[strategy]: strategy for strategy in reversed(found) if len(used[strategy]) == 1}
    several = [strategy for strategy in found if len(used[strategy]) > 1]
    return (*alone.values(), *several[:: max(1, -(-len(several) // 3))]) or found


def check(equation: Any, operands: list[Any], mesh: Mesh, pick: Callable[..., Any]) -> int:
    """Runs every strategy of one equation, in one compiled program; returns how many there were."""
    rule = rule_of(equation)
    if rule is None:
        return 0
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    found = pick(strategies(rule, sizes))

    def place(value: Any, spec: Spec, seed: int) -> Any:
        value = value if is_key(value) else terms(np.asarray(value), spec, sizes, seed)
        return jax.device_put(value, NamedSharding(mesh, partition(spec)))

    inputs = [[place(x, s, i) for i, (x, s) in enumerate(zip(operands, f.inputs, strict=True))] for f in found]
    split = compiled(in_parallel(equation, rule, mesh, found))(inputs)
    whole = compiled(lambda xs: equation.primitive.bind(*xs, **equation.params))(operands)
    whole = whole if equation.primitive.multiple_results else [whole]
    for strategy, results in zip(found, split, strict=True):
        for spec, got, expected in zip(strategy.outputs, results, whole, strict=True):
            value, axes = raw(got), tuple(range(len(spec.partial)))
            if axes:
                wide = value.astype(np.float64) if value.dtype.name == "bfloat16" else value
                value = COMBINE[rule.monoid](wide, axis=axes).astype(value.dtype)
            compare(value, raw(expected), f"rule {rule}, strategy {strategy}")
    return len(found)


@functools.cache
def mesh_of(sizes: tuple[tuple[str, int], ...]) -> Mesh:
    axes, counts = zip(*sizes, strict=True)
    return Mesh(np.array(jax.devices("cpu")[: math.prod(counts)]).reshape(counts), axes)


def check_case(case: str, sizes: dict[str, int], pick: Callable[..., Any]) -> None:
    function, *specs = CASES[case]
    family = case.partition("/")[0]
    args = tuple(draw(spec, seed) for seed, spec in enumerate(specs))
    mesh = mesh_of(tuple(sizes.items()))
    checked = [check(equation, operands, mesh, pick) for equation, operands in equations_of(function, args, family)]
    assert checked, f"{case}: the traced function has no equation of this family"


@pytest.mark.parametrize("case", CASES)
def test_every_way_to_split_an_equation_gives_the_whole_equation(case: str) -> None:
    check_case(case, {"x": 2, "y": 4}, few)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ({"x": 2, "y": 4}, {"x": 2, "y": 2, "z": 2}), ids=("2x4", "2x2x2"))
@pytest.mark.parametrize("case", CASES)
def test_every_strategy_of_an_equation_gives_the_whole_equation(case: str, sizes: dict[str, int]) -> None:
    check_case(case, sizes, tuple)


def primitives_of(jaxpr: Any) -> set[str]:
    inner = [primitives_of(e.params["jaxpr"].jaxpr) for e in jaxpr.eqns if e.primitive.name == "jit"]
    return {e.primitive.name for e in jaxpr.eqns}.union(*inner)


def line(name: str, rule: ShardingRule | None) -> str:
    groups = "".join(f"; linear in {' '.join(map(str, group))}" for group in rule.linear) if rule else ""
    return f"{name:50} {rule or 'not split'}{groups}"


def flat(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "jit":
            yield from flat(equation.params["jaxpr"].jaxpr)
        else:
            yield equation


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rules_of_a_family_are(family: str, golden: Callable[[str, str], None]) -> None:
    lines = []
    for name, (function, *specs) in FAMILIES[family].CASES.items():
        equations = flat(jax.make_jaxpr(function)(*specs).jaxpr)
        named = [equation for equation in equations if equation.primitive.name == name.partition(":")[0]]
        lines += [line(name, rule_of(equation)) for equation in named]
    golden(f"rules.{family}", "\n".join(lines))


def test_every_rule_has_a_row():
    newer = {name for name in FAMILIES["elementwise"].NEWER if not hasattr(jax.lax, f"{name}_p")}
    # The ends of loops and branches are primitives of autopar's own: no function traces to them.
    ours = {name for name in SHARDING_RULES if module_of(name) == "autopar.sharding.rules.control"}
    missing = set(SHARDING_RULES) - newer - ours
    for function, *specs in CASES.values():
        missing -= {equation.primitive.name for equation in flat(jax.make_jaxpr(function)(*specs).jaxpr)}
    assert missing == set()
