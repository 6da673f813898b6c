"""Writes a scan over layers as a scan over ticks.

    what each layer needs that no microbatch decides: a scan of its own, if there is any
    scan over ticks:  what every stage made goes to the next one, a microbatch enters the first
                      all stages run their layers, each on its own microbatch
                      terms are added up where a stage was not in a bubble
    what left the last stage, joined to the batch

The body of a tick is that of a layer with one dimension more, the stages; nothing in it says on which devices they are.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autopar import compat
from autopar.ir.body import ancestors
from autopar.ir.program import Atom, Program, Value
from autopar.lowering.pipelined.batching import Batching
from autopar.lowering.pipelined.loop import Kept, Scan
from autopar.lowering.pipelined.order import Order
from autopar.lowering.pipelined.shift import shift
from autopar.lowering.pipelined.trunk import Trunk, divided
from autopar.lowering.time.iteration import Inner, Writer, named
from autopar.lowering.time.shard import join_parts, take_parts
from autopar.sharding.time.timing import Cut, total_nbytes

LOOP_NAME = "ticks"


class Ticks:
    """One trunk as a pipeline.

    Args:
        trunk: the scan over layers.
        order: the pipeline.
        operands: of the scan, in the new program; what an earlier pipeline kept as it keeps it.
        outer: takes the equations.
        used: which results of the scan the program reads.
    """

    def __init__(
        self, trunk: Trunk, order: Order, operands: Sequence[Atom | Kept], outer: Writer, used: Sequence[bool]
    ) -> None:
        self.trunk, self.order, self.operands, self.outer, self.used = trunk, order, operands, outer, used
        self.eqn, self.kinds = trunk.equation, divided(trunk)
        self.name = f"{self.eqn.name}/{LOOP_NAME}"
        self.scan = Scan(self.name, outer, Writer(outer.names))
        self.results: dict[int, Atom | Kept] = {}
        self.stage_body = self._stage_body()

    # -- one layer

    def _stage_body(self) -> Program:
        """The body of a layer on one microbatch: operands as ``layer_operands`` has them, then its number."""
        body, nested = self.trunk.body, self.trunk.nested
        inner = Inner(body, nested.demands[0], nested, LOOP_NAME, dict(self.outer.names))
        program = inner.program()
        order = [
            k for kind in ("whole", "rides", "stream", "terms", "stepped", "weights", "kept") for k in self.kinds[kind]
        ]
        outputs = [program.outputs[k] for k in (*self.carried, *self.stacked)]
        return _live(Program((*(program.inputs[k] for k in order), inner.time()), tuple(outputs), program.equations))

    @property
    def carried(self) -> list[int]:
        """The results of the body that go to the next layer, streams first."""
        return [self.trunk.result(k) for kind in ("stream", "terms") for k in self.kinds[kind]]

    @property
    def stacked(self) -> list[int]:
        """The results of the body that each layer and microbatch has: parts, terms of totals, copies of one value."""
        forms, ys = self.trunk.nested.outputs, range(self.trunk.parts.n_carry, len(self.eqn.outputs))
        return [k for k in ys if forms[k] is not None or self.trunk.of_batch(k)]

    # -- around the loop

    def write(self) -> dict[int, Atom | Kept]:
        """Adds the equations; returns what stands for each result of the scan."""
        steps = self._whole_part()
        self._loop(steps)
        return self.results

    def _whole_part(self) -> dict[int, Atom]:
        """What does not depend on the batch, by a scan over layers: carries by layer, and results."""
        body, stepped = self.trunk.body, self.kinds["stepped"]
        whole = [k for k in range(self.trunk.parts.n_carry, len(self.eqn.outputs)) if k not in self.stacked]
        for k in self.kinds["whole"]:
            if k in self.trunk.carries:
                self.results[self.trunk.result(k)] = self._operand(k)
        steps = self._steps() if stepped else {}
        if whole:
            # Each layer by itself: a scan could not split the layers over devices.
            inputs = [k for kind in ("whole", "stepped", "weights") for k in self.kinds[kind]]
            part = _live(
                Program(tuple(body.inputs[k] for k in inputs), tuple(body.outputs[k] for k in whole), body.equations)
            )
            operands = [steps.get(k) or self._operand(k) for k in inputs]
            flags = [k not in self.kinds["whole"] for k in inputs]
            made = Batching(self.order.layers, self.outer).inline(part, operands, flags)
            self.results.update(zip(whole, made, strict=True))
        return steps

    def _steps(self) -> dict[int, Atom]:
        """What carries that no microbatch decides are before each layer, (L, ...)."""
        body, stepped = self.trunk.body, self.kinds["stepped"]
        outputs = tuple(body.outputs[self.trunk.result(k)] for k in stepped)
        part = _live(Program(body.inputs, outputs, body.equations))
        read = {atom for eqn in part.equations for atom in eqn.inputs} | set(outputs)
        scan = Scan(f"{self.eqn.name}/steps", self.outer, Writer(self.outer.names))
        env: dict[Atom, Atom] = {}
        before = [scan.carry(self._operand(k), self._short(k)) for k in stepped]
        env.update(zip((body.inputs[k] for k in stepped), before, strict=True))
        for kind, enter in (("whole", scan.constant), ("weights", scan.slice)):
            entering = [k for k in self.kinds[kind] if body.inputs[k] in read]
            env.update((body.inputs[k], enter(self._operand(k), self._short(k))) for k in entering)
        for eqn in part.equations:
            made = scan.inner.keep(eqn, [env.get(a, a) for a in eqn.inputs], [v.shape for v in eqn.outputs])
            env.update(zip(eqn.outputs, made, strict=True))
        options = {"length": self.order.layers, "reverse": self.order.reverse}
        finals, stacks = scan.finish([env.get(atom, atom) for atom in outputs], before, self.eqn, options)
        self.results.update(zip(map(self.trunk.result, stepped), finals, strict=True))
        return dict(zip(stepped, stacks, strict=True))

    def _operand(self, k: int) -> Atom:
        atom = self.operands[k]
        assert not isinstance(atom, Kept)
        return atom

    def _short(self, k: int) -> str:
        return self.trunk.body.inputs[k].name.rpartition("/")[2]

    def _outside(self, function: Any, atoms: Sequence[Atom], name: str) -> Atom:
        (made,) = self.outer.write(function, atoms, named(f"{self.name}/{name}", atoms[0].aval, self.eqn))
        return made

    def _inside(self, function: Any, atoms: Sequence[Atom], name: str) -> list[Atom]:
        return self.scan.inner.write(function, atoms, named(f"{self.name}/{name}", compat.int32_aval(), self.eqn))

    # -- the loop

    def _loop(self, steps: dict[int, Atom]) -> None:
        order, scan = self.order, self.scan
        numbers = self.outer.write(
            lambda: lax.iota(jnp.int32, order.ticks), [], named(f"{self.name}/numbers", compat.int32_aval(order.ticks))
        )[0]
        self.tick = scan.slice(numbers, f"{self.name}/number")
        (self.task,) = self._inside(
            lambda t: order.task(t, jnp.arange(order.stages, dtype=jnp.int32)), [self.tick], "task"
        )
        (self.microbatch,) = self._inside(order.microbatch, [self.task], "microbatch")
        shifted = [self._entering(k) for k in (*self.kinds["rides"], *self.kinds["stream"])]
        rides, streams = shifted[: len(self.kinds["rides"])], shifted[len(self.kinds["rides"]) :]
        whole = [scan.constant(self._operand(k), f"{self.name}/{self._short(k)}") for k in self.kinds["whole"]]
        weights = [
            self._weights(steps.get(k) or self._operand(k), k) for k in (*self.kinds["stepped"], *self.kinds["weights"])
        ]
        kept = [self._kept(k) for k in self.kinds["kept"]]
        carried, stacked = self._layers([*whole, *rides], streams, [*weights, *kept])
        self._finish(rides, carried, stacked)

    def _parts(self, k: int) -> Atom:
        """The microbatches of a value, (m, ...)."""
        cut = self.trunk.form(k)
        assert isinstance(cut, Cut)
        name = f"{self._short(k)}/microbatches"
        return self._outside(lambda x: take_parts(x, cut, self.order.microbatches), [self._operand(k)], name)

    def _entering(self, k: int) -> Atom:
        """What every stage gets from the one before; the first gets a microbatch."""
        order, name = self.order, self._short(k)
        parts = self._parts(k)
        copies = lambda x: jnp.broadcast_to(x[0], (order.stages, *x.shape[1:]))  # noqa: E731
        before = self.scan.carry(self._outside(copies, [parts], f"{name}/before"), f"{self.name}/{name}/before")
        feed = self.scan.constant(parts, f"{self.name}/{name}/microbatches")

        def entered(tick: Any, before: Any, parts: Any) -> Any:
            task = order.task(tick, order.entry)
            entering = lax.dynamic_index_in_dim(parts, order.microbatch(task), keepdims=False)
            enters = order.enters(task) if order.rounds > 1 else None
            return shift(before, entering, enters, reverse=order.reverse)

        return self._inside(entered, [self.tick, before, feed], f"{name}/stages")[0]

    def _weights(self, atom: Atom, k: int) -> Atom:
        """What the layers of every stage need in this round, (k, p, ...)."""
        name = self._short(k)
        by_stage = self._outside(self.order.by_stage, [atom], f"{name}/by_stage")
        if self.order.rounds == 1:
            first = self._outside(lambda x: x[0], [by_stage], f"{name}/by_stage")
            return self.scan.constant(first, f"{self.name}/{name}")
        rounds = self.scan.constant(by_stage, f"{self.name}/{name}/rounds")
        pick = lambda task, x: _pick(x, self.order.round(task))  # noqa: E731
        return self._inside(pick, [self.task, rounds], name)[0]

    def _kept(self, k: int) -> Atom:
        """What the layers of every stage need of its microbatch, (k, p, ...)."""
        kept, name, order = self.operands[k], self._short(k), self.order
        if isinstance(kept, Kept):
            return self.scan.slice(kept.value, f"{self.name}/{name}")
        form = self.trunk.form(k)
        assert isinstance(form, Cut)
        cut = Cut(form.dim + 1, form.inner)

        def arranged(x: Any) -> Any:
            stages = jax.vmap(order.by_stage)(take_parts(x, cut, order.microbatches))
            return stages.reshape(-1, *stages.shape[2:])

        parts = self.scan.constant(self._outside(arranged, [kept], f"{name}/by_stage"), f"{self.name}/{name}/parts")
        pick = lambda task, x: _pick(x, order.microbatch(task) * order.rounds + order.round(task))  # noqa: E731
        return self._inside(pick, [self.task, parts], name)[0]

    def _layers(self, constants: list[Atom], streams: list[Atom], scanned: list[Atom]) -> tuple[list[Atom], list[Atom]]:
        """All layers of all stages, on their microbatches; returns what the last ones carry, and what each makes."""
        n_whole, inner = len(self.kinds["whole"]), self.scan.inner
        flags = [False] * n_whole + [True] * (len(self.stage_body.inputs) - n_whole)
        terms = [self._no_term(k) for k in self.kinds["terms"]]
        n_carried = len(self.carried)
        if self.order.depth == 1:
            slices = [self._inside(lambda x: x[0], [x], "layer")[0] for x in scanned]
            operands = [*constants, *streams, *terms, *slices, self.microbatch]
            made = Batching(self.order.stages, inner).inline(self.stage_body, operands, flags)
            return made[:n_carried], [self._inside(lambda x: x[None], [x], "layer")[0] for x in made[n_carried:]]
        scan = Scan(f"{self.name}/layers", inner, Writer(inner.names))
        names = [v.name for v in self.stage_body.inputs]
        insides: list[Atom] = [scan.constant(atom, name) for atom, name in zip(constants, names, strict=False)]
        names = names[len(constants) :]
        insides += [scan.carry(atom, name) for atom, name in zip([*streams, *terms], names, strict=False)]
        names = names[len(streams) + len(terms) :]
        insides += [scan.slice(atom, name) for atom, name in zip(scanned, names, strict=False)]
        insides.append(scan.constant(self.microbatch, f"{self.name}/microbatch"))
        made = Batching(self.order.stages, scan.inner).inline(self.stage_body, insides, flags)
        options = {"length": self.order.depth, "reverse": self.order.reverse}
        return scan.finish(made[:n_carried], made[n_carried:], self.eqn, options)

    def _no_term(self, k: int) -> Atom:
        aval = self.trunk.body.inputs[k].aval
        zeros = lambda: jnp.zeros((self.order.stages, *aval.shape), aval.dtype)  # noqa: E731
        return self._inside(zeros, [], f"{self._short(k)}/no_term")[0]

    def _finish(self, rides: list[Atom], carried: list[Atom], stacked: list[Atom]) -> None:
        """Totals in carries, the rest stacked by tick; then the results of the whole scan."""
        order, forms = self.order, self.trunk.nested.outputs
        streams, terms = carried[: len(self.kinds["stream"])], carried[len(self.kinds["stream"]) :]
        outputs = [*zip(self.carried[len(streams) :], terms, strict=True)]
        outputs += [(k, x) for k, x in zip(self.stacked, stacked, strict=True) if not isinstance(forms[k], Cut)]
        totals = [self._total(k, term) for k, term in outputs]
        leaving = [(k, x) for k, x in zip(self.carried, streams, strict=False) if self.used[k]]
        keeping = [(k, x) for k, x in zip(self.stacked, stacked, strict=True) if isinstance(forms[k], Cut)]
        options = {"length": order.ticks, "reverse": order.reverse}
        made = [atom for _, atom in (*leaving, *keeping)]
        finals, stacks = self.scan.finish([*rides, *streams, *totals], made, self.eqn, options)
        for (k, _), final in zip(outputs, finals[len(rides) + len(streams) :], strict=True):
            self.results[k] = self._totalled(k, final)
        for (k, _), stack in zip(leaving, stacks, strict=False):
            cut = forms[k]
            assert isinstance(cut, Cut)
            join = lambda x, cut=cut: join_parts(order.leaving(x), cut)  # noqa: E731
            self.results[k] = self._outside(join, [stack], self.eqn.outputs[k].name.rpartition("/")[2])
        for (k, _), stack in zip(keeping, stacks[len(leaving) :], strict=True):
            cut = forms[k]
            assert isinstance(cut, Cut)
            self.results[k] = Kept(stack, order, Cut(cut.dim + 1, cut.inner))

    def _total(self, k: int, term: Atom) -> Atom:
        """The total of what all stages have added, each by itself, with this tick's terms.

        Of what all microbatches have alike, the first one's stays.
        """
        value, order, first_only = self.eqn.outputs[k], self.order, self.trunk.nested.outputs[k] is None
        by_layer = k >= self.trunk.parts.n_carry
        wide = total_nbytes(value) > value.nbytes and not first_only
        dtype = jnp.dtype("float32") if wide else value.dtype
        rounds = (order.rounds,) if by_layer and order.rounds > 1 else ()
        shape = (*rounds, *term.aval.shape)
        start = self._outside_zeros(shape, dtype, f"{value.name}/start")
        so_far = self.scan.carry(start, f"{value.name}/so_far")
        axis = int(by_layer)

        def added(tick: Any, total: Any, term: Any) -> Any:
            stages = jnp.arange(order.stages, dtype=jnp.int32)
            task, counts = order.task(tick, stages), order.busy(tick, stages)
            if first_only:
                counts &= order.microbatch(task) == 0
            counts = counts.reshape((-1,) + (1,) * (term.ndim - axis - 1))
            if rounds:
                here = order.round(task) == jnp.arange(order.rounds, dtype=jnp.int32)[:, None]
                counts = counts & here.reshape(order.rounds, 1, -1, *(1,) * (term.ndim - 2))
            term = jnp.broadcast_to(lax.convert_element_type(term, dtype), total.shape)
            if first_only:
                return jnp.where(counts, term, total)
            return total + jnp.where(counts, term, jnp.zeros_like(term))

        return self._inside(added, [self.tick, so_far, term], f"{value.name}/sum")[0]

    def _outside_zeros(self, shape: tuple[int, ...], dtype: Any, name: str) -> Atom:
        (made,) = self.outer.write(lambda: jnp.zeros(shape, dtype), [], named(name, compat.int32_aval(), self.eqn))
        return made

    def _totalled(self, k: int, total: Atom) -> Atom:
        """The result that a total over ticks stands for, in its own dtype."""
        value, order, n_carry = self.eqn.outputs[k], self.order, self.trunk.parts.n_carry
        name = f"{value.name.rpartition('/')[2]}/total"
        narrow = lambda x: lax.convert_element_type(x, value.dtype)  # noqa: E731
        if k >= n_carry:
            rounds = (lambda x: x) if order.rounds > 1 else (lambda x: x[None])
            return self._outside(lambda x: narrow(order.from_stages(rounds(x))), [total], name)
        first = self._operand(k + self.trunk.parts.n_consts)
        add = lambda x, first: narrow(lax.reduce(x, jnp.zeros((), x.dtype), lax.add, (0,)) + first)  # noqa: E731
        return self._outside(add, [total, first], name)


def _pick(x: Any, index: Any) -> Any:
    """For every stage one of several values, (n, k, p, ...) -> (k, p, ...)."""
    pick = lambda column, i: lax.dynamic_index_in_dim(column, i, keepdims=False)  # noqa: E731
    return jax.vmap(pick, in_axes=(2, 0), out_axes=1)(x, index)


def _live(program: Program) -> Program:
    """Without the equations that no result needs."""
    needed = ancestors(program.equations, [atom for atom in program.outputs if isinstance(atom, Value)])
    return replace(program, equations=tuple(eqn for eqn in program.equations if eqn in needed))
