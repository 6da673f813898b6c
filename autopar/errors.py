"""Every error a user can meet. A message says what (the value), where, and how to fix it."""


class AutoparError(Exception):
    """Base class of all errors that autopar raises on purpose.

    Args:
        what: the offending value and what is wrong with it.
        where: the equation, source line, file or mesh concerned; empty when there is none.
        fix: one imperative sentence with the call or option that mends it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        parts = [what, f"where: {where}" if where else "", f"to fix: {fix}" if fix else ""]
        super().__init__("\n  ".join(part for part in parts if part))


class MeshError(AutoparError, ValueError):
    """A mesh string that does not parse, or a mesh that does not fit the devices."""


class SpecError(AutoparError, ValueError):
    """A spec that its value's shape or the mesh cannot carry."""


class RuleError(AutoparError, ValueError):
    """A sharding rule that contradicts its equation."""


class UnknownPrimitiveError(AutoparError, NotImplementedError):
    """A primitive without a sharding rule, met under ``strict=True``."""


class TraceError(AutoparError, TypeError):
    """A step that cannot be traced to a jaxpr."""


class PinError(AutoparError, ValueError):
    """A pin that matches nothing, that a shape cannot carry, or that contradicts another."""


class PresetError(AutoparError, KeyError):
    """An unknown preset, or one that the step cannot take."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class HardwareError(AutoparError, KeyError):
    """An unknown hardware profile, or a profile file that does not parse."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class InfeasibleError(AutoparError, ValueError):
    """No plan fits: names the least memory that one needs and the values that make it.

    Attributes:
        least_bytes: what one needs, as far as known; infinite where memory is not what excludes them.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "", least_bytes: float = float("inf")) -> None:
        super().__init__(what, where=where, fix=fix)
        self.least_bytes = least_bytes


class MicrobatchError(AutoparError, ValueError):
    """A step that cannot be split over time as asked."""


class ProblemError(AutoparError, ValueError):
    """A solver problem that is not well formed."""


class PlanError(AutoparError, ValueError):
    """A plan file that does not parse, or that was made for another program, mesh or version."""


class TargetError(AutoparError, ValueError):
    """A TARGET that does not exist or does not return ``(train_step, state, batch)``."""
