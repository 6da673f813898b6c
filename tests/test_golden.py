"""The golden fixture itself: it compares, shows a readable difference, and updates on request."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile("def test_text(golden):\n    golden('poem', 'roses  \\nviolets\\n')")
    pytester.mkdir("golden")
    return pytester


def test_equal_text_passes_whatever_the_spaces_at_the_ends_of_lines(project):
    (project.path / "golden" / "poem.txt").write_text("roses\nviolets\n")
    project.runpytest_inprocess().assert_outcomes(passed=1)


def test_a_difference_fails_and_is_shown_line_by_line(project):
    (project.path / "golden" / "poem.txt").write_text("roses\nlilies\n")
    result = project.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*--- tests/golden/poem.txt", "*-lilies", "*+violets", "*pytest --update-golden*"])
    assert (project.path / "golden" / "poem.txt").read_text() == "roses\nlilies\n"


def test_a_missing_file_fails_and_is_not_written(project):
    project.runpytest_inprocess().assert_outcomes(failed=1)
    assert not (project.path / "golden" / "poem.txt").exists()


def test_the_update_option_writes_what_the_next_run_expects(project):
    project.runpytest_inprocess("--update-golden").assert_outcomes(passed=1)
    assert (project.path / "golden" / "poem.txt").read_text() == "roses\nviolets\n"
    project.runpytest_inprocess().assert_outcomes(passed=1)
