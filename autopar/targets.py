"""TARGETs of the command line: ``path/to/file.py[:make]`` or ``package.module:make``, imported and called."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from autopar.errors import TargetError

SHAPE = "path/to/file.py[:make] or package.module:make"
"""How a TARGET is written."""

Setting = int | float | bool | str


@dataclass(frozen=True)
class Target:
    """A training program that a TARGET names.

    Attributes:
        text: the TARGET as it was given.
        make: returns ``(train_step, state, batch)``.
        settings: what ``make`` is called with.
    """

    text: str
    make: Callable[..., Any]
    settings: Mapping[str, Setting]

    def real(self) -> tuple[Callable[..., Any], Any, Any]:
        """Step, state and batch as arrays; raises TargetError if ``make`` refuses."""
        return self._called(self.settings)

    def abstract(self) -> tuple[Callable[..., Any], Any, Any]:
        """Step, state and batch as shapes where ``make`` takes ``abstract=True``, else as arrays."""
        if _takes(self.make, "abstract"):
            try:
                return self._called({**self.settings, "abstract": True})
            except TargetError:
                pass  # it does not know the setting, or not another one either: then this says so
        return self.real()

    def _called(self, settings: Mapping[str, Setting]) -> tuple[Callable[..., Any], Any, Any]:
        try:
            made = self.make(**settings)
        except ImportError as error:
            raise TargetError(
                f"{self.text} lacks a package: {error}",
                where=f"{_name(self.make)}()",
                fix="install what it imports",
            ) from error
        except (TypeError, ValueError) as error:
            given = " ".join(f"{name}={value}" for name, value in self.settings.items())
            raise TargetError(
                f"{self.text} refuses its settings: {error}",
                where=f"--set {given}" if given else f"{_name(self.make)}()",
                fix="give settings that it knows, as --set layers=4 --set width=512",
            ) from error
        if not (isinstance(made, tuple) and len(made) == 3 and callable(made[0])):
            raise TargetError(
                f"{self.text} returns {_described(made)}",
                where=f"{_name(self.make)}()",
                fix="return (train_step, state, batch), the step a function of the other two",
            )
        return made


def load(text: str, settings: Mapping[str, Setting] | None = None) -> Target:
    """The program behind a TARGET; a file is imported with its checkout's root on the path.

    Raises:
        TargetError: no such file, module or attribute, or it does not import.
    """
    place, _, attribute = text.rpartition(":") if ":" in text else (text, "", "make")
    is_file = place.endswith(".py") or "/" in place
    module = _from_file(Path(place), text) if is_file else _from_module(place, text)
    make = getattr(module, attribute, None)
    if not callable(make):
        public = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise TargetError(
            f"{place} has no function '{attribute}'",
            where=f"TARGET {text}",
            fix=f"name one of its functions, as {place}:{next(iter(public), 'make')}",
        )
    return Target(text, make, dict(settings or {}))


def parse_settings(texts: list[str]) -> dict[str, Setting]:
    """Reads ``name=value`` pairs; a value is an int, a float, a bool or else text.

    >>> parse_settings(["layers=4", "dropout=0.1", "tied=false", "optimizer=lion"])
    {'layers': 4, 'dropout': 0.1, 'tied': False, 'optimizer': 'lion'}
    """
    found: dict[str, Setting] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise TargetError(f"setting '{text}' is not name=value", fix="write it as --set layers=4")
        found[name] = _value(value)
    return found


def _value(text: str) -> Setting:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _from_file(path: Path, text: str) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"there is no file {path}", where=f"TARGET {text}", fix=f"write it as {SHAPE}")
    path = path.resolve()
    root = _root(path)
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    with _importable(root):
        loaded = sys.modules.get(name)
        if loaded is not None and _same_file(loaded, path):
            return loaded
        name = name if loaded is None else f"{name}@{path}"  # json.py is not the standard library's
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickling look their module up by name
        try:
            spec.loader.exec_module(module)
        except (ImportError, SyntaxError) as error:
            del sys.modules[name]
            raise _does_not_import(text, error) from error
        return module


def _root(path: Path) -> Path:
    """The folder that holds the package a file belongs to; the file's own folder if it belongs to none."""
    folder = path.parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return folder


def _same_file(module: ModuleType, path: Path) -> bool:
    return bool(module.__file__) and Path(str(module.__file__)).resolve() == path


def _from_module(name: str, text: str) -> ModuleType:
    with _importable(Path.cwd()):
        try:
            return importlib.import_module(name)
        except (ImportError, SyntaxError, ValueError) as error:
            raise _does_not_import(text, error) from error


def _does_not_import(text: str, error: BaseException) -> TargetError:
    return TargetError(
        f"TARGET {text} does not import: {type(error).__name__}: {error}",
        fix=f"write it as {SHAPE}, and install what it imports",
    )


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules in ``folder`` can be imported inside the block."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _takes(make: Callable[..., Any], name: str) -> bool:
    """Whether ``make`` has a parameter of this name, or takes any."""
    parameters = inspect.signature(make).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _name(make: Callable[..., Any]) -> str:
    return getattr(make, "__qualname__", repr(make))


def _described(made: Any) -> str:
    return f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
