"""How TARGETs are found: files in packages, files alone, modules; settings are typed."""

import sys
import textwrap

import pytest

from autopar.errors import TargetError
from autopar.targets import load, parse_settings

PROGRAM = """
    from {sibling} import LAYERS

    def step(state, batch):
        return state, 0.0

    def make(layers: int = LAYERS, abstract: bool = False):
        return step, ("shapes" if abstract else "arrays", layers), None

    def plain():
        return step, "arrays", None
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """``pack/model.py``, which imports its sibling from the root, and ``alone.py``."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    package = tmp_path / "pack_of_targets"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sizes.py").write_text("LAYERS = 2\n")
    (package / "model.py").write_text(textwrap.dedent(PROGRAM.format(sibling="pack_of_targets.sizes")))
    (tmp_path / "sizes_alone.py").write_text("LAYERS = 3\n")
    (tmp_path / "alone.py").write_text(textwrap.dedent(PROGRAM.format(sibling="sizes_alone")))
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_file_in_a_package_imports_its_siblings_from_the_root_of_the_checkout(checkout):
    target = load(str(checkout / "pack_of_targets" / "model.py"))
    assert target.make.__module__ == "pack_of_targets.model"
    assert target.real()[1] == ("arrays", 2)
    assert str(checkout) not in sys.path


def test_a_file_alone_imports_its_neighbours(checkout):
    assert load(f"{checkout}/alone.py:make").real()[1] == ("arrays", 3)


def test_a_module_is_found_from_the_current_folder(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    assert load("pack_of_targets.model:make", {"layers": 5}).real()[1] == ("arrays", 5)


def test_loading_a_file_twice_gives_the_same_module(checkout):
    path = str(checkout / "alone.py")
    assert load(path).make is load(path).make


def test_a_file_may_be_called_like_an_installed_module(checkout):
    import json

    (checkout / "json.py").write_text("def make():\n    return (lambda s, b: s), 1, 2\n")
    assert load(str(checkout / "json.py")).real()[1:] == (1, 2)
    assert sys.modules["json"] is json


def test_shapes_are_asked_for_where_make_takes_abstract(checkout):
    assert load(str(checkout / "alone.py")).abstract()[1] == ("shapes", 3)
    assert load(f"{checkout}/alone.py:plain").abstract()[1] == "arrays"


def test_a_file_that_does_not_import_is_reported(checkout):
    (checkout / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(TargetError, match="does not import: ModuleNotFoundError: No module named 'nothing_of"):
        load(str(checkout / "broken.py"))


def test_a_program_that_lacks_a_package_says_which(checkout):
    (checkout / "lacking.py").write_text("def make():\n    import nothing_of_that_name\n")
    with pytest.raises(TargetError, match=r"lacks a package: No module named.*\n.*make.*\n.*install what it imports"):
        load(str(checkout / "lacking.py")).real()


def test_settings_become_numbers_and_booleans_where_they_read_like_them():
    texts = ["a=1", "b=-2.5", "c=1e-3", "d=True", "e=no", "f=", "g=a=b"]
    expected = {"a": 1, "b": -2.5, "c": 1e-3, "d": True, "e": "no", "f": "", "g": "a=b"}
    assert parse_settings(texts) == expected


@pytest.mark.parametrize("text", ["layers", "=3", "two words=1"])
def test_a_setting_that_is_no_pair_is_refused(text):
    with pytest.raises(TargetError, match="is not name=value"):
        parse_settings([text])
