"""Reads the text of a compiled XLA module: its instructions, how often each runs, and its collectives.

The text is that of ``jax.stages.Compiled.as_text()`` on CPU, GPU and TPU. Source of the grammar: XLA,
``xla/hlo/parser/hlo_parser.cc``.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

Groups = tuple[tuple[int, ...], ...]
"""Devices that communicate with each other, as positions in the mesh, row-major."""

DTYPES = {
    "pred": ("bool", 1),
    "bf16": ("bfloat16", 2),
    **{f"s{bits}": (f"int{bits}", bits / 8) for bits in (2, 4, 8, 16, 32, 64)},
    **{f"u{bits}": (f"uint{bits}", bits / 8) for bits in (2, 4, 8, 16, 32, 64)},
    **{f"f{bits}": (f"float{bits}", bits / 8) for bits in (16, 32, 64)},
    **{f"c{bits}": (f"complex{bits}", bits / 8) for bits in (64, 128)},
}
"""Name in HLO -> name in NumPy and bytes per element."""

KINDS = {
    "all-gather": "all_gather",
    "all-reduce": "all_reduce",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "collective_permute",
}


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without the percent sign.
        shape: of the result, as text; a tuple in parentheses.
        opcode: such as "all-reduce-start".
        arguments: the text between its parentheses.
        attributes: the text behind them.
        is_root: whether the computation returns it.
    """

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as ``body=%name`` names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None


@dataclass(frozen=True)
class Module:
    """A compiled module: computation name -> instruction name -> instruction, and the name of the entry."""

    computations: dict[str, dict[str, Instruction]] = field(repr=False)
    entry: str

    def root(self, computation: str) -> Instruction:
        """The instruction that a computation returns."""
        return next(line for line in self.computations[computation].values() if line.is_root)


@dataclass(frozen=True)
class Communication:
    """One collective of the module; a combined one is one per operand.

    Attributes:
        kind: all_gather, all_reduce, reduce_scatter, all_to_all or collective_permute.
        dtype: NumPy's name.
        nbytes: per device and execution, of the larger of input and output.
        groups: who talks to whom; for a permutation, the pairs (source, target). Empty: all devices.
        times: how often a step runs it.
        arrays: how many the lowering joined to one for it (``autopar.lowering.reshard.execute_together``).
    """

    kind: str
    dtype: str
    nbytes: float
    groups: Groups
    times: int
    arrays: int = 1


def parse(text: str) -> Module:
    """The module that ``text`` describes."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found.group(2), found.group(3), bool(found.group(1)))
            current[instruction.name] = instruction
    return Module(computations, entry)


def n_partitions(text: str) -> int:
    """The number of devices that a module runs on."""
    found = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return int(found.group(1)) if found else 1


_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    shape_end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    open_at = text.index("(", shape_end)
    close_at = _closing(text, open_at)
    opcode = text[shape_end:open_at].strip()
    return Instruction(name, text[:shape_end], opcode, text[open_at + 1 : close_at - 1], text[close_at:], is_root)


def _closing(text: str, start: int) -> int:
    """The position behind the parenthesis that closes the one at ``start``."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"unbalanced parentheses in {text[start : start + 80]}")


def array(shape: str) -> tuple[str, float]:
    """NumPy dtype and bytes of one array shape such as ``f32[16,8]{1,0}``.

    >>> array("bf16[4,8]{1,0:T(8,128)(2,1)}")
    ('bfloat16', 64.0)
    """
    found = re.match(r"(\w+)\[([\d,<=]*)\]", shape)
    if not found:
        raise ValueError(f"not an array shape: {shape}")
    name, dims = found.groups()
    # The 8-bit floats (f8e4m3fn, f8e5m2, ...) keep their name behind "float".
    dtype, width = DTYPES.get(name, (name.replace("f8", "float8_", 1), 1))
    return dtype, float(math.prod(int(dim.removeprefix("<=")) for dim in dims.split(",") if dim)) * width


def executions(module: Module, inside_fusions: bool = False) -> Iterator[tuple[str, Instruction, int]]:
    """Every instruction that a step runs, as (its computation, itself, how often).

    The body of a loop counts as often as its trip count says (once where that is unknown), both branches
    of a conditional count.
    """
    pending = [(module.entry, 1)]
    while pending:
        name, times = pending.pop()
        for instruction in module.computations[name].values():
            yield name, instruction, times
            if instruction.opcode == "while":
                repeated = times * (trip_count(module, name, instruction) or 1)
                pending.append((instruction.attribute("body") or "", repeated))
            elif instruction.opcode != "fusion" or inside_fusions:
                pending += [(callee, times) for callee in _callees(instruction)]


def _callees(instruction: Instruction) -> list[str]:
    names = [instruction.attribute("calls")]
    if instruction.opcode == "call":
        names.append(instruction.attribute("to_apply"))
    if instruction.opcode == "conditional":
        names += [instruction.attribute("true_computation"), instruction.attribute("false_computation")]
        branches = re.search(r"branch_computations=\{(.*?)\}", instruction.attributes)
        names += re.findall(r"%?([\w.\-]+)", branches.group(1)) if branches else []
    return [name for name in names if name]


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
    """How often a ``while`` runs its body; None where only the data decides.

    XLA notes it for CPU and GPU. On TPU it is read off a condition ``counter < constant`` and the counter's
    first value, with the step of 1 that JAX's loops have.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(noted.group(1))
    condition = loop.attribute("condition") or ""
    scope, compare = module.computations[condition], module.root(condition)
    if compare.opcode == "fusion":
        inner = module.root(compare.attribute("calls") or "")
        operands, is_less = compare.operands, "direction=LT" in inner.attributes
    else:
        operands, is_less = compare.operands, "direction=LT" in compare.attributes
    limits = [scope[name] for name in operands if scope[name].opcode == "constant"]
    counters = [scope[name] for name in operands if scope[name].opcode == "get-tuple-element"]
    if not is_less or len(limits) != 1 or len(counters) != 1:
        return None
    first = _initial_value(module.computations[computation], loop, counters[0])
    return None if first is None else max(int(limits[0].arguments) - first, 0)


def _initial_value(scope: dict[str, Instruction], loop: Instruction, counter: Instruction) -> int | None:
    """The constant that a loop's tuple holds for ``counter`` at first, seen through copies."""
    index = re.search(r"index=(\d+)", counter.attributes)
    state = scope[loop.operands[0]]
    if index is None or state.opcode != "tuple":
        return None
    value = scope[state.operands[int(index.group(1))]]
    while value.opcode in ("copy", "copy-done", "copy-start", "bitcast"):
        value = scope[value.operands[0]]
    return int(value.arguments) if value.opcode == "constant" and value.arguments.isdigit() else None


def communications(module: Module, n_devices: int) -> Iterator[Communication]:
    """Every collective that a step runs. Groups of one device, which communicate nothing, are left out."""
    for computation, instruction, times in executions(module, inside_fusions=True):
        opcode = instruction.opcode.removesuffix("-start")
        scope = module.computations[computation]
        if opcode not in KINDS or _continues(instruction, scope):
            continue
        groups = _groups(instruction)
        size = len(groups[0]) if groups else n_devices
        if size == 1:
            continue
        kind = KINDS[opcode]
        if kind == "all_reduce" and "all-reduce-scatter" in computation:
            kind = "reduce_scatter"  # the TPU's fusion of an all-reduce and the slice that each device keeps
        parts = [_array_sent(module, scope, name) for name in instruction.operands]
        if kind == "all_to_all":  # a tuple holds one operand per peer, a single array all of them
            parts = [(parts[0][0], sum(nbytes for _, nbytes in parts))]
        growth = size if kind == "all_gather" else 1
        for dtype, nbytes in parts:
            yield Communication(kind, dtype, nbytes * growth, groups, times, _arrays(instruction))


TOGETHER = "together."
"""Names the scope of a collective on several arrays, followed by how many."""


def _arrays(instruction: Instruction) -> int:
    found = re.search(rf'op_name="[^"]*/{re.escape(TOGETHER)}(\d+)/', instruction.attributes)
    return int(found.group(1)) if found else 1


def _continues(instruction: Instruction, scope: dict[str, Instruction]) -> bool:
    """Whether a fusion of the TPU repeats a collective that another one started.

    The compiler overlaps a collective with other fusions by writing it into each of them, marked with one
    ``chain_id``; only the computation with the custom call AsyncCollectiveStart counts.
    """
    return "chain_id=" in instruction.attributes and not any(
        "AsyncCollectiveStart" in line.attributes for line in scope.values()
    )


def _array_sent(module: Module, scope: dict[str, Instruction], name: str) -> tuple[str, float]:
    """Dtype and bytes of the operand of a collective, before the compiler padded or widened it.

    The CPU backend sends 16-bit floats as float32 (FloatNormalization): a conversion to float32 straight
    before the collective is taken back. The TPU pads the operand of a fused reduce-scatter to whole tiles.
    """
    value = scope[name]
    while value.opcode in _LAYOUT:
        value = scope[value.operands[0]]
    source_scope = scope
    if value.opcode == "fusion":
        source_scope = module.computations[value.attribute("calls") or ""]
        value = module.root(value.attribute("calls") or "")
        while value.opcode in _LAYOUT and value.operands:
            value = source_scope[value.operands[0]]
    if value.opcode == "convert":
        source = source_scope[value.operands[0]].shape
        if source.startswith(("bf16[", "f16[")) and value.shape.startswith("f32["):
            dtype, _ = array(source)
            return dtype, array(scope[name].shape)[1] / 2
    if scope[name].opcode == "pad":
        return array(scope[scope[name].operands[0]].shape)
    return array(scope[name].shape)


_LAYOUT = ("bitcast", "copy", "copy-done", "copy-start", "reshape", "transpose")


def _groups(instruction: Instruction) -> Groups:
    """The replica groups or the source-target pairs; empty where the text says all devices."""
    found = _GROUPS.search(instruction.attributes)
    return groups_of(found.group(1)) if found else ()


_GROUPS = re.compile(
    r"\b(?:replica_groups|source_target_pairs)="
    r"(\{(?:\{[\d,]*\},?)*\}|\[[\d,]*\]<=\[[\d,]*\](?:T\([\d,]*\))?|mesh\[[^\]]*\]\s*\{[^}]*\})"
)


def groups_of(text: str) -> Groups:
    """Device groups in any notation of XLA; JAX 0.12 names the axes of the mesh.

    >>> groups_of("{{0,1},{2,3}}")
    ((0, 1), (2, 3))
    >>> groups_of("[2,2]<=[4]")
    ((0, 1), (2, 3))
    >>> groups_of("[2,2]<=[2,2]T(1,0)")
    ((0, 2), (1, 3))
    >>> groups_of("mesh['a'=2,'b'=2] {'a'}")
    ((0, 2), (1, 3))
    """
    if text.startswith("mesh"):
        return _axis_groups(text)
    if text.startswith("{"):
        return tuple(
            tuple(int(member) for member in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text[1:-1])
        )
    found = re.fullmatch(r"\[([\d,]*)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?", text)
    if not found:
        raise ValueError(f"not a list of device groups: {text}")
    shape, dims, order = found.groups()
    members = _iota(_ints(dims), _ints(order) if order else None)
    n_groups, size = _ints(shape)[0], math.prod(_ints(shape)[1:])
    return tuple(tuple(members[at * size : (at + 1) * size]) for at in range(n_groups))


def _axis_groups(text: str) -> Groups:
    """Groups over the named axes of a mesh whose devices are numbered row-major."""
    grid, _, named = text.partition("]")
    sizes = [(name, int(size)) for name, size in re.findall(r"'([^']*)'=(\d+)", grid)]
    spanned = set(re.findall(r"'([^']*)'", named))
    across = [i for i, (name, _) in enumerate(sizes) if name not in spanned]
    along = [i for i, (name, _) in enumerate(sizes) if name in spanned]
    dims = [size for _, size in sizes]
    members, size = _iota(dims, [*across, *along]), math.prod(dims[i] for i in along)
    return tuple(tuple(members[at : at + size]) for at in range(0, len(members), size))


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _iota(dims: list[int], order: list[int] | None) -> list[int]:
    """0, 1, 2, ... as an array of shape ``dims``, its dimensions permuted by ``order``, read row-major."""
    order = order or list(range(len(dims)))
    strides = [math.prod(dims[dim + 1 :]) for dim in range(len(dims))]
    return [
        sum(strides[dim] * at for dim, at in zip(order, place, strict=True))
        for place in itertools.product(*(range(dims[dim]) for dim in order))
    ]
