"""Every snippet of the README runs, and prints what the README says it prints."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autopar.sharding.registry import SHARDING_RULES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SNIPPET = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:```text\n(?P<printed>.*?)^```\n)?", re.M | re.S)
SMALL = ["--set", "layers=1", "--set", "width=32", "--set", "heads=4", "--set", "seq=16"]


def run_snippets(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The README with what its snippets print now, and pairs of (expected, printed)."""
    namespace: dict[str, object] = {"__name__": "readme"}
    pairs: list[tuple[str, str]] = []

    def rewritten(match: re.Match[str]) -> str:
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream):
            exec(compile(match["code"], "README.md", "exec"), namespace)
        if match["printed"] is None:
            assert not stream.getvalue(), f"prints, but the README does not say what:\n{match['code']}"
            return match[0]
        pairs.append((match["printed"], stream.getvalue()))
        return f"```python\n{match['code']}```\n```text\n{stream.getvalue()}```\n"

    return SNIPPET.sub(rewritten, text), pairs


def test_every_python_snippet_of_the_readme_prints_what_it_says(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SHARDING_RULES, "scale_rows", lambda *_: None)  # so that the README's own is taken back
    text, pairs = run_snippets(README.read_text(encoding="utf-8"))
    assert len(pairs) >= 3
    if request.config.getoption("--update-golden"):
        README.write_text(text, encoding="utf-8")
        return
    for expected, printed in pairs:
        assert printed == expected, "If the new text is right: pytest --update-golden tests/test_readme.py"


def commands() -> list[list[str]]:
    """The arguments of every ``autopar`` command line of the README."""
    lines = re.findall(r"^    (?:.*&& )?autopar (.*)$", README.read_text(encoding="utf-8"), re.M)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.slow  # a minute and a half; tests/cli runs every command on a smaller model
def test_every_command_of_the_readme_works_on_a_small_model(tmp_path, monkeypatch):
    from autopar.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    assert [arguments[0] for arguments in commands()[:2]] == ["plan-and-run", "plan"]
    for arguments in commands():
        settings = SMALL if "models/gpt.py" in arguments else []
        result = CliRunner().invoke(app, [*arguments, *settings])
        assert result.exit_code == 0, f"autopar {' '.join(arguments)}:\n{result.output}"


def test_the_readme_starts_with_the_two_commands_that_do_all_the_set_up():
    text = README.read_text(encoding="utf-8")
    first, second = re.findall(r"^    (pip install .*)$", text, re.M)[:2]
    assert first.startswith("pip install . && autopar plan-and-run models/gpt.py")
    assert second.startswith("pip install -e '.[test]' && pytest")


@pytest.mark.parametrize("name", ["ir", "sharding", "planner", "cost", "solver", "plan", "lowering"])
def test_every_module_that_the_readme_names_exists(name):
    assert f"`{name}`" in README.read_text(encoding="utf-8") or name == "plan"
    assert (ROOT / "autopar" / name).is_dir()
