"""The notebooks run from top to bottom, and the one that starts from nothing is as short as it says."""

import ast
import io
import re
import tokenize
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
FROM_SCRATCH = "02_autopar_from_scratch"
MAX_CODE_LINES = 300
TIMEOUT_S = 600  # for one cell; a safeguard, not an expectation
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_of(notebook: Any) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def code_lines(code: str) -> set[int]:
    """The lines that are neither blank nor a comment; docstrings count."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    code_tokens = [token for token in tokens if token.type not in NO_CODE]
    return {line for token in code_tokens for line in range(token.start[0], token.end[0] + 1)}


def imported(code: str) -> set[str]:
    """The packages that code imports, wherever it does."""
    nodes = list(ast.walk(ast.parse(code)))
    whole = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    parts = [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in (*whole, *parts)}


def test_there_are_notebooks():
    assert NAMES == ["01_plan_a_step", FROM_SCRATCH]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom(name):
    from nbclient import NotebookClient  # here, because it takes a second to import

    notebook = read(name)
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources=resources).execute()
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code_cells)
    warned = [out.text for cell in code_cells for out in cell.outputs if out.get("name") == "stderr"]
    assert not warned, f"{name} writes to stderr: {warned}"
    if name == FROM_SCRATCH:
        check_what_was_found(notebook)
    else:
        assert any("text/html" in out.get("data", {}) for cell in code_cells for out in cell.outputs)


def check_what_was_found(notebook: Any) -> None:
    """Planned collectives are the compiled ones, and no preset beats the unrestricted plan."""
    printed = "".join(out.text for cell in notebook.cells for out in cell.get("outputs", ()) if "text" in out)
    pairs = re.findall(r"planned +(\d+), compiled +(\d+)", printed)
    assert len(pairs) == 4
    assert all(planned == compiled for planned, compiled in pairs)
    rows = re.findall(r"^(no pins|data parallel|ZeRO-3|Megatron) +([\d.]+) +([\d.]+)$", printed, re.M)
    assert len(rows) == 4
    free, *presets = ([float(text) for text in row[1:]] for row in rows)
    assert all(mine <= theirs for preset in presets for mine, theirs in zip(free, preset, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)


def test_autopar_from_scratch_has_at_most_300_lines_of_code():
    assert len(code_lines(code_of(read(FROM_SCRATCH)))) <= MAX_CODE_LINES


def test_autopar_from_scratch_needs_nothing_but_jax_and_numpy():
    from_elsewhere = imported(code_of(read(FROM_SCRATCH)))
    standard = {"collections", "functools", "itertools", "math", "os", "re", "string"}
    assert from_elsewhere == standard | {"jax", "numpy"}


def test_blank_lines_and_comments_are_no_code_and_every_line_of_a_call_is():
    assert code_lines("# note\n\nx = f(\n    1,  # one\n)\n") == {3, 4, 5}
