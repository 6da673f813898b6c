"""Constants of loops that depend on nothing, such as masks of iotas, are made where they are read.

JAX moves them out of a scan, for the whole batch. Inside, each microbatch makes the part that it needs.
"""

from collections.abc import Iterator
from dataclasses import replace

from autopar.cost import fusible
from autopar.ir.body import ancestors, free_values
from autopar.ir.program import Atom, Equation, Program, Value
from autopar.ir.regions import ScanParts
from autopar.lowering.time.iteration import Writer


def sunk(program: Program) -> Program:
    """The program whose scans make constants that depend on nothing and fuse, instead of reading them."""
    light = [eqn for eqn in program.equations if fusible(eqn.primitive.name)]
    free = free_values(light)
    names = dict.fromkeys(_names(program), 1)
    equations = tuple(_sunk(eqn, program, free, names) for eqn in program.equations)
    if all(a is b for a, b in zip(equations, program.equations, strict=True)):
        return program
    needed = ancestors(equations, [atom for atom in program.outputs if isinstance(atom, Value)])
    return replace(program, equations=tuple(eqn for eqn in equations if eqn in needed))


def _sunk(eqn: Equation, program: Program, free: frozenset[Value], names: dict[str, int]) -> Equation:
    if eqn.primitive.name != "scan" or not eqn.bodies:
        return eqn
    (body,), parts = eqn.bodies, ScanParts.of(eqn)
    gone = [k for k in range(parts.n_consts) if isinstance(atom := eqn.inputs[k], Value) and atom in free]
    if not gone:
        return eqn
    writer, env = Writer(names), dict[Atom, Atom]()
    made_of = ancestors(program.equations, [atom for k in gone if isinstance(atom := eqn.inputs[k], Value)])
    for each in program.equations:
        if each in made_of:
            copies = writer.keep(each, [env.get(a, a) for a in each.inputs], [v.shape for v in each.outputs])
            env.update(zip(each.outputs, copies, strict=True))
    inside: dict[Atom, Atom] = {body.inputs[k]: env[eqn.inputs[k]] for k in gone}
    read = (replace(e, inputs=tuple(inside.get(a, a) for a in e.inputs)) for e in body.equations)
    new = Program(
        tuple(v for k, v in enumerate(body.inputs) if k not in gone),
        tuple(inside.get(a, a) for a in body.outputs),
        (*writer.equations, *read),
    )
    params = {name: value for name, value in eqn.params.items() if name != "jaxpr"}
    params["num_consts"] = parts.n_consts - len(gone)
    inputs = tuple(atom for k, atom in enumerate(eqn.inputs) if k not in gone)
    return replace(eqn, inputs=inputs, bodies=(new,), params=params)


def _names(program: Program) -> Iterator[str]:
    yield from (value.name for value in program.inputs)
    for eqn in program.equations:
        yield from (eqn.name, *(value.name for value in eqn.outputs))
        for body in eqn.bodies:
            yield from _names(body)
