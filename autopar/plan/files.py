"""Texts of plans in files."""

from pathlib import Path

from autopar.errors import PlanError


def write(path: str | Path, text: str) -> None:
    """Writes a plan's text; raises PlanError if it cannot."""
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise PlanError(f"plan {path} cannot be written: {error.strerror}", fix="check the path") from error


def read(path: str | Path) -> str:
    """Reads a plan's text; raises PlanError if the file is missing or damaged."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"plan {path} cannot be read: {error}", fix="check the path") from error
