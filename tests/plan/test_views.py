"""How a plan reads: in a terminal, in a notebook, as JSON. None of it needs JAX."""

import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from autopar.cluster import Mesh
from autopar.errors import PlanError
from autopar.plan import Argument, Collective, Plan, Prediction, Solution, View
from autopar.plan.figures import argument_rows, flops, memory_by_cause, nbytes, seconds
from autopar.planner.diff import diff
from autopar.spec import Spec

ROOT = Path(__file__).parents[2]


def spec(*dims: str, partial: tuple[str, ...] = ()) -> Spec:
    """``spec("data tensor", "")`` is [data·tensor, -]."""
    return Spec(tuple(tuple(dim.split()) for dim in dims), frozenset(partial))


def arguments() -> tuple[Argument, ...]:
    layers = [Argument(f"params/h_{i}/kernel", (512, 1024), "float32", spec("", "tensor"), True) for i in range(3)]
    moments = [replace(layer, name=layer.name.replace("params", "opt_state/0/mu")) for layer in layers]
    apart = replace(moments[2], spec=spec("data", "tensor"))
    batch = Argument("tokens", (16, 128), "int32", spec("data", ""), False)
    return (*layers, *moments[:2], apart, batch)


PLAN = Plan(
    fingerprint="0123456789abcdef",
    mesh=Mesh.parse("data=2,tensor=4"),
    hardware="v5e",
    arguments=arguments(),
    outputs=(spec("", "tensor"),),
    values={a.name: a.spec for a in arguments()} | {"h_0/dot_general": spec("data", "", partial=("tensor",))},
    equations={"h_0/dot_general": (("data", "m"), ("tensor", "k"))},
    views={"h_0/dot_general": (View(spec("data", ""), ("h_0/add",)),)},
    prediction=Prediction(
        step_s=3e-3,
        compute_s=2e-3,
        communication_s=1e-3,
        peak_bytes=8e6,
        state_bytes=3e6,
        flops=4.5e9,
        collectives=(
            Collective("all_reduce", ("tensor",), 2e6, 3),
            Collective("all_gather", ("data",), 1e6, 1),
        ),
    ),
    solution=Solution(3e-3, 2.97e-3, False, n_equations=9, replicated_primitives=(("fft", "model.py:3 (f)"),)),
    preset="megatron",
    pins=(("params/<w>", ",tensor"),),
    provenance={"target": "models/gpt.py"},
)


def test_a_plan_prints_well_in_a_terminal(golden):
    golden("plan.terminal", str(PLAN))


def test_rich_shows_the_same_as_str():
    console = Console(record=True, width=110, color_system=None, file=io.StringIO())
    console.print(PLAN)
    shown = "\n".join(line.rstrip() for line in console.export_text().splitlines())
    assert shown.strip() == str(PLAN).strip()


class Checker(HTMLParser):
    """Collects the text; fails on tags that do not close, on scripts and on anything from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href"} & dict(attrs).keys()
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_html_of_a_plan_is_whole_and_loads_nothing():
    page = PLAN._repr_html_()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    text = " ".join(checker.texts)
    for part in (
        "3 ms a step on 8 devices (v5e)",
        "compute",
        "activations and temporaries",
        "params/h_*/kernel",
    ):
        assert part in text
    for part in (
        "all_reduce",
        "preset megatron",
        "pin params/<w>=,tensor",
        "without a rule: fft",
        "within 1.00%",
    ):
        assert part in text
    assert "<w>" not in page  # what users write is escaped


def test_plans_are_read_and_shown_without_jax(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    code = (
        "import sys; from autopar import Plan\n"
        f"plan = Plan.load({str(tmp_path / 'plan.json')!r})\n"
        "assert 'tensor' in str(plan) and 'tensor' in plan._repr_html_()\n"
        "assert 'jax' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_json_gives_the_plan_back():
    assert Plan.from_json(PLAN.to_json()) == PLAN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "not an autopar plan"),
        ("{}", "not an autopar plan"),
        ('{"version": 2}', "plan.json is damaged"),
    ],
)
def test_a_text_that_is_no_plan_is_refused(text, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text, "plan.json")


def test_a_plan_that_cannot_be_written_is_reported(tmp_path):
    with pytest.raises(PlanError, match="cannot be written: No such file or directory"):
        PLAN.save(tmp_path / "missing" / "plan.json")


def test_layers_of_one_layout_share_a_row_and_moments_like_their_parameters_are_summed():
    shown, alike = argument_rows(PLAN)
    assert [(row.name, row.count) for row in shown] == [
        ("params/h_*/kernel", 3),
        ("opt_state/0/mu/h_2/kernel", 1),
        ("tokens", 1),
    ]
    assert [(row.name, row.count) for row in alike] == [("opt_state/0/mu/h_*/kernel", 2)]
    assert shown[0].nbytes == 3 * 512 * 1024 * 4 / 4


def test_what_the_memory_on_the_chip_holds_is_shown_besides():
    plan = replace(PLAN, prediction=replace(PLAN.prediction, on_chip_bytes=2e6))
    assert re.search(r"besides, on the chip +2 MB", str(plan)) and "besides 2 MB on the chip" in plan._repr_html_()
    assert "on the chip" not in str(PLAN) + PLAN._repr_html_()


def test_memory_by_cause_adds_up_to_the_peak():
    causes = memory_by_cause(PLAN)
    assert list(causes) == ["params", "opt_state", "batch and constants", "activations and temporaries"]
    assert sum(causes.values()) == PLAN.prediction.peak_bytes


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (seconds(0.0), "0 s"),
        (seconds(1.5e-9), "1.5 ns"),
        (seconds(0.0999), "99.9 ms"),
        (seconds(120.0), "120 s"),
        (nbytes(0), "0 B"),
        (nbytes(999), "999 B"),
        (nbytes(25e9), "25 GB"),
        (flops(1.25e12), "1.25 TFLOP"),
    ],
)
def test_figures_have_three_digits_and_a_unit(shown, expected):
    assert shown == expected


def test_a_plan_does_not_differ_from_itself():
    found = diff(PLAN, PLAN)
    assert found.empty and found.same_program
    assert all(figure.change == 0 for figure in found.figures)


def test_a_difference_prints_values_that_change_alike_in_one_row():
    names = ("h_0/mul", "h_0/mul:2", "h_0/mul:3", "h_0/add")
    before, after = ({name: spec(axis) for name in names} for axis in ("data", "tensor"))
    after["h_0/mul:3"] = spec()
    text = str(diff(replace(PLAN, values=before), replace(PLAN, values=after)))
    rows = [line.split() for line in text.splitlines() if "[" in line]
    assert rows == [
        ["h_0", "(4", "of", "4)", "mul", "(2", "times)", "[data]", "[tensor]"],
        ["mul:3", "[data]", "[]"],
        ["add", "[data]", "[tensor]"],
    ]
    assert str(diff(PLAN, PLAN)) == "the plans decide the same"


def test_a_difference_lists_the_modules_that_change_most():
    before, after = ({f"h_{i}/mul": spec(axis) for i in range(20)} for axis in ("data", "tensor"))
    text = str(diff(replace(PLAN, values=before), replace(PLAN, values=after)))
    assert "and 8 modules more" in text and text.count("[tensor]") == 12


def test_a_difference_is_grouped_by_module():
    values = dict(PLAN.values) | {"params/h_0/kernel": spec("", ""), "h_1/add": spec("data")}
    del values["h_0/dot_general"]
    prediction = replace(PLAN.prediction, step_s=5e-3, collectives=PLAN.prediction.collectives[:1])
    found = diff(PLAN, replace(PLAN, values=values, prediction=prediction, fingerprint="other"))
    assert not found.same_program and not found.empty
    assert {module.name: (len(module.changes), module.n_values) for module in found.modules} == {
        "params/h_0": (1, 1),
        "h_0": (1, 1),
        "h_1": (1, 1),
    }
    changes = {change.name: change for module in found.modules for change in module.changes}
    assert changes["h_0/dot_general"].after is None and changes["h_1/add"].before is None
    assert [(figure.name, figure.change) for figure in found.collectives] == [("all_gather data", -1e6)]
    assert {f.name: f.change for f in found.figures}["step_s"] == pytest.approx(2e-3)
