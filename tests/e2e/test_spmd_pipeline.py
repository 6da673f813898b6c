"""Scans over layers as pipelines on eight CPU devices: exact, and with the collectives that the plan says."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import autopar
from autopar.cluster import Mesh
from autopar.cost import RooflineCost, hardware
from autopar.errors import MicrobatchError
from autopar.lowering.audit import audit, compare
from autopar.plan import Plan
from tests.e2e import beside

LAYERS, WIDTH, HEADS, SEQ, VOCAB, BATCH = 4, 32, 4, 16, 64, 16


class Block(nn.Module):
    """A transformer layer as ``nn.scan`` wants it: carry in, carry and nothing out."""

    dropout: float

    @nn.compact
    def __call__(self, x: Any, mask: Any) -> Any:
        drop = functools.partial(nn.Dropout, self.dropout, deterministic=False)
        h = nn.LayerNorm(name="norm_1")(x)
        heads = nn.DenseGeneral((3, HEADS, WIDTH // HEADS), name="qkv")(h)
        q, k, v = (heads[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(WIDTH // HEADS)
        weights = drop()(jax.nn.softmax(jnp.where(mask, scores, -1e9)))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(mixed)
        h = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm(name="norm_2")(x)))
        return x + drop()(nn.Dense(WIDTH, name="down")(h)), None


class GPT(nn.Module):
    """A language model whose layers are stacked."""

    dropout: float
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        table = nn.Embed(VOCAB, WIDTH, name="embed")
        x = table(tokens) + self.param("position", nn.initializers.normal(0.02), (SEQ, WIDTH))
        mask = nn.make_causal_mask(tokens) > 0
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # type: ignore[arg-type]
            length=LAYERS,
        )
        x, _ = layers(self.dropout, name="layers")(x, mask)
        return table.attend(nn.LayerNorm(name="norm")(x))


def train_step(state: Any, batch: Any) -> Any:
    def loss_of(params: Any) -> Any:
        logits = state.apply_fn({"params": params}, batch["tokens"][:, :-1], rngs={"dropout": batch["key"]})
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
        weights = (batch["tokens"][:, 1:] > 3).astype(jnp.float32)
        return (losses * weights).sum() / weights.sum()

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=gradients), loss


EXPERTS: dict[str, Any] = {
    "layers": 4, "width": 32, "heads": 4, "vocab": 64, "seq": 16, "batch": 16, "experts": 4, "optimizer": "sgd"
}  # fmt: skip
QUICKLY: Any = {"xla_backend_optimization_level": 0}


@functools.cache
def made(dropout: float = 0.1, remat: bool = False) -> Any:
    model = GPT(dropout, remat)
    tokens = jnp.zeros((BATCH, SEQ), jnp.int32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, keys, tokens)["params"]
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(WIDTH), x.dtype), shapes)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)


@functools.cache
def batches(n: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [
        {"tokens": jnp.asarray(rng.integers(0, VOCAB, (BATCH, SEQ + 1)), jnp.int32), "key": jax.random.key(i)}
        for i in range(n)
    ]


@functools.cache
def reference(dropout: float = 0.1, remat: bool = False, steps: int = 5) -> list[float]:
    state, losses = made(dropout, remat), []
    step = jax.jit(train_step).lower(state, batches(1)[0]).compile(compiler_options=QUICKLY)
    for batch in batches(steps):
        state, loss = step(state, batch)
        losses.append(float(loss))
    return losses


def trained(compiled: Any, steps: int = 5, **settings: Any) -> tuple[list[float], Any]:
    """The losses of a parallel step, and what the compiler made of it."""
    function, (state, losses) = compiled.function, (made(**settings), [])
    for batch in batches(steps):
        placed = compiled.place(jax.tree.leaves((state, batch)))
        if function is compiled.function:
            function = function.lower(*placed, *compiled.constants).compile(compiler_options=QUICKLY)
        state, loss = jax.tree.unflatten(compiled.traced.out_tree, function(*placed, *compiled.constants))
        losses.append(float(loss))
    return losses, audit(function, compiled.plan.mesh)


SLOW = pytest.mark.slow
REMAT = {"dropout": 0.0, "remat": True}


@pytest.mark.parametrize(
    ("mesh", "options", "model"),
    [
        ("pipe=2,data=2", {}, {}),
        pytest.param("pipe=2", {}, REMAT, marks=SLOW),
        pytest.param("pipe=4", {"microbatches": 8}, {}, marks=SLOW),
        pytest.param("pipe=2,tensor=2", {}, {}, marks=SLOW),
        pytest.param("pipe=2,data=2,tensor=2", {}, {}, marks=SLOW),
        pytest.param("data=2,pipe=2", {"rounds": 2}, {}, marks=SLOW),
    ],
    ids=str,
)
def test_five_steps_of_a_pipeline_equal_one_device(mesh: str, options: dict[str, Any], model: dict[str, Any]):
    step = autopar.parallelize(train_step, **{"mesh": mesh, "hardware": "cpu", "microbatches": 4} | options)
    compiled = step.compiled(made(**model), batches(1)[0])
    losses, built = trained(compiled, **model)
    np.testing.assert_allclose(losses, reference(**model), rtol=1e-5)
    predicted = compiled.plan.prediction
    differences = compare(predicted.collectives, built, compiled.plan.mesh)
    assert [found for found in differences if not found.explanation] == []
    assert any(c.kind == "collective_permute" and c.axes == ("pipe",) for c in predicted.collectives)
    assert predicted.peak_bytes == pytest.approx(built.peak_bytes, rel=0.3)
    assert predicted.flops == pytest.approx(built.flops, rel=0.25)
    layers = {name: dims for name, dims in compiled.plan.params.items() if name.startswith("params/layers/")}
    if "rounds" not in options:  # else the layers of a stage are not neighbours: they are moved every step
        assert all("pipe" in dims[0] for dims in layers.values()), "every device keeps the layers of its stages only"


def test_stages_go_with_experts_on_an_axis_of_their_own(slow: str):
    """Layers are rolled in pairs, of which the second has the experts; both are pinned to stages and experts."""
    step, state, batch = beside.made("moe", **EXPERTS)
    options = {"mesh": "pipe=2,data=2,expert=2", "microbatches": 2, "hardware": slow}
    train: Any = autopar.parallelize(step, pins=[("params.*experts/(up|down)$", "expert,,")], **options)
    predicted = train.plan(state, batch).prediction
    assert {c.kind for c in predicted.collectives if "expert" in c.axes} >= {"all_to_all"}
    assert any(c.kind == "collective_permute" and c.axes == ("pipe",) for c in predicted.collectives)
    beside.assert_trains_as_one_device_does(train, 3, "moe", **EXPERTS)


def mlp_step(params: Any, batch: Any) -> Any:
    def loss(params: Any) -> Any:
        layer = lambda x, w: (x + jnp.tanh(x @ w["up"]) @ w["down"], None)  # noqa: E731
        x, _ = jax.lax.scan(layer, batch["x"], params)
        return jnp.mean((x - batch["y"]) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value


def mlp_arguments(layers: int = 4, width: int = 16, rows: int = 32) -> Any:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)  # noqa: E731
    params = {"up": normal(layers, width, 4 * width), "down": normal(layers, 4 * width, width)}
    return params, {"x": normal(rows, width), "y": normal(rows, width)}


def test_the_plan_of_a_pipeline_survives_json_and_runs():
    args = mlp_arguments()
    plan = autopar.plan(mlp_step, *args, mesh="pipe=2,data=2", hardware="cpu", microbatches=4, rounds=2)
    assert (plan.splitting.stages, plan.splitting.microbatches, plan.splitting.rounds) == (2, 4, 2)
    read = Plan.from_json(plan.to_json())
    assert read == plan and "pipeline of 2 stages, 2 rounds" in str(read)
    new, loss = autopar.compile(mlp_step, read, donate=False)(*args)
    want, want_loss = mlp_step(*args)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new, want)


def test_the_number_of_microbatches_is_searched_where_none_is_given():
    plan = autopar.plan(mlp_step, *mlp_arguments(), mesh="pipe=2", hardware="v5p")
    assert plan.splitting.stages == 2 and plan.splitting.microbatches in (2, 4, 8, 16, 32)


def test_a_shift_is_priced_as_a_permute_of_one_stage():
    plan = autopar.plan(mlp_step, *mlp_arguments(), mesh="pipe=2", hardware="v5p", microbatches=4)
    (sent,) = [c for c in plan.prediction.collectives if c.kind == "collective_permute"]
    ticks, row_bytes = 4 + 2 - 1, 16 * 4
    assert (sent.axes, sent.count, sent.nbytes) == (("pipe",), 2 * ticks, 2 * ticks * 32 // 4 * row_bytes)
    cost = RooflineCost(hardware("v5p"), Mesh.parse("pipe=2"))
    once_s = cost.collective_s("collective_permute", 32 // 4 * row_bytes, ("pipe",))
    assert once_s > 0 and plan.prediction.communication_s >= 2 * ticks * once_s
    assert plan.prediction.compute_s > 0


def test_layers_written_out_one_by_one_are_rolled_first():
    def step(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            x = batch["x"] @ params["in"]
            for w in params["layers"]:
                x = x + jnp.tanh(x @ w["up"]) @ w["down"]
            return jnp.mean((x - batch["y"]) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    stacked, batch = mlp_arguments()
    layers = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(4)]
    params = {"in": jnp.eye(16), "layers": layers}
    parallel = autopar.parallelize(step, mesh="pipe=2", hardware="cpu", microbatches=4, donate=False)
    new, loss = parallel(params, batch)
    want, want_loss = step(params, batch)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "pipe=3,data=1", "microbatches": 4}, "3 stages do not divide the 4 layers"),
        ({"mesh": "pipe=3"}, "3 stages do not divide the 4 layers"),
        ({"mesh": "pipe=2", "microbatches": 5}, "5 microbatches do not divide the batch of 32"),
        ({"mesh": "pipe=2", "microbatches": 4, "rounds": 3}, "2 stages in 3 rounds do not divide the 4 layers"),
        ({"mesh": "data=2", "rounds": 2}, "rounds=2 of a pipeline on mesh data=2"),
    ],
    ids=str,
)
def test_numbers_that_a_pipeline_cannot_take_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(MicrobatchError, match=message):
        autopar.plan(mlp_step, *mlp_arguments(), hardware="cpu", **options)


def test_megatron_on_three_axes_is_three_dimensional_parallelism():
    args = mlp_arguments(4, 64, 256)
    options = {"mesh": "pipe=2,data=2,tensor=2", "hardware": "v5p", "microbatches": 4}
    plan = autopar.plan(mlp_step, *args, preset="megatron", **options)
    assert plan.params == {"up": (("pipe",), (), ("tensor",)), "down": (("pipe",), ("tensor",), ())}
    counts = {(c.kind, c.axes): c.count for c in plan.prediction.collectives}
    ticks = 4 + 2 - 1
    assert counts["collective_permute", ("pipe",)] == 2 * ticks
    assert counts["all_reduce", ("tensor",)] == 2 * 2 * ticks, "forward and backward of two layers in every tick"
    assert counts["all_reduce", ("data",)] == 2, "gradients are reduced once a step"
