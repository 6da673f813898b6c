"""Steps as pure functions: static arguments bound, Flax NNX objects split into arrays and put back together.

``jax.make_jaxpr`` on a step that updates NNX objects drops the updates without a word, so they are made
explicit: the pure function takes the objects' arrays and returns their new values, and ``restore`` writes
them into the caller's objects.
"""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx


@dataclass(frozen=True)
class Adapted:
    """A step as a pure function.

    Attributes:
        function: the pure step.
        arguments: what to call it with.
        key: what the function depends on besides the arguments' shapes.
        restore: takes the function's result, updates the caller's objects, returns the step's own result.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    key: Hashable
    restore: Callable[[Any], Any]


def adapt(
    step: Callable[..., Any],
    args: Sequence[Any],
    static_argnums: Sequence[int] = (),
    keywords: Mapping[str, Any] | None = None,
) -> Adapted:
    """The pure form of ``step(*args, **keywords)``; the keyword arguments become one last argument, a dictionary.

    Args:
        step: a function of pytrees, or of NNX objects that it updates.
        args: its arguments.
        static_argnums: positions of hashable Python values that the step branches on.
        keywords: its keyword arguments.
    """
    if keywords:
        return adapt(
            functools.partial(_with_keywords, step),
            (*args, dict(keywords)),
            _positive(static_argnums, len(args)),
        )
    positions = set(_positive(static_argnums, len(args)))
    static = {i: args[i] for i in positions}
    dynamic = tuple(arg for i, arg in enumerate(args) if i not in positions)

    def bound(*dynamic: Any) -> Any:
        rest = iter(dynamic)
        return step(*(static[i] if i in static else next(rest) for i in range(len(args))))

    function = bound if static else step
    key = tuple(sorted(static.items()))
    if not any(has_objects(arg) for arg in dynamic):
        return Adapted(function, dynamic, key, lambda result: result)
    return _adapt_objects(function, dynamic, key)


def _with_keywords(step: Callable[..., Any], *args: Any) -> Any:
    return step(*args[:-1], **args[-1])


def _positive(positions: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(i % count for i in positions) if count else ()


def has_objects(tree: Any) -> bool:
    """Whether a pytree holds NNX objects, which updates change in place."""
    is_object = lambda leaf: isinstance(leaf, (nnx.Module, nnx.Optimizer, nnx.Variable, nnx.Rngs))  # noqa: E731
    return any(is_object(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_object))


def _adapt_objects(function: Callable[..., Any], args: tuple[Any, ...], key: Hashable) -> Adapted:
    objects = [arg if has_objects(arg) else None for arg in args]
    graph, state = nnx.split(objects)
    others = tuple(arg for arg, held in zip(args, objects, strict=True) if held is None)

    def pure(state: Any, *others: Any) -> tuple[Any, Any]:
        merged, rest = nnx.merge(graph, state), iter(others)
        result = function(*(next(rest) if held is None else held for held in merged))
        return nnx.state(merged), result

    def restore(result: Any) -> Any:
        new_state, value = result
        nnx.update(objects, new_state)
        return value

    return Adapted(pure, (state, *others), (key, graph), restore)
