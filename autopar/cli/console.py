"""The terminal: tables and JSON on stdout, progress and messages on stderr, and how commands end."""

import functools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.status import Status

from autopar.errors import AutoparError
from autopar.plan.terminal import as_text

WIDTH = 120
"""Columns of what is written to a file or a pipe."""

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
"""Exit codes: a check failed; an error that the user can mend; Ctrl-C with nothing to keep."""


def show(*what: RenderableType) -> None:
    """Writes tables and lines to stdout; plain text of a fixed width where that is no terminal."""
    console = Console(highlight=False, soft_wrap=False)
    for one in what:
        if sys.stdout.isatty():
            console.print(one)
        else:
            sys.stdout.write(as_text(one, WIDTH) + "\n")


def show_json(data: Any) -> None:
    """Writes one JSON object to stdout."""
    sys.stdout.write(json.dumps(data) + "\n")


def note(text: str, style: str = "dim") -> None:
    """Writes a line to stderr."""
    Console(stderr=True, highlight=False).print(text, style=style, markup=False, soft_wrap=True)


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is going on; call the yielded function to change it."""
    console = Console(stderr=True)
    status = Status(text, console=console)
    with status:
        yield lambda line: status.update(line)


@contextmanager
def noticed_interrupts() -> Iterator[list[int]]:
    """Yields a list that gets an entry for every Ctrl-C, which still raises KeyboardInterrupt.

    A solver that has an incumbent keeps it and ends as if nothing had happened: the list tells.
    """
    seen: list[int] = []

    def notice(number: int, frame: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, notice)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def reported(run: Callable[..., None]) -> Callable[..., None]:
    """Ends a command that raises an AutoparError with its message on stderr and exit code 2."""

    @functools.wraps(run)
    def called(*args: Any, **kwargs: Any) -> None:
        try:
            run(*args, **kwargs)
        except AutoparError as error:
            note(f"error: {error}", "red")
            raise typer.Exit(REFUSED) from error
        except KeyboardInterrupt as error:
            note("interrupted before there was anything to keep", "red")
            raise typer.Exit(INTERRUPTED) from error

    return called
