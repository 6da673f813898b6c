"""Layers written out one by one become loops, and the step stays the step that it was."""

import dataclasses
import functools
import importlib
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from autopar.api.planning import Options, plan_traced
from autopar.ir.arguments import adapt
from autopar.ir.program import Constant, Equation, Program, Value, check
from autopar.ir.trace import Traced, trace
from autopar.lowering.audit import audit, compare
from autopar.lowering.jit import run_program
from autopar.lowering.local_program import build_local_program
from autopar.lowering.rolling.roll import roll
from autopar.lowering.rolling.saved import least_saved, nbytes, sources_of
from autopar.lowering.rolling.trunk import RollError
from autopar.lowering.rolling.unit import Inner, Unit
from autopar.lowering.spmd import device_mesh, lower, shardings
from tests import closeness

QUICKLY = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TINY = {"batch": 4, "width": 8, "heads": 2, "layers": 3, "clip_norm": 0.1, "dropout": 0.1}
TEXT = {**TINY, "seq": 4, "vocab": 16}

MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "gpt": ("gpt", TEXT, 3),
    "gpt, recomputed": ("gpt", {**TEXT, "remat": True}, 3),
    "bert": ("bert", TEXT, 3),
    "vit": ("vit", TINY, 3),
    "moe, two layers a unit": ("moe", {**TEXT, "layers": 4, "experts": 4}, 2),
    "gpt_nnx": ("gpt_nnx", TEXT, 3),
    "llama": ("llama", TEXT, 3),
}
FAST = ("gpt",)


def loops(program: Program) -> list[Equation]:
    return [eqn for eqn in program.equations if eqn.bodies and "jaxpr" not in eqn.params]


def runs(traced: Traced, leaves: list[Any]) -> list[Any]:
    program = traced.program
    check(program)
    return list(QUICKLY(lambda *arrays: run_program(program, arrays))(*leaves, *program.constants))


assert_close = functools.partial(closeness.assert_close, rtol=1e-6)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in MODELS])
def test_a_rolled_model_takes_the_same_three_steps(name):
    module, config, n_units = MODELS[name]
    step, state, batch = importlib.import_module(f"models.{module}").make(**config)
    adapted = adapt(step, (state, batch))
    traced = trace(adapted.function, *adapted.arguments)
    rolled = roll(traced)
    assert [loop.params["length"] for loop in loops(rolled.program)] == [n_units] * 2
    assert [loop.params["reverse"] for loop in loops(rolled.program)] == [False, True]
    check(rolled.program)
    program = rolled.program
    one, other = QUICKLY(adapted.function), QUICKLY(lambda *arrays: run_program(program, arrays))
    leaves, mine = (jax.tree.leaves(adapted.arguments) for _ in range(2))
    for _ in range(3):
        want = jax.tree.leaves(one(*jax.tree.unflatten(traced.in_tree, leaves)))
        got = other(*mine, *program.constants)
        assert_close(got, want)
        for i, o in rolled.state:
            leaves[i], mine[i] = want[o], got[o]


# -- chains


@dataclasses.dataclass(frozen=True)
class Chain:
    """A step of alike layers: what its layers are made of."""

    layers: int = 3
    width: int = 4
    per_unit: int = 1
    shared: bool = False
    literals: bool = False
    auxiliary: str = ""
    dropout: bool = False
    remat: bool = False
    first: bool = False
    counter: bool = False
    split: bool = False

    @property
    def name(self) -> str:
        return "-".join(f"{field}={value}" for field, value in vars(self).items() if value)


def make(chain: Chain) -> tuple[Any, tuple[Any, ...]]:
    """The step of a chain, and its arguments: parameters, batch, key."""
    d = chain.width
    keys = iter(jax.random.split(jax.random.key(0), 64))
    normal = lambda *shape: jax.random.normal(next(keys), shape) / d**0.5  # noqa: E731
    params = {
        "embed": normal(d, d),
        "layers": [{"w": normal(d, d), "b": normal(d)} for _ in range(chain.layers * chain.per_unit)],
        "shared": normal(d, d),
    }

    def layer(k: int, p: Any, shared: jax.Array, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        bits = jax.random.bits(jax.random.fold_in(key, 7 * k), x.shape)
        y = x @ p["w"] + p["b"]
        y = jnp.tanh(y) if k % chain.per_unit == 0 else jax.nn.gelu(y)
        y = y + jnp.sin(y @ shared) if chain.shared else y
        y = jnp.where(bits > 2**30, y / 0.75, 0.0) if chain.dropout else y
        y = y * (0.5 + k) if chain.literals else y
        y = jnp.cos(y) if chain.first and k == 0 else y
        return x + y, jnp.mean(y**2), bits

    def loss_fn(params: Any, x: jax.Array, key: jax.Array) -> Any:
        x, total, kept = x @ params["embed"], jnp.zeros(()), []
        each = jax.random.split(key, len(params["layers"]))
        for k, p in enumerate(params["layers"]):
            run = functools.partial(layer, k)
            run = jax.checkpoint(run) if chain.remat else run
            x, penalty, bits = run(p, params["shared"], x, each[k] if chain.split else key)
            key = jax.random.fold_in(key, 1) if chain.counter else key
            total = total + penalty if chain.auxiliary == "summed" else total
            kept.append((penalty, bits))
        if chain.auxiliary == "later":
            total = sum(penalty * (2 + k) for k, (penalty, _) in enumerate(kept))
        return jnp.mean(jnp.square(x)) + total, kept if chain.auxiliary else ()

    def step(params: Any, x: jax.Array, key: jax.Array) -> Any:
        (loss, kept), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, key)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss, kept

    return step, (params, normal(3, d), jax.random.key(1))


CHAINS = [
    Chain(),
    Chain(layers=5, shared=True),
    Chain(layers=4, literals=True, auxiliary="summed"),
    Chain(auxiliary="later", dropout=True),
    Chain(remat=True, dropout=True, shared=True),
    Chain(layers=4, first=True),
    Chain(layers=2, per_unit=2),
    Chain(layers=3, per_unit=2, shared=True),
    Chain(counter=True, dropout=True, auxiliary="later"),
    Chain(split=True, dropout=True),
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
def test_a_rolled_chain_takes_the_same_step(chain):
    assert_rolled(chain)


@settings(max_examples=5, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    st.builds(
        Chain,
        layers=st.integers(2, 6),
        width=st.sampled_from((2, 4, 5)),
        per_unit=st.integers(1, 2),
        shared=st.booleans(),
        literals=st.booleans(),
        auxiliary=st.sampled_from(("", "summed", "later")),
        dropout=st.booleans(),
        remat=st.booleans(),
        counter=st.booleans(),
        split=st.booleans(),
    ).filter(lambda chain: chain.layers > 2 or not (chain.shared or chain.counter))
)
def test_any_chain_takes_the_same_step(chain):
    assert_rolled(chain)


def assert_rolled(chain: Chain) -> None:
    """Both passes are rolled, all layers of them; results agree, and the random bits are the same bits."""
    step, arguments = make(chain)
    traced = trace(step, *arguments)
    rolled = roll(traced)
    forward, backward = loops(rolled.program)
    assert forward.params["length"] == backward.params["length"] == chain.layers - chain.first
    assert sum(eqn.primitive.name == "dot_general" for eqn in rolled.program.equations) <= 4 + 3 * chain.first
    leaves = jax.tree.leaves(arguments)
    got, want = runs(rolled, leaves), jax.tree.leaves(QUICKLY(step)(*arguments))
    assert_close(got, want, rtol=1e-5)  # sums in another order, six layers deep
    for a, b in zip(got, want, strict=True):
        assert a.dtype != jnp.uint32 or (a == b).all()


# -- what a rolled program looks like


@functools.cache
def gpt(layers: int, **config: Any) -> tuple[Traced, Traced]:
    from models import gpt as model

    step, state, batch = model.make(**(TEXT | {"layers": layers, "abstract": True} | config))
    traced = trace(step, state, batch)
    return traced, roll(traced)


def test_arguments_results_and_state_stay_what_they_are():
    traced, rolled = gpt(3)
    assert rolled.program.arguments == traced.program.arguments
    assert [v.name for v in traced.program.outputs if isinstance(v, Value)] == [
        v.name for v in rolled.program.outputs if isinstance(v, Value)
    ]
    assert (rolled.in_tree, rolled.out_tree, rolled.state) == (traced.in_tree, traced.out_tree, traced.state)


def test_values_inside_have_the_names_of_the_first_layer_and_the_source_lines_of_its_equations():
    traced, rolled = gpt(3)
    line = {eqn.name: (eqn.source, eqn.backward) for eqn in traced.program.equations}
    for loop in loops(rolled.program):
        for eqn in loop.bodies[0].equations:
            name = eqn.name.removeprefix("trunk/").partition("~")[0]
            assert eqn.name.startswith("trunk/GPT/h_0/")
            assert (eqn.source, eqn.backward) == line[name]


def test_the_loops_of_more_layers_are_no_longer():
    (few, short), (many, long) = gpt(3), gpt(5)
    sizes = [[len(loop.bodies[0].equations) for loop in loops(rolled.program)] for rolled in (short, long)]
    assert sizes[0] == sizes[1]
    per_layer = (len(many.program.equations) - len(few.program.equations)) / 2
    assert (len(long.program.equations) - len(short.program.equations)) / 2 < 0.72 * per_layer  # updates, stacks


def test_later_loops_read_stacks_as_they_are():
    _, rolled = gpt(3)
    forward, backward = loops(rolled.program)
    made = set(forward.outputs) | set(forward.inputs)
    stacks = [value for value in backward.inputs if value.aval.shape[:1] == (3,)]
    assert stacks and made.issuperset(stacks)


def test_a_loop_keeps_no_residual_that_elementwise_equations_make_from_the_others():
    _, rolled = gpt(3)
    forward, _ = loops(rolled.program)
    (body,) = forward.bodies
    kept = {value.name for value in forward.outputs}
    tensors = {value.name for value in body.outputs if isinstance(value, Value) and len(value.shape) == 3}
    # A layer's input, queries, keys, values, softmax, their mix, the middle of the layer, the hidden activations.
    assert len(tensors) <= 8, sorted(tensors)
    assert "trunk/stack/GPT/h_0/mlp/tanh" not in kept


def test_the_first_layers_are_rolled_if_fewer_are_asked_for():
    step, arguments = make(Chain(layers=5))
    traced = trace(step, *arguments)
    rolled = roll(traced, 3)
    assert [loop.params["length"] for loop in loops(rolled.program)] == [3, 3]
    (stack, *_) = (eqn for eqn in rolled.program.equations if eqn.outputs[0].name.startswith("trunk/stack/"))
    assert [value.name for value in stack.operands] == ["layers/0/w"]
    assert_close(runs(rolled, jax.tree.leaves(arguments)), runs(traced, jax.tree.leaves(arguments)))


def test_a_forward_pass_alone_is_one_loop():
    def evaluate(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return x

    arguments = [jnp.eye(4) * k for k in range(1, 4)], jnp.ones((2, 4))
    traced = trace(evaluate, *arguments)
    rolled = roll(traced)
    (loop,) = loops(rolled.program)
    assert loop.params["length"] == 3
    assert_close(runs(rolled, jax.tree.leaves(arguments)), runs(traced, jax.tree.leaves(arguments)))


# -- refusals


def unlike(params, x):
    loss = lambda params: jnp.sum(functools.reduce(lambda x, w: jnp.tanh(x @ w), params, x))  # noqa: E731
    return jax.tree.map(jnp.subtract, params, jax.grad(loss)(params))


def test_layers_of_different_shapes_are_refused():
    weights = [jnp.ones(shape) for shape in ((2, 3), (3, 4), (4, 5))]
    with pytest.raises(RollError, match=r"no run of layers .*\n.*contractions; runs of alike layers: none\n.*make the"):
        roll(trace(unlike, weights, jnp.ones((2, 2))))


def test_one_layer_is_refused():
    with pytest.raises(RollError, match="no run of layers that are alike"):
        gpt(1)


def test_more_layers_than_there_are_are_refused():
    step, arguments = make(Chain(layers=3))
    with pytest.raises(RollError, match=r"no 4 layers .*\n.*: 3 of \d+ equations, 3 of \d+ equations"):
        roll(trace(step, *arguments), 4)


# -- what is saved


@st.composite
def units(draw: Any) -> tuple[Unit, frozenset[Any], frozenset[Any]]:
    """A unit of elementwise and other equations, what later loops want of it, and what is kept anyway."""
    n = draw(st.integers(1, 7))
    primitives = (jax.lax.sin_p, jax.lax.dot_general_p)
    equations, operands = [], []
    for i in range(n):
        sources = draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else []
        aval = jax.typeof(np.zeros(draw(st.integers(1, 9)), np.float32))
        inputs = tuple(equations[j].outputs[0] for j in sources)
        equations.append(Equation(draw(st.sampled_from(primitives)), inputs, (Value(f"v{i}", aval),), {}, f"v{i}"))
        operands.append(tuple(Inner((j, 0)) for j in sources) or (Constant(1.0, aval),))
    places = st.frozensets(st.integers(0, n - 1).map(lambda i: (i, 0)), max_size=4)
    unit = Unit((tuple(equations),) * 2, tuple(operands), (), (), frozenset())
    return unit, draw(places), draw(places)


@given(units())
def test_what_is_saved_is_the_least_that_the_rest_can_be_computed_from(case):
    unit, wanted, anyway = case
    found = least_saved(unit, wanted, anyway, ())
    assert anyway <= found.results and _suffice(unit, wanted, found.results)
    places = [(i, 0) for i in range(len(unit.operands))]
    subsets = (frozenset(s) | anyway for r in range(len(places) + 1) for s in itertools.combinations(places, r))
    least = min(_total(unit, kept) for kept in subsets if _suffice(unit, wanted, kept))
    assert _total(unit, found.results) == least


def _total(unit: Unit, kept: Any) -> int:
    return sum(nbytes(unit, place) for place in kept)


def _suffice(unit: Unit, wanted: Any, kept: Any) -> bool:
    def there(place: Any) -> bool:
        again = unit.copies[0][place[0]].primitive is jax.lax.sin_p
        return place in kept or (again and all(map(there, sources_of(unit, place))))

    return all(map(there, wanted))


# -- on a mesh


def test_a_rolled_step_is_predicted_to_cost_little_more():
    """Its loops move slices, not whole stacks; parameters are copied into their stacks, residuals are stored."""
    found = gpt(3, batch=64, width=512, heads=8, seq=256, vocab=1024, optimizer="sgd")
    plain, rolled = (plan_traced(each, 0.0, Options(mesh="data=8", hardware="v5e")).prediction for each in found)
    assert plain.compute_s < rolled.compute_s < 1.2 * plain.compute_s
    assert 1 < rolled.flops / plain.flops < 1.01
    assert rolled.peak_bytes + rolled.on_chip_bytes < 1.3 * (plain.peak_bytes + plain.on_chip_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=2,tensor=4"])
def test_a_rolled_gpt_is_planned_run_and_audited_like_any_program(mesh):
    config = {"batch": 8, "width": 32, "heads": 4, "vocab": 64, "seq": 16, "optimizer": "sgd"}
    traced, rolled = gpt(2, **config)
    options = Options(mesh=mesh, hardware="v5e")
    plan = plan_traced(rolled, 0.0, options)
    local = build_local_program(rolled.program, plan, options.cost_model(plan.mesh))
    devices = device_mesh(plan.mesh)
    places = shardings([slot.spec for slot in local.inputs], devices)
    from models import gpt as model

    _, state, batch = model.make(**(TEXT | {"layers": 2} | config))
    leaves = [*jax.tree.leaves((state, batch)), *rolled.program.constants]
    placed = [jax.device_put(leaf, place) for leaf, place in zip(leaves, places, strict=True)]
    compiled = lower(local, devices).lower(*placed).compile()
    found = audit(compiled, plan.mesh)
    assert all(each.explanation for each in compare(plan.prediction.collectives, found, plan.mesh))
    assert_close(compiled(*placed), runs(traced, jax.tree.leaves((state, batch))), rtol=1e-5)
