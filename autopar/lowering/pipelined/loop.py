"""Loops in the making, and what a pipeline's loop keeps by tick."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from autopar import compat
from autopar.ir.program import Atom, Equation, Program, Value
from autopar.lowering.pipelined.order import Order
from autopar.lowering.time.iteration import Writer
from autopar.lowering.time.shard import join_parts
from autopar.sharding.time.timing import Cut


@dataclass(frozen=True, eq=False)
class Kept:
    """What the layers of all stages made, by tick, (T, k, p, ...): the results of one loop, the operands of another.

    Attributes:
        value: the results.
        order: of the loop that made them.
        cut: how a microbatch is cut from the results of all layers, (L, ...).
    """

    value: Value
    order: Order
    cut: Cut


def whole_layers(kept: Kept) -> Any:
    """The function that turns what a pipeline keeps by tick into the results of all layers, (L, ...)."""

    def joined(ticks: Any) -> Any:
        return join_parts(kept.order.by_layer(ticks), kept.cut)

    return joined


@dataclass
class Scan:
    """A scan in the making.

    Attributes:
        name: of the scan.
        outer: takes the equations around it.
        inner: takes those of its body.
    """

    name: str
    outer: Writer
    inner: Writer
    constants: list[tuple[Atom, Value]] = field(default_factory=list)
    carries: list[tuple[Atom, Value]] = field(default_factory=list)
    scanned: list[tuple[Atom, Value]] = field(default_factory=list)

    def constant(self, atom: Atom, name: str) -> Atom:
        """A value of the program, in the body."""
        if not isinstance(atom, Value):
            return atom
        self.constants.append((atom, self.inner.value(name, atom.aval)))
        return self.constants[-1][1]

    def carry(self, start: Atom, name: str) -> Value:
        """What the body has made before; ``start`` at first."""
        self.carries.append((start, self.inner.value(name, start.aval)))
        return self.carries[-1][1]

    def slice(self, atom: Atom, name: str) -> Value:
        """An iteration's slice of a value."""
        self.scanned.append((atom, self.inner.value(name, atom.aval, atom.aval.shape[1:])))
        return self.scanned[-1][1]

    def _outside(self, atom: Atom) -> str:
        """The name of a result of the scan, after what it is in the body."""
        name = atom.name if isinstance(atom, Value) else "constant"
        own, inside = self.name.split("/"), name.split("/")
        common = next((i for i, (a, b) in enumerate(zip(own, inside, strict=False)) if a != b), len(own))
        return "/".join([self.name, "out", *inside[min(common, len(inside) - 1) :]])

    def finish(self, carried: Sequence[Atom], made: Sequence[Atom], like: Equation, options: dict[str, Any]) -> Any:
        """Adds the scan; returns what its carries became, and its stacked results."""
        operands = [*self.constants, *self.carries, *self.scanned]
        body = Program(tuple(v for _, v in operands), (*carried, *made), tuple(self.inner.equations))
        length = options["length"]
        results = [self.outer.value(self._outside(v), v.aval) for _, v in self.carries]
        results += [self.outer.value(self._outside(x), x.aval, (length, *x.aval.shape)) for x in made]
        params = {"num_consts": len(self.constants), "num_carry": len(self.carries), "unroll": 1} | options
        self.outer.equations.append(
            Equation(
                compat.scan_primitive(),
                tuple(atom for atom, _ in operands),
                tuple(results),
                params,
                self.outer.unique(self.name),
                like.source,
                like.backward,
                (body,),
            )
        )
        return results[: len(carried)], results[len(carried) :]
