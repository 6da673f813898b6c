"""FLOPs of equations against XLA's own count, and which primitives fuse."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import ClosedJaxpr

from autopar.cost import equation_flops, equation_transcendentals, fusible


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(**settings):
    return lambda x, w: lax.conv_general_dilated(x, w, **({"window_strides": (1, 1), "padding": "SAME"} | settings))


# Programs whose unoptimised HLO is one instruction per equation: XLA's count is exactly ours.
CASES = {
    "matmul": (lambda x, y: x @ y, f32(8, 16), f32(16, 4)),
    "batched": (lambda x, y: jnp.einsum("bhqd,bhkd->bhqk", x, y), f32(2, 3, 8, 16), f32(2, 3, 5, 16)),
    "two contracted": (lambda x, y: jnp.einsum("abc,bcd->ad", x, y), f32(4, 8, 16), f32(8, 16, 5)),
    "outer": (lambda x, y: jnp.einsum("a,b->ab", x, y), f32(8), f32(16)),
    "conv same": (conv(), f32(2, 3, 9, 8), f32(5, 3, 3, 3)),
    "conv valid": (conv(padding="VALID"), f32(2, 3, 9, 8), f32(5, 3, 3, 3)),
    "conv strided": (conv(window_strides=(2, 2)), f32(2, 3, 9, 8), f32(5, 3, 3, 3)),
    "conv dilated": (conv(rhs_dilation=(2, 1)), f32(2, 3, 9, 8), f32(5, 3, 3, 3)),
    "conv transposed": (
        conv(lhs_dilation=(2, 2), padding=((1, 2), (2, 2))),
        f32(2, 3, 9, 8),
        f32(5, 3, 3, 3),
    ),
    "conv grouped": (conv(feature_group_count=2), f32(2, 4, 9, 8), f32(6, 2, 3, 3)),
    "conv batch grouped": (conv(batch_group_count=2), f32(4, 3, 9, 8), f32(6, 3, 3, 3)),
    "conv nhwc": (
        conv(dimension_numbers=("NHWC", "HWIO", "NHWC")),
        f32(2, 9, 8, 3),
        f32(3, 3, 3, 5),
    ),
    "add": (lambda x, y: x + y, f32(4, 8), f32(4, 8)),
    "maximum": (lambda x, y: jnp.maximum(x, y), f32(4, 8), f32(4, 8)),
    "compare and select": (lambda x, y: lax.select(x > y, x, y), f32(4, 8), f32(4, 8)),
    "square": (lambda x: lax.integer_pow(x, 2), f32(4, 8)),
    "fifth power": (lambda x: lax.integer_pow(x, 5), f32(4, 8)),
    "cast": (lambda x: x.astype(jnp.bfloat16), f32(4, 8)),
    "exp": (lax.exp, f32(4, 8)),
    "tanh": (lax.tanh, f32(4, 8)),
    "rsqrt": (lax.rsqrt, f32(4, 8)),
    "sum": (lambda x: lax.reduce_sum_p.bind(x, axes=(1,), out_sharding=None), f32(4, 8)),
    "max": (lambda x: lax.reduce_max_p.bind(x, axes=(0, 1), out_sharding=None), f32(4, 8)),
    "transpose": (lambda x: lax.transpose(x, (1, 0)), f32(4, 8)),
    "reshape": (lambda x: lax.reshape(x, (32,)), f32(4, 8)),
    "broadcast": (lambda x: lax.broadcast_in_dim(x, (4, 8), (1,)), f32(8)),
    "slice": (lambda x: lax.slice(x, (0, 2), (4, 6)), f32(4, 8)),
    "concatenate": (lambda x: lax.concatenate([x, x], 0), f32(4, 8)),
    "gather": (
        lambda x, i: lax.gather(
            x,
            i,
            lax.GatherDimensionNumbers((1,), (0,), (0,)),
            (1, 8),
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        ),
        f32(4, 8),
        jax.ShapeDtypeStruct((3, 1), jnp.int32),
    ),
}


def counted(program, *avals) -> tuple[float, float]:
    """Our flops and transcendentals, over the equations of a program with calls inlined."""
    flops = transcendentals = 0.0
    pending = [jax.make_jaxpr(program)(*avals).jaxpr]
    while pending:
        for eqn in pending.pop().eqns:
            inner = [p.jaxpr for p in eqn.params.values() if isinstance(p, ClosedJaxpr)]
            pending += inner
            if not inner:
                shapes = [atom.aval.shape for atom in eqn.invars], [v.aval.shape for v in eqn.outvars]
                flops += equation_flops(eqn.primitive.name, eqn.params, *shapes)
                transcendentals += equation_transcendentals(eqn.primitive.name, shapes[1])
    return flops, transcendentals


@pytest.mark.parametrize("name", CASES)
def test_the_count_is_that_of_xla(name):
    program, *avals = CASES[name]
    analysis = jax.jit(program).lower(*avals).cost_analysis() or {}
    assert counted(program, *avals) == (analysis.get("flops", 0.0), analysis.get("transcendentals", 0.0))


def test_a_training_step_counts_within_three_percent_of_the_compiled_program():
    def loss(params, x):
        for w in params:
            x = jax.nn.relu(x @ w)
        return (x**2).mean()

    def step(params, x):
        return [w - 0.1 * g for w, g in zip(params, jax.grad(loss)(params, x), strict=True)]

    avals = [f32(64, 128), f32(128, 128), f32(128, 32)], f32(256, 64)
    compiled = jax.jit(step).lower(*avals).compile().cost_analysis() or {}
    assert counted(step, *avals)[0] == pytest.approx(compiled["flops"], rel=0.03)


@pytest.mark.parametrize("n", [0, 1, 2, 37, 256])
def test_sorting_counts_n_log_n(n):
    expected = n * math.ceil(math.log2(n)) if n > 1 else 0
    assert equation_flops("sort", {"num_keys": 1}, [(n,)], [(n,)]) == expected


def test_scatters_and_scans_count_one_operation_per_update():
    assert equation_flops("scatter-add", {}, [(100, 8), (5, 1), (5, 8)], [(100, 8)]) == 40
    assert equation_flops("cumsum", {}, [(4, 8)], [(4, 8)]) == 32


def test_random_bits_cost_about_what_xla_counts_for_threefry():
    def bits(key):
        return jax.random.bits(key, (1 << 12,))

    traced = jax.jit(bits).trace(jax.random.key(0))
    # On CPU the rounds are a loop, whose body XLA counts once; on TPU they are written out.
    analysis = traced.lower(lowering_platforms=("tpu",)).cost_analysis() or {}
    assert counted(bits, jax.random.key(0))[0] == pytest.approx(analysis["flops"], rel=0.05)


REGIONS = {
    "jit": (jax.jit(lambda x: x @ x), 1),
    "remat": (jax.checkpoint(lambda x: x @ x), 1),
    "scan": (lambda x: lax.scan(lambda c, _: (c @ c, None), x, None, length=7)[0], 7),
    "nested": (
        lambda x: lax.scan(lambda c, _: (jax.jit(lambda y: y @ y @ y)(c), None), x, None, length=3)[0],
        6,
    ),
    "cond": (lambda x: lax.cond(x[0, 0] > 0, lambda v: v @ v @ v, lambda v: v @ v, x), 2),
    "while": (lambda x: lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x), 1),
    "custom_jvp": (jax.custom_jvp(lambda x: x @ x), 1),
    "custom_vjp": (jax.custom_vjp(lambda x: x @ x), 1),
}


@pytest.mark.parametrize("name", REGIONS)
def test_calls_and_loops_count_as_their_bodies(name):
    program, n_products = REGIONS[name]
    if name == "custom_jvp":
        program.defjvp(lambda primals, tangents: (program(*primals), program(*tangents)))
    if name == "custom_vjp":
        program.defvjp(lambda x: (program(x), None), lambda _, g: (g,))
    (*_, eqn) = jax.make_jaxpr(program)(f32(16, 16)).eqns
    found = equation_flops(eqn.primitive.name, eqn.params, [(16, 16)], [(16, 16)])
    assert found == n_products * 2 * 16**3


def test_elementwise_and_index_primitives_fuse_and_the_others_materialise():
    fused = "add mul exp tanh select_n broadcast_in_dim reshape transpose iota convert_element_type slice rev pad"
    kept = (
        "dot_general conv_general_dilated gather scatter scatter-add sort cumsum reduce_sum argmax "
        "random_bits dynamic_update_slice concatenate optimization_barrier an_unknown_primitive"
    )
    assert {name: fusible(name) for name in fused.split()} == dict.fromkeys(fused.split(), True)
    assert {name: fusible(name) for name in kept.split()} == dict.fromkeys(kept.split(), False)
