"""The models: made of shapes alone, trained on real data, steered by settings."""

import ast
import functools
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models import gpt, gpt_nnx, llama, moe, transformer, vit
from models.common import JIT_ONCE, OPTIMIZERS, Settings, make_optimizer

TEXT: dict[str, Any] = {"layers": 1, "width": 64, "heads": 8, "vocab": 256, "seq": 32, "batch": 8}
TINY: dict[str, dict[str, Any]] = {
    "mlp": {"layers": 1, "width": 64, "batch": 32},
    "gpt": TEXT,
    "gpt_nnx": TEXT,
    "llama": TEXT,
    "bert": {**TEXT, "vocab": 512},
    "vit": {"layers": 1, "width": 64, "heads": 8, "image": 16, "batch": 16},
    "moe": {**TEXT, "layers": 2, "experts": 4},
    "wide_resnet": {"layers": 1, "width": 8, "image": 8, "batch": 16},
    "unet": {"layers": 1, "width": 8, "image": 8, "batch": 16},
}
LARGE_TEXT = {"layers": 2, "width": 8192, "heads": 64, "vocab": 50257, "seq": 2048, "batch": 1024}
LARGE: dict[str, dict[str, Any]] = {
    "mlp": {"layers": 4, "width": 65536, "batch": 4096},
    "gpt": LARGE_TEXT,
    "gpt_nnx": LARGE_TEXT,
    "llama": {
        "layers": 2,
        "width": 4096,
        "heads": 32,
        "vocab": 128256,
        "seq": 8192,
        "batch": 64,
        "remat": True,
    },
    "bert": LARGE_TEXT,
    "vit": {"layers": 2, "width": 8192, "heads": 64, "image": 256, "patch": 16, "batch": 4096},
    "moe": {**LARGE_TEXT, "experts": 512},
    "wide_resnet": {"layers": 1, "width": 2048, "image": 64, "batch": 1024},
    "unet": {"layers": 1, "width": 2048, "image": 64, "batch": 1024},
}
CASES = [pytest.param(name, id=name) for name in TINY]
SLOW = {"unet", "vit", "llama"}  # seconds of compilation, for what the others mostly cover
COMPILED = [  # gpt_nnx has a test of its own
    pytest.param(name, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name in TINY if name != "gpt_nnx"
]


def make(name: str, **settings: Any) -> Any:
    return importlib.import_module(f"models.{name}").make(**settings)


def pure(name: str, step: Any, state: Any) -> tuple[Any, Any]:
    """The step as `(state, batch) -> (state, metrics)` on pytrees, whatever the Flax interface."""
    if name != "gpt_nnx":
        return step, state
    graph, leaves = nnx.split(state)

    def pure_step(leaves: Any, batch: Any) -> Any:
        objects = nnx.merge(graph, leaves)
        metrics = step(objects, batch)
        return nnx.state(objects), metrics

    return pure_step, leaves


@functools.cache
def made(name: str) -> Any:
    """The pure step, the real state and the batch of a tiny model, made once."""
    step, state, batch = make(name, **TINY[name])
    return *pure(name, step, state), batch


def losses(step: Any, state: Any, batch: Any, steps: int) -> list[float]:
    compiled, found = JIT_ONCE(step), []
    for _ in range(steps):
        state, metrics = compiled(state, batch)
        found.append(float(metrics["loss"]))
    return found


@functools.cache
def losses_of(name: str) -> list[float]:
    return losses(*made(name), steps=20)


def first_loss(name: str, **settings: Any) -> float:
    return losses(*make(name, **{**TINY[name], **settings}), steps=1)[0]


def leaf_bytes(tree: Any) -> int:
    keys_are_small = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in keys_are_small)


@pytest.mark.parametrize("name", CASES)
def test_a_large_step_is_traced_without_making_an_array(name: str) -> None:
    before = {id(array) for array in jax.live_arrays()}
    step, state, batch = make(name, abstract=True, **LARGE[name])
    step, state = pure(name, step, state)
    jaxpr = jax.make_jaxpr(step)(state, batch)
    made = [array for array in jax.live_arrays() if id(array) not in before]
    assert jaxpr.eqns
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((state, batch)))
    assert leaf_bytes(state) > 1e9
    assert sum(array.nbytes for array in made) < 1e6


def test_a_gpt_of_forty_billion_parameters_is_made_of_shapes() -> None:
    _, state, _ = make("gpt", abstract=True, **{**LARGE_TEXT, "layers": 48})
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == pytest.approx(39e9, rel=0.02)


def test_llama_has_the_size_of_llama_3_8b() -> None:
    settings = {"layers": 32, "width": 4096, "heads": 32, "vocab": 128256, "seq": 128, "batch": 1}
    _, state, _ = make("llama", abstract=True, **settings)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 8_030_261_248


@pytest.mark.parametrize("name", COMPILED)
def test_the_loss_falls(name: str) -> None:
    found = losses_of(name)
    assert np.isfinite(found).all()
    assert np.mean(found[-3:]) < 0.9 * found[0]


@pytest.mark.parametrize("name", COMPILED)
def test_shapes_and_arrays_are_the_same_tree(name: str) -> None:
    step, shapes, batch_shapes = make(name, abstract=True, **TINY[name])
    _, shapes = pure(name, step, shapes)
    _, arrays, batch = made(name)
    assert jax.tree.structure((shapes, batch_shapes)) == jax.tree.structure((arrays, batch))
    for shape, array in zip(jax.tree.leaves((shapes, batch_shapes)), jax.tree.leaves((arrays, batch)), strict=True):
        assert (shape.shape, shape.dtype, shape.weak_type) == (
            array.aval.shape,
            array.dtype,
            array.aval.weak_type,
        )


@pytest.mark.parametrize("name", CASES)
def test_the_state_keeps_its_types_through_a_step(name: str) -> None:
    step, state, batch = make(name, abstract=True, **TINY[name])
    step, state = pure(name, step, state)
    after = jax.eval_shape(step, state, batch)[0]
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)


def test_a_seed_gives_one_run_and_another_seed_another() -> None:
    assert first_loss("mlp") == losses_of("mlp")[0]
    assert first_loss("mlp", seed=1) != losses_of("mlp")[0]


@pytest.mark.parametrize(("rate", "changes"), [(0.1, True), (0.0, False)])
def test_dropout_follows_the_key_in_the_state(rate: float, changes: bool) -> None:
    step, state, batch = make("mlp", dropout=rate, **TINY["mlp"])
    compiled = JIT_ONCE(step)
    loss = compiled(state, batch)[1]["loss"]
    other_key = compiled(state.replace(dropout_key=jax.random.key(7)), batch)[1]["loss"]
    other_step = compiled(state.replace(step=state.step + 1), batch)[1]["loss"]
    assert (other_key != loss, other_step != loss) == (changes, changes)


def test_bf16_is_close_to_float32_and_keeps_float32_parameters() -> None:
    _, state, batch = made("gpt")
    _, half_state, _ = make("gpt", abstract=True, precision="bf16", **TINY["gpt"])
    assert {leaf.dtype for leaf in jax.tree.leaves(half_state.params)} == {jnp.dtype("float32")}
    full, half = (
        JIT_ONCE(functools.partial(apply, train=False))({"params": state.params}, batch["inputs"])
        for apply in (state.apply_fn, half_state.apply_fn)
    )
    assert 0 < jnp.abs(full - half).max() < 0.05 * jnp.abs(full).max()


@pytest.mark.parametrize("name", CASES)
def test_bf16_computes_the_matmuls_in_bf16(name: str) -> None:
    step, state, batch = make(name, abstract=True, precision="bf16", **TINY[name])
    step, state = pure(name, step, state)
    text = str(jax.make_jaxpr(step)(state, batch))
    heavy = [line for line in text.splitlines() if " dot_general[" in line or " conv_general_dilated[" in line]
    share = sum(":bf16[" in line for line in heavy) / len(heavy)
    assert share > 0.7  # the router of moe and the attention scores of the rest may stay float32


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_every_optimizer_fits_a_line(optimizer: str) -> None:
    tx = make_optimizer(Settings(optimizer=optimizer))
    inputs = jax.random.normal(jax.random.key(0), (32, 8))

    def loss_fn(params: Any) -> jax.Array:
        return jnp.mean((inputs @ params["kernel"] + params["bias"] - 2 * inputs) ** 2)

    @JIT_ONCE
    def train(params: Any) -> jax.Array:
        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, tx.init(params)), length=300)[1]

    found = train({"kernel": 0.1 * jnp.eye(8), "bias": jnp.ones(8)})
    assert found[-1] < 0.9 * found[0]


def test_accumulated_gradients_update_every_second_step() -> None:
    step, state, batch = make("mlp", accumulate=2, **TINY["mlp"])
    compiled = JIT_ONCE(step)
    kernels = [state.params["head"]["kernel"]]
    for _ in range(2):
        state, _ = compiled(state, batch)
        kernels.append(state.params["head"]["kernel"])
    assert (kernels[0] == kernels[1]).all()
    assert not (kernels[1] == kernels[2]).all()


def test_the_common_settings_reach_the_model() -> None:
    settings = {"layers": 3, "width": 32, "heads": 4, "vocab": 300, "seq": 16, "batch": 4}
    for name in ("gpt", "llama", "bert", "moe"):
        _, state, batch = make(name, abstract=True, **settings)
        assert state.params["embed"]["embedding"].shape == (384, 32)  # 300 padded to a multiple of 128
        assert batch["inputs"].shape == (4, 16)
        assert {key for key in state.params if key.startswith("h_")} == {"h_0", "h_1", "h_2"}
        assert 4 in state.params["h_0"]["attn"]["query"]["kernel"].shape


@pytest.mark.parametrize(("capacity", "places"), [(1.0, 16), (1.25, 20), (100.0, 32)])
def test_capacity_and_experts_reach_the_mixture(capacity: float, places: int) -> None:
    config = moe.Config(**TINY["moe"], capacity=capacity)
    assert config.expert_tokens == places
    _, state, _ = make("moe", abstract=True, capacity=capacity, **TINY["moe"])
    assert "experts" not in state.params["h_0"]
    assert state.params["h_1"]["experts"]["up"].shape == (4, 64, 256)


def test_untied_embeddings_have_a_head() -> None:
    assert "head" in make("gpt", abstract=True, tied=False, **TEXT)[1].params
    assert "head" not in make("gpt", abstract=True, **TEXT)[1].params


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_remat_keeps_a_region_to_recompute(name: str) -> None:
    step, state, batch = make(name, abstract=True, remat=True, **TEXT)
    assert any(eqn.primitive.name == "remat2" for eqn in jax.make_jaxpr(step)(state, batch).eqns)


@pytest.mark.slow
def test_remat_changes_no_loss() -> None:
    assert first_loss("gpt", remat=True) == pytest.approx(losses_of("gpt")[0], rel=1e-6)


MISTAKES = {
    "unknown": ({"depth": 4}, TypeError, "unknown setting 'depth'.*to fix: use one of .*layers.*width"),
    "not an int": ({"layers": "4"}, TypeError, "setting layers='4' is not int"),
    "not a bool": ({"tied": "false"}, TypeError, "setting tied='false' is not bool"),
    "optimizer": ({"optimizer": "adamx"}, ValueError, "unknown optimizer 'adamx'.*adamw"),
    "precision": ({"precision": "f8"}, ValueError, "unknown precision 'f8'.*bf16, float32"),
    "heads": ({"heads": 7}, ValueError, "width=256 is not a multiple of heads=7"),
    "dropout": ({"dropout": 1.5}, ValueError, "dropout=1.5 is not a share"),
}


@pytest.mark.parametrize(("settings", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_setting_is_named(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make("gpt", abstract=True, **settings)


def test_other_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="heads=6 is not a multiple of kv_heads=4"):
        make("llama", abstract=True, heads=6, kv_heads=4, width=48)
    with pytest.raises(ValueError, match="batch x seq=256 is not a multiple of groups=3"):
        make("moe", abstract=True, groups=3, batch=8, seq=32)
    with pytest.raises(ValueError, match="image=12 is not a multiple of 8 pixels"):
        make("vit", abstract=True, image=12)


def test_nnx_updates_the_objects_of_the_caller_and_its_loss_falls() -> None:
    step, (model, optimizer), batch = gpt_nnx.make(**TEXT)
    kernel = jnp.array(model.layers[0].up.kernel[...])
    compiled = nnx.jit(step)
    found = [float(compiled((model, optimizer), batch)["loss"]) for _ in range(20)]
    assert found[-1] < 0.9 * found[0]
    assert int(optimizer.step[...]) == 20
    assert not (model.layers[0].up.kernel[...] == kernel).all()


def test_nnx_and_linen_compute_the_same_gpt() -> None:
    _, (model, _), batch = gpt_nnx.make(**{**TEXT, "dropout": 0.0})
    graph, state = nnx.split(model)
    weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    layers = weights.pop("layers")
    for number, layer in layers.items():
        feed_forward = {"up": layer.pop("up"), "down": layer.pop("down")}
        weights[f"h_{number}"] = {**layer, "mlp": feed_forward}
    linen = gpt.GPT(gpt.Config(**{**TEXT, "dropout": 0.0}))
    expected = JIT_ONCE(lambda tokens: linen.apply({"params": weights}, tokens, train=True))(batch["inputs"])
    found = JIT_ONCE(lambda tokens: nnx.merge(graph, state)(tokens))(batch["inputs"])
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "causal"), [("gpt", True), ("llama", True), ("bert", False)])
def test_a_decoder_does_not_look_ahead_and_an_encoder_does(name: str, causal: bool) -> None:
    _, state, _ = made(name)
    last_changed = jnp.zeros((2, TEXT["seq"]), jnp.int32).at[1, -1].set(5)
    logits = JIT_ONCE(functools.partial(state.apply_fn, train=False))({"params": state.params}, last_changed)
    assert bool(jnp.allclose(logits[0, :-1], logits[1, :-1], atol=1e-6)) == causal


def test_rotary_scores_depend_on_distance_only() -> None:
    def scores(key: jax.Array) -> jax.Array:
        query_and_key = jnp.broadcast_to(jax.random.normal(key, (2, 1, 1, 1, 16)), (2, 1, 10, 1, 16))
        return jnp.einsum("bqnk,btnk->qt", *map(llama.rotate, query_and_key))

    found = np.asarray(JIT_ONCE(scores)(jax.random.key(0)))
    for distance in range(-9, 10):
        diagonal = np.diagonal(found, distance)
        np.testing.assert_allclose(diagonal, np.full_like(diagonal, diagonal[0]), rtol=1e-4, atol=1e-4)
    assert np.ptp(found) > 1


def test_patches_are_cut_out_of_the_image() -> None:
    images = jnp.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    cut = vit.patches(images, 4)
    assert cut.shape == (2, 4, 48)
    for number, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        expected = images[:, row : row + 4, column : column + 4].reshape(2, 48)
        np.testing.assert_array_equal(cut[:, number], expected)


def slow_route(gates: np.ndarray, capacity: int) -> np.ndarray:
    """Algorithm 1 of GShard as its two loops over tokens."""
    groups, tokens, experts = gates.shape
    combine = np.zeros((groups, tokens, experts, capacity))
    order = np.argsort(-gates, axis=-1, kind="stable")
    for g in range(groups):
        load = [0] * experts
        for choice in (0, 1):
            for s in range(tokens):
                expert, pair = order[g, s, choice], gates[g, s, order[g, s, :2]]
                if load[expert] < capacity:
                    combine[g, s, expert, load[expert]] = gates[g, s, expert] / pair.sum()
                load[expert] += 1
    return combine


@pytest.mark.parametrize("capacity", [1, 3, 7, 24])
def test_routing_is_gshards_algorithm_1(capacity: int) -> None:
    gates = jax.nn.softmax(jax.random.normal(jax.random.key(capacity), (3, 24, 5)))
    combine, balance = JIT_ONCE(moe.route, static_argnums=1)(gates, capacity)
    np.testing.assert_allclose(combine, slow_route(np.asarray(gates), capacity), atol=1e-6)
    first_share = np.stack([np.bincount(row, minlength=5) / 24 for row in np.asarray(gates.argmax(-1))])
    assert balance == pytest.approx(5 * (first_share * np.asarray(gates).mean(1)).sum(-1).mean(), rel=1e-5)


def test_an_even_load_has_balance_one() -> None:
    gates = jnp.eye(4)[None] * 0.97 + 0.01 * (1 - jnp.eye(4)[None])
    assert moe.route(gates, 4)[1] == pytest.approx(1.0)


def test_no_model_imports_autopar() -> None:
    for path in Path(transformer.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "autopar" for name in names), path.name
