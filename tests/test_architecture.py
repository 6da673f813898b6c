"""The house rules that a program can check: sizes, names, imports, printing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "autopar").rglob("*.py"))
EVERYTHING = sorted(p for d in ("autopar", "models", "tests", "benchmarks") for p in (ROOT / d).rglob("*.py"))
MODELS = sorted((ROOT / "models").rglob("*.py"))
WITHOUT_JAX = ("autopar.errors", "autopar.cluster", "autopar.spec", "autopar.solver", "autopar.plan")
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 40, 6

Function = ast.FunctionDef | ast.AsyncFunctionDef


def where(path: Path, line: int = 1) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions() -> Iterator[tuple[Path, Function]]:
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, Function):
                yield path, node


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each absolute import; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def is_inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def n_parameters(function: Function) -> int:
    """All parameters but ``self`` and ``cls``, which the caller does not pass."""
    args = function.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    stars = [a for a in (args.vararg, args.kwarg) if a]
    bound = bool(named) and named[0].arg in ("self", "cls")
    return len(named) + len(stars) - bound


def test_no_module_is_longer_than_400_lines():
    lengths = {where(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: n for name, n in lengths.items() if n > MAX_MODULE_LINES} == {}


def test_no_function_is_longer_than_40_lines():
    lengths = {
        f"{where(path, f.lineno)} {f.name}": (f.end_lineno or f.lineno) - f.lineno + 1 for path, f in functions()
    }
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_no_function_takes_more_than_six_parameters():
    counts = {f"{where(path, f.lineno)} {f.name}": n_parameters(f) for path, f in functions()}
    assert {name: n for name, n in counts.items() if n > MAX_PARAMETERS} == {}


def test_no_module_is_named_util():
    vague = ("util", "utils", "helper", "helpers", "misc")
    assert [where(p) for p in EVERYTHING if p.stem.strip("_") in vague or p.parent.name in vague] == []


def test_only_the_command_line_prints():
    printing = [
        where(path, node.lineno)
        for path in SOURCES
        if path != ROOT / "autopar" / "cli.py"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_only_compat_touches_the_private_parts_of_jax():
    allowed = ROOT / "autopar" / "compat.py"
    private = [
        where(path, line)
        for path in EVERYTHING
        if path != allowed
        for line, name in imported_names(path)
        if is_inside(name, "jax._src") or is_inside(name, "jaxlib._jax")
    ]
    attributes = [
        where(path, node.lineno)
        for path in EVERYTHING
        if path != allowed
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and node.attr == "_src"
    ]
    assert private + attributes == []


def test_models_never_import_autopar():
    users = [where(p, line) for p in MODELS for line, name in imported_names(p) if is_inside(name, "autopar")]
    assert users == []


def test_nothing_catches_every_exception():
    broad = [
        where(path, node.lineno)
        for path in SOURCES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
    ]
    assert broad == []


def test_nothing_is_left_to_do():
    marks = [f"{mark}{sign}" for mark in ("TODO", "FIXME", "XXX") for sign in (":", "(", " ")]
    assert [where(p) for p in EVERYTHING if any(mark in p.read_text(encoding="utf-8") for mark in marks)] == []


def test_plans_are_made_read_and_solved_without_jax():
    names = [name for name in map(dotted, SOURCES) if any(is_inside(name, part) for part in WITHOUT_JAX)]
    code = (
        "import importlib, sys\n"
        f"for name in {['autopar', *names]}:\n"
        "    importlib.import_module(name)\n"
        "    loaded = {'jax', 'jaxlib', 'flax', 'optax'} & {m.partition('.')[0] for m in sys.modules}\n"
        "    assert not loaded, f'importing {name} loads {sorted(loaded)}'\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
