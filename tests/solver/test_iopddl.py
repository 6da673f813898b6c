"""The contest's file format: reading, exact scoring, solving."""

import gzip
import json

import pytest

from autopar.errors import ProblemError
from autopar.solver import exact_score, read_iopddl, solve

FORBIDDEN = 10**18
INSTANCE = {
    "problem": {
        "name": "tiny",
        "nodes": {
            "intervals": [[0, 3], [1, 4], [2, 2]],
            "costs": [[4, 2], [7, 1, FORBIDDEN], [3]],
            "usages": [[5, 9], [6, 8, 1], [100]],
        },
        "edges": {
            "nodes": [[0, 1], [1, 2], [0, 1]],
            "costs": [[1, 2, 3, 4, 5, 6], [0, 10, 0], [0, 0, 0, 1, 0, 0]],
        },
        "usage_limit": 14,
    }
}


@pytest.mark.parametrize("packed", [False, True])
def test_an_instance_is_read_scored_and_solved(tmp_path, packed):
    text = json.dumps(INSTANCE).encode()
    path = tmp_path / ("tiny.json.gz" if packed else "tiny.json")
    path.write_bytes(gzip.compress(text) if packed else text)
    problem = read_iopddl(path)
    # [1, 1] needs 9 + 8 bytes; [1, 0] needs 9 + 6 bytes; what remains is [0, 0] (1 + 4 + 7 + 3) or [0, 1].
    choice = solve(problem)
    assert choice.proven and choice.strategies == (0, 0, 0)
    assert exact_score(path, choice.strategies) == (15, 11, True)
    assert exact_score(path, (1, 1, 0)) == (21, 17, False)
    assert exact_score(path, (0, 2, 0))[2] is False
    assert problem.cost((1, 1, 0)) == 21.0 and problem.peak((1, 1, 0)) == 17.0


def test_sums_beyond_int64_are_scored_exactly(tmp_path):
    huge = json.loads(json.dumps(INSTANCE))
    huge["problem"]["nodes"]["costs"] = [[9 * 10**17, 0]] * 2 + [[9 * 10**17 + 1]]
    huge["problem"]["nodes"]["usages"] = [[0, 0], [0, 0], [0]]
    huge["problem"]["edges"] = {"nodes": [[0, 1]], "costs": [[9 * 10**17] * 4]}
    path = tmp_path / "huge.json"
    path.write_text(json.dumps(huge))
    assert exact_score(path, (0, 0, 0))[0] == 4 * 9 * 10**17 + 1


UNEQUAL = {"problem": {**INSTANCE["problem"], "edges": {"nodes": [], "costs": [[1]]}}}


@pytest.mark.parametrize("text", ["{}", "nonsense", json.dumps(UNEQUAL), '{"problem": {"nodes": {}}}', "[1]"])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ProblemError, match="is not an IOPDDL instance"):
        read_iopddl(path)
