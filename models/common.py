"""What every model here shares: settings, optimizers, the train state, and how state and batch are made.

A model's file holds a `Config`, a Flax module, `init(config, key) -> state`, `train_step(state, batch)` and
`make(**settings) -> (train_step, state, batch)`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

VOCAB_MULTIPLE = 128
"""Embedding tables are padded to a multiple of this many rows, so that they split over up to 128 devices."""

PRECISIONS = {"float32": jnp.float32, "bf16": jnp.bfloat16}
"""The type that matmuls are computed in; parameters and optimizer state are float32 in both."""

JIT_ONCE = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles what runs once, like initialization: compiling that well takes longer than running it badly."""

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of every model. `learning_rate=None` takes the usual peak rate of the optimizer.

    `warmup_steps` and `decay_steps` shape the warmup-cosine schedule; `accumulate` steps make one update
    (`optax.MultiSteps`); `abstract` makes shapes (`jax.ShapeDtypeStruct`) instead of arrays.
    """

    batch: int = 16
    dropout: float = 0.1
    optimizer: str = "adamw"
    learning_rate: float | None = None
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    warmup_steps: int = 10
    decay_steps: int = 1000
    accumulate: int = 1
    precision: str = "float32"
    seed: int = dataclasses.field(default=0, compare=False)
    abstract: bool = dataclasses.field(default=False, compare=False)

    def __post_init__(self) -> None:
        _check_known("optimizer", self.optimizer, OPTIMIZERS)
        _check_known("precision", self.precision, PRECISIONS)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not a share; to fix: set 0 <= dropout < 1")

    @property
    def dtype(self) -> Any:
        """The type that the model computes in."""
        return PRECISIONS[self.precision]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerSettings(Settings):
    """Adds the size of a transformer over text. The embedding table has `padded_vocab` rows."""

    layers: int = 2
    width: int = 256
    heads: int = 8
    vocab: int = 512
    seq: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides("heads", self.heads, "width", self.width)

    @property
    def padded_vocab(self) -> int:
        """`vocab` rounded up to a multiple of `VOCAB_MULTIPLE`."""
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


Config = TypeVar("Config", bound=Settings)


def configure(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """Settings as a `kind`, or a `TypeError` that names the valid ones or the expected type."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in settings.items():
        if name not in fields:
            raise TypeError(f"unknown setting {name!r}; to fix: use one of {', '.join(sorted(fields))}")
        _check_type(name, value, fields[name].default)
    return kind(**settings)


def check_divides(small_name: str, small: int, large_name: str, large: int) -> None:
    """Raise a `ValueError` unless `small` divides `large`."""
    if small < 1 or large % small:
        raise ValueError(
            f"{large_name}={large} is not a multiple of {small_name}={small}; "
            f"to fix: set {small_name} to a divisor of {large}"
        )


def _check_known(name: str, value: str, table: Mapping[str, Any]) -> None:
    if value not in table:
        raise ValueError(f"unknown {name} {value!r}; to fix: use one of {', '.join(sorted(table))}")


def _check_type(name: str, value: Any, default: Any) -> None:
    if default is None or default is dataclasses.MISSING:
        return
    allowed = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, allowed) or isinstance(value, bool) != isinstance(default, bool):
        expected = type(default).__name__
        raise TypeError(f"setting {name}={value!r} is not {expected}; to fix: give a value like {default!r}")


# ---- optimizers


def _matrices(params: PyTree) -> PyTree:
    """Weight decay applies to matrices, not to biases and norm scales."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _adafactor(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax.adafactor(rate, weight_decay_rate=decay * 1e-3, weight_decay_mask=_matrices)


def _sgd(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay * 1e-3, _matrices), optax.sgd(rate, momentum=0.9, nesterov=True))


OPTIMIZERS: Mapping[str, tuple[float, Callable[[optax.Schedule, float], optax.GradientTransformation]]] = {
    "adamw": (1e-3, lambda rate, decay: optax.adamw(rate, b2=0.95, weight_decay=decay, mask=_matrices)),
    "adafactor": (1e-2, _adafactor),
    "lion": (3e-4, lambda rate, decay: optax.lion(rate, weight_decay=decay, mask=_matrices)),
    "lamb": (1e-2, lambda rate, decay: optax.lamb(rate, weight_decay=decay, mask=_matrices)),
    "rmsprop": (1e-3, lambda rate, decay: optax.rmsprop(rate, decay=0.95)),
    "sgd": (1e-1, _sgd),
}
"""Name -> (usual peak learning rate, maker)."""


@functools.cache
def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Global-norm clipping, then the named optimizer on a warmup-cosine schedule, every `accumulate` steps.

    The same settings give the same object: states of shapes and states of arrays have equal tree structures.
    """
    usual_rate, maker = OPTIMIZERS[settings.optimizer]
    peak = usual_rate if settings.learning_rate is None else settings.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=peak / 10,
        peak_value=peak,
        warmup_steps=settings.warmup_steps,
        decay_steps=settings.decay_steps,
        end_value=peak / 10,
    )
    tx = optax.chain(optax.clip_by_global_norm(settings.clip_norm), maker(schedule, settings.weight_decay))
    if settings.accumulate > 1:
        return optax.MultiSteps(tx, settings.accumulate).gradient_transformation()
    return tx


# ---- state


class TrainState(train_state.TrainState):
    """Flax's train state, with a dropout key and, for models with batch norm, running statistics."""

    dropout_key: jax.Array
    batch_stats: PyTree = None

    def step_key(self) -> jax.Array:
        """A fresh dropout key for this step."""
        return jax.random.fold_in(self.dropout_key, self.step)


@functools.cache
def _apply(module_type: type[nn.Module], config: Settings) -> Callable[..., Any]:
    """One function per configuration, for the reason given in `make_optimizer`."""
    return module_type(config).apply  # type: ignore[call-arg]


def init_state(module_type: type[nn.Module], config: Settings, key: jax.Array, *inputs: jax.Array) -> TrainState:
    """The train state of `module_type(config)`, called on `inputs`; pure in `key`."""
    params_key, dropout_key = jax.random.split(key)
    model = module_type(config)  # type: ignore[call-arg]
    variables = model.init(params_key, *inputs, train=False)
    state = TrainState.create(
        apply_fn=_apply(module_type, config),
        params=variables["params"],
        tx=make_optimizer(config),
        dropout_key=dropout_key,
        batch_stats=variables.get("batch_stats"),
    )
    return state.replace(step=jnp.zeros((), jnp.int32))  # Flax starts from a Python int, which is not an array


def make_state_and_batch(
    config: Settings,
    init: Callable[[Any, jax.Array], PyTree],
    sample: Callable[[jax.Array], PyTree],
    *,
    jit: Callable[..., Any] = JIT_ONCE,
    eval_shape: Callable[..., Any] = jax.eval_shape,
) -> tuple[PyTree, PyTree]:
    """`init(config, key)` and `sample(key)` from the seed: as arrays, or as shapes if `config.abstract`.

    `jit` and `eval_shape` must know the kind of state: JAX's know pytrees, Flax NNX's also its objects.
    """

    def both() -> tuple[PyTree, PyTree]:
        state_key, batch_key = jax.random.split(jax.random.key(config.seed))
        return init(config, state_key), sample(batch_key)

    return eval_shape(both) if config.abstract else jit(both)()


def token_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy in nats per token, float32, of logits (..., vocab) and targets (...)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
