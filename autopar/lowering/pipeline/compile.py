"""Compiles the pieces of a stage on the stage's own devices."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from autopar.ir.program import Value
from autopar.ir.stages import Tag
from autopar.lowering.instructions import Slot
from autopar.lowering.pipeline.parts import Piece, StageParts
from autopar.lowering.processes import absent, is_here, one_at_a_time
from autopar.lowering.spmd import partition_spec, run_instructions
from autopar.lowering.time.phased import COMBINE, neutral


def slot_sharding(slot: Slot, mesh: jax.sharding.Mesh) -> NamedSharding:
    """Where a slot lives; a partial one has a dimension in front for the devices that hold its terms."""
    return NamedSharding(mesh, _slot_spec(slot, mesh))


def _slot_spec(slot: Slot, mesh: jax.sharding.Mesh) -> PartitionSpec:
    partial = tuple(axis for axis in mesh.axis_names if axis in slot.spec.partial)
    spec = partition_spec(slot.spec.complete)
    return PartitionSpec(partial, *spec) if partial else spec


def slot_shape(slot: Slot, mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    """The shape of the array that stands for a slot between pieces."""
    terms = [mesh.shape[axis] for axis in slot.spec.partial]
    return (functools.reduce(int.__mul__, terms), *slot.value.shape) if terms else tuple(slot.value.shape)


@dataclass(frozen=True, eq=False)
class CompiledPiece:
    """A piece on its devices.

    Attributes:
        piece: what it runs.
        function: flat inputs, then running sums -> flat outputs (running sums in the place of the terms); it runs
            nothing, and its outputs have no blocks, where none of the devices belongs to this process.
        donated: positions of inputs whose buffers it reuses.
    """

    piece: Piece
    function: Callable[..., Any]
    donated: tuple[int, ...]


def compile_piece(
    piece: Piece,
    mesh: jax.sharding.Mesh,
    dying: Sequence[Slot] | None,
    monoids: Mapping[Value, str] | None,
    options: Mapping[str, Any] | None,
) -> CompiledPiece:
    """Jits a piece.

    Args:
        piece, mesh: the piece and the stage's devices.
        dying: inputs that nothing reads later: their buffers are reused where an output has their shape, and those of
            sums for the new sums; None to reuse nothing.
        monoids: how sums over microbatches, then arguments too, combine; None where there is one microbatch.
        options: for XLA.
    """
    local, so_far = piece.local, piece.sums if monoids else ()
    inputs, n_inputs, n_kept = (*local.inputs, *so_far), len(local.inputs), len(piece.kept)

    def run(*arrays: Any) -> list[Any]:
        blocks = [_block(slot, array) for slot, array in zip(inputs, arrays, strict=True)]
        results = run_instructions(local, blocks[:n_inputs])
        if monoids:
            terms = zip(so_far, blocks[n_inputs:], results[n_kept:], strict=True)
            results[n_kept:] = [COMBINE[monoids[slot.value]](total, term) for slot, total, term in terms]
        return [_array(slot, block) for slot, block in zip(piece.outputs, results, strict=True)]

    in_specs = tuple(_slot_spec(slot, mesh) for slot in inputs)
    out_specs = [_slot_spec(slot, mesh) for slot in piece.outputs]
    mapped = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    donated = _reusable(local.inputs, piece.kept, dying or (), mesh)
    donated += tuple(range(n_inputs, len(inputs))) if dying is not None else ()
    function = jax.jit(
        mapped,
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in in_specs),
        out_shardings=[NamedSharding(mesh, spec) for spec in out_specs],
        donate_argnums=donated,
        compiler_options=dict(options) if options else None,
    )
    return CompiledPiece(piece, _on(mesh, function, piece.outputs), donated)


def _on(
    mesh: jax.sharding.Mesh, function: Callable[..., Any], results: Sequence[Slot]
) -> Callable[..., list[jax.Array]]:
    """A jitted function on devices of which some belong to this process; else its results have no blocks here."""
    place = NamedSharding(mesh, PartitionSpec())
    if is_here(place):
        return one_at_a_time(place, function)
    arrays = [absent(slot_shape(slot, mesh), slot.value.dtype, slot_sharding(slot, mesh)) for slot in results]
    return lambda *_: list(arrays)


def _block(slot: Slot, array: Any) -> Any:
    return array.reshape(array.shape[1:]) if slot.spec.partial else array


def _array(slot: Slot, block: Any) -> Any:
    return block[None] if slot.spec.partial else block


def _reusable(
    inputs: Sequence[Slot], outputs: Sequence[Slot], dying: Sequence[Slot], mesh: jax.sharding.Mesh
) -> tuple[int, ...]:
    """Inputs to donate: each of them finds an output of its shape, dtype and layout."""

    def kind(slot: Slot) -> tuple[Any, ...]:
        return slot_shape(slot, mesh), slot.value.dtype, _slot_spec(slot, mesh)

    free = [kind(slot) for slot in outputs]
    found = []
    for slot in dying:
        if slot in inputs and kind(slot) in free:
            free.remove(kind(slot))
            found.append(inputs.index(slot))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class StageRunner:
    """A compiled stage, or one replica of it.

    Attributes:
        stage, replica: which.
        device: the device of the schedule that runs it.
        parts: its pieces and the slots at its edges.
        mesh: its devices.
        pieces: its pieces, compiled, by part and round.
        sums: what is added up over the microbatches.
        zeros: makes the sums of no microbatch.
    """

    stage: int
    replica: int
    device: int
    parts: StageParts
    mesh: jax.sharding.Mesh
    pieces: Mapping[Tag, CompiledPiece]
    sums: tuple[Slot, ...]
    zeros: Callable[[], list[jax.Array]]

    @functools.cached_property
    def results(self) -> frozenset[Slot]:
        """What leaves the stage."""
        return frozenset(self.parts.outputs.values())


def zeros_of(
    sums: Sequence[Slot], mesh: jax.sharding.Mesh, monoids: Mapping[Value, str]
) -> Callable[[], list[jax.Array]]:
    """A function that makes the sums of no microbatch."""
    shardings = [slot_sharding(slot, mesh) for slot in sums]

    def make() -> list[jax.Array]:
        starts = [neutral(monoids[slot.value], slot.value.dtype) for slot in sums]
        return [jnp.full(slot_shape(slot, mesh), start) for slot, start in zip(sums, starts, strict=True)]

    return _on(mesh, jax.jit(make, out_shardings=shardings), sums)
