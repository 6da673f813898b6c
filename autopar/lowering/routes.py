"""The routes of a local program, for its plan to keep: what was priced is what runs, whatever the prices are then."""

from autopar.lowering.instructions import LocalProgram, Move
from autopar.lowering.predict import walk
from autopar.plan import Route


def routes(local: LocalProgram) -> tuple[Route, ...]:
    """How each of its moves goes, once for all values of one size."""
    moves = (instruction for instruction, _ in walk(local) if isinstance(instruction, Move))
    return tuple(dict.fromkeys(map(_route, moves)))


def _route(move: Move) -> Route:
    value, resharding = move.source.value, move.resharding
    return Route(
        value.shape, value.itemsize, resharding.monoid, (move.source.spec, *resharding.specs[1:-1], move.target.spec)
    )
