"""The bench of `why`: every planted change is found in the tree and means something, the copy is
the one that is imported, and verdicts are strict."""

import subprocess
import sys

import pytest

from tools.bench import host
from tools.bench.why import cases, runs, table
from tools.bench.why.cases import Edit, WhyCase

FIRST = {"name": "loss", "reason": "KL with the wrong sign explains it", "remedy": "rl.kl_beta"}
CASE = WhyCase("KL's sign", "dense", {}, ("loss", "kl"), ("wrong sign", r"rl\.kl_beta"))


def result(first, status=1):
    return {"why": {"first": first, "status": status, "seconds": 3.0}, "step_seconds": [1, 2, 3]}


def test_every_edit_is_found_once_and_changes_the_program():
    found = cases.read_table().cases
    assert sum(not case.is_healthy for case in found) >= 36
    assert sum(case.is_healthy for case in found) >= 12
    for case in found:
        cases.apply_edits(case)
        assert case.is_healthy or case.edits or case.settings, case.name


@pytest.mark.parametrize(
    ("replace", "by"),
    [
        ("this text is nowhere", "x"),
        ("import", "export"),  # more than once
        ("import re\n", "import re  # the same\n"),
        ("import re\n", "import (\n"),
    ],
)
def test_an_edit_that_would_plant_nothing_is_refused(replace, by):
    file = "megatron_r1/why/checks/files.py"
    with pytest.raises(ValueError, match="files"):
        cases.apply_edits(WhyCase("x", "dense", {}, ("loss",), (), (Edit(file, replace, by),)))


@pytest.mark.more
def test_the_overlay_is_what_a_process_imports(tmp_path):
    edit = Edit("r1_kernels/policy_terms.py", "MAX_LOG_RATIO = 20.0", "MAX_LOG_RATIO = 21.0")
    overlay = cases.write_overlay(WhyCase("x", "dense", {}, ("loss",), (), (edit,)), tmp_path / "o")
    paths = [str(overlay), *sys.path]
    code = "from r1_kernels.policy_terms import MAX_LOG_RATIO; print(MAX_LOG_RATIO)"
    program = f"import sys; sys.path[:0] = {paths!r}; {code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "21.0", done.stderr
    source = host.ROOT / "kernels" / "r1_kernels" / "policy_terms.py"
    assert "MAX_LOG_RATIO = 20.0" in source.read_text(encoding="utf-8")
    assert (overlay / cases.IMPORTS_FILE).read_text(encoding="utf-8").startswith("r1_kernels ")
    with pytest.raises(RuntimeError, match="controller"):
        cases.check_imports(overlay)


@pytest.mark.parametrize(
    ("first", "verdict"),
    [
        (FIRST, table.NAMED),
        (FIRST | {"reason": "loss is 1, 2 recomputed"}, table.QUANTITY),
        (FIRST | {"remedy": "rl.clip_low"}, table.QUANTITY),
        (FIRST | {"name": "learning rate"}, table.WRONG),
        (None, table.MISSED),
    ],
)
def test_a_fault_is_named_by_its_quantity_and_all_of_its_cause(first, verdict):
    assert table.verdict(CASE, result(first)) == verdict


def test_a_healthy_run_in_which_anything_departs_is_a_false_alarm():
    healthy = WhyCase("healthy", "dense", {})
    assert table.verdict(healthy, result(None, 0)) == table.HEALTHY
    assert table.verdict(healthy, result(FIRST)) == table.ALARM
    assert table.verdict(healthy, result(None, 2)) == table.FAILED
    assert table.verdict(healthy, {}) == table.FAILED


def test_a_case_that_this_cpu_cannot_run_says_what_is_lacking(tmp_path):
    case = WhyCase("FP8", "blocks", {}, ("loss",), cpu_flags=("amx_of_2077", "another"))
    with pytest.raises(RuntimeError, match="lacks amx_of_2077 and another, of which one"):
        runs.run_case(case, {}, 0, tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_costs_are_in_steps_of_the_run():
    assert table.cost_in_steps(result(None)) == 1.5
    about = {"seconds": 60.0, "healthy": False}
    rows = [result(FIRST) | about | {"verdict": table.NAMED, "case": "a"}] * 2
    rows += [about | {"verdict": table.FAILED, "case": "b"}]
    made = table.figures(rows)
    assert (made["faults"], made[table.NAMED], made[table.FAILED]) == (2, 2, 1)
    assert made["median_cost"] == 1.5 and made["total_seconds"] == 180
    page = table.between_markers(f"a\n{table.BEGIN}\nold\n{table.END}\nb\n", rows)
    assert "2 named with their cause (100.0%)" in page and "old" not in page
    assert page.startswith("a\n") and page.endswith("\nb\n")
    with pytest.raises(ValueError, match="end"):
        table.between_markers("a", rows)
