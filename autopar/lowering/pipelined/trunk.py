"""Which scans of a step can be pipelined, and what their operands and results are to a pipeline."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from autopar import compat
from autopar.errors import MicrobatchError
from autopar.ir.body import ancestors
from autopar.ir.program import Equation, Program, Value
from autopar.ir.regions import ScanParts
from autopar.sharding.lookup import RuleBook
from autopar.sharding.time.demand import TERM, Form
from autopar.sharding.time.nested import Nested, region_inside, scan_inside
from autopar.sharding.time.timing import Cut, Question, Timing, Timings


@dataclass(frozen=True, eq=False)
class Trunk:
    """A scan over layers, of which one microbatch can run at a time.

    Attributes:
        equation: the scan.
        nested: its body on one microbatch, and the form of each operand and result.
    """

    equation: Equation
    nested: Nested

    @property
    def body(self) -> Program:
        """The body on the whole batch."""
        return self.equation.bodies[0]

    @property
    def parts(self) -> ScanParts:
        """How operands and results divide."""
        return ScanParts.of(self.equation)

    @property
    def constants(self) -> range:
        """Operands that are the same for all layers."""
        return range(self.parts.n_consts)

    @property
    def carries(self) -> range:
        """Operands that go from layer to layer."""
        return range(self.parts.n_consts, self.parts.first_x)

    @property
    def scanned(self) -> range:
        """Operands of which each layer has its own."""
        return range(self.parts.first_x, len(self.equation.inputs))

    def form(self, k: int) -> Form | None:
        """That of an operand, in the body."""
        return self.nested.inputs[k]

    def result(self, k: int) -> int:
        """The number of the result that a carry becomes."""
        return k - self.parts.n_consts

    def of_batch(self, k: int) -> bool:
        """Whether a result of the body depends on operands of which each microbatch has its own."""
        atom = self.body.outputs[k]
        batch = {value for value, form in zip(self.body.inputs, self.nested.inputs, strict=True) if form is not None}
        needed = ancestors(self.body.equations, [atom] if isinstance(atom, Value) else [])
        return atom in batch or any(value in batch for eqn in needed for value in eqn.operands)

    def added_to(self, k: int) -> bool:
        """Whether all that a layer does with a carry is to add to it, so that stages may add up theirs apart."""
        value, after = self.body.inputs[k], self.body.outputs[self.result(k)]
        while value is not after:
            readers = [eqn for eqn in self.body.equations if value in eqn.inputs]
            adds = len(readers) == 1 and readers[0].primitive.name in ("add", "add_any")
            if not adds or readers[0].inputs.count(value) != 1 or value in self.body.outputs:
                return False
            value = readers[0].outputs[0]
        return self.body.outputs.count(value) == 1 and not any(value in eqn.inputs for eqn in self.body.equations)

    def unchanged(self, k: int) -> bool:
        """Whether a carry is the same for all layers."""
        return self.body.outputs[self.result(k)] is self.body.inputs[k]


def find_trunks(program: Program, batch: Sequence[Value], microbatches: int) -> Iterator[Trunk]:
    """The scans over layers: they carry a part of the batch and read an array of each layer that has none.

    Args:
        program: the whole step.
        batch: the arguments whose dimension 0 is the batch.
        microbatches: into how many parts to cut it.

    Raises:
        MicrobatchError: such a scan mixes the examples of the batch.
    """
    rules = RuleBook()
    timings = Timings(Question(program, microbatches, {value: Cut(0) for value in batch}), rules, region_inside)
    for eqn in program.equations:
        if eqn.primitive.name == "scan" and eqn.bodies:
            # Outside the loops everything is whole: what is only a term of a total in a loop over the batch, too.
            forms = [Timing(timings.timing(atom).cut) for atom in eqn.inputs]
            if _over_layers(eqn, forms):
                yield Trunk(eqn, _nested(eqn, forms, microbatches, rules))


def _over_layers(eqn: Equation, forms: Sequence[Timing]) -> bool:
    parts = ScanParts.of(eqn)
    streams = any(form.cut for form in forms[parts.n_consts : parts.first_x])
    layers = zip(eqn.inputs[parts.first_x :], forms[parts.first_x :], strict=True)
    weights = (atom for atom, form in layers if not form.cut and jnp.issubdtype(atom.aval.dtype, jnp.inexact))
    return streams and any(len(atom.aval.shape) > 1 for atom in weights)


def _nested(eqn: Equation, forms: list[Timing], microbatches: int, rules: RuleBook) -> Nested:
    inside = scan_inside(eqn, forms, microbatches, rules)
    if inside is None:
        blamed = _mixing(eqn, forms, microbatches, rules)
        raise MicrobatchError(
            f"the layers of {eqn.name} cannot run one microbatch at a time: {blamed.name} "
            f"({blamed.primitive.name}) needs the whole batch",
            where=compat.source_line(blamed.source),
            fix="plan without an axis 'pipe', or make the layers treat every example by itself",
        )
    return inside.nested


def _mixing(eqn: Equation, forms: list[Timing], microbatches: int, rules: RuleBook) -> Equation:
    """The first equation of a body that reads a part of the batch and cannot run on it, or needs a total, too."""
    (body,), parts = eqn.bodies, ScanParts.of(eqn)
    cuts = [
        Cut(form.cut.dim - (k >= parts.first_x), form.cut.inner) if form.cut else None for k, form in enumerate(forms)
    ]
    seeds: Mapping[Value, Cut] = {v: cut for v, cut in zip(body.inputs, cuts, strict=True) if cut is not None}
    timings = Timings(Question(body, microbatches, seeds, inside=True), rules, region_inside)
    for each in body.equations:
        waits = any(timings.of[value].loop for value in each.outputs)
        if waits or (each.name not in timings.inside and any(timings.of[value].cut for value in each.operands)):
            return each
    return eqn


def divided(trunk: Trunk) -> dict[str, list[int]]:
    """The operands of a trunk by what they are to a pipeline.

    whole      the same for all layers and microbatches
    stepped    carried, but not made of the batch: known for every layer beforehand
    weights    of each layer
    stream     goes from stage to stage, as parts of the batch
    rides      the same for all layers, but of each microbatch: goes along with the stream
    terms      carried, and added to by every microbatch
    kept       of each layer and microbatch
    """
    found: dict[str, list[int]] = {name: [] for name in KINDS}
    for k in (*trunk.constants, *trunk.carries, *trunk.scanned):
        form, carried = trunk.form(k), k in trunk.carries
        if k in trunk.constants:
            kind = "rides" if form else "whole"
        elif k in trunk.scanned:
            kind = "kept" if form else "weights"
        elif isinstance(form, Cut):
            kind = "stream"
        elif form == TERM:
            kind = "terms"
            if not trunk.added_to(k):
                raise _refused_carry(trunk, k, "is a total over the batch and more than added to in a layer")
        else:
            kind = "whole" if trunk.unchanged(k) else "stepped"
            if trunk.of_batch(trunk.result(k)):
                raise _refused_carry(trunk, k, "is no part of the batch, but is made of it")
        assert carried == (kind in ("stream", "terms", "stepped")) or kind == "whole"
        found[kind].append(k)
    return found


def _refused_carry(trunk: Trunk, k: int, why: str) -> MicrobatchError:
    return MicrobatchError(
        f"carry {trunk.result(k)} of {trunk.equation.name}, {trunk.body.inputs[k]}, {why}",
        where=compat.source_line(trunk.equation.source),
        fix="plan without an axis 'pipe'",
    )


KINDS = ("whole", "stepped", "weights", "stream", "rides", "terms", "kept")
