"""Every Triton kernel, compiled for three architectures without a GPU, against what it may use.

The table in docs/benchmarks/kernel-resources.json is what `python tools/bench resources --json`
wrote. Other versions of Triton allot registers otherwise; with them only the absolute limits hold.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from r1_kernels.registry import KERNELS
from r1_kernels_bench import resources, sweep

# Not imported: whether Triton interprets is settled at its first import, here by another test.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton: make setup")

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs/benchmarks/kernel-resources.json"
MUST_NOT_GROW = ("registers", "shared_bytes", "bytes", "barriers", "shuffles", "instructions")
MUST_NOT_SHRINK = ("widest_load", "widest_store", "programs_per_sm")


def bench_resources(*options: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools/bench"), "resources", *options]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """What the bench writes. It fails for a kernel that does not compile, or has no case."""
    folder = tmp_path_factory.mktemp("compiled")
    out = folder / "resources.json"
    # A cache of its own: an entry of somebody else's would be believed.
    done = bench_resources("--json", str(out), TRITON_CACHE_DIR=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.more
def test_no_kernel_spills_and_all_fit_into_shared_memory(compiled):
    limits = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024}
    for name, entry in compiled["kernels"].items():
        assert entry["spilled_bytes"] == 0, name
        assert entry["shared_bytes"] <= limits[name.rpartition("_")[2]], name
        assert entry["programs_per_sm"] >= 1, name


def test_every_element_is_moved_once(compiled):
    # Up to 1.1% more: a quantizer's scale is read by each of the rows that share it.
    for name, entry in compiled["kernels"].items():
        assert entry["bytes"] <= 1.011 * entry["least_bytes"], name


def test_the_loops_over_logits_have_no_barrier_16_byte_accesses_and_one_exponential(compiled):
    for name, entry in compiled["kernels"].items():
        if entry["kernel"] in ("row_statistics_kernel", "logits_gradient_kernel"):
            assert entry["barriers"] == entry["shuffles"] == 0, name
            assert entry["widest_load"] == 16, name
            writes = entry["kernel"] == "logits_gradient_kernel"
            assert entry["widest_store"] == (16 if writes else 0), name
            # One more for every 16 or 32 elements that share a running maximum.
            assert 1 <= entry["mufu"] <= 1 + 1 / 16, name


def test_an_h200s_memory_is_what_limits_every_kernel(compiled):
    for name, entry in compiled["kernels"].items():
        if bounds := entry.get("elements_per_second"):
            assert bounds["memory"] < min(bounds["issue"], bounds["mufu"]), name


def test_no_kernel_grows_beyond_the_committed_table(compiled):
    table = json.loads(TABLE.read_text())
    remedy = "if that is meant: make kernel-files"
    assert compiled["kernels"].keys() == table["kernels"].keys(), remedy
    if table["triton"] != compiled["triton"]:
        pytest.skip(f"the table is Triton {table['triton']}'s: make kernel-files")
    for name, allowed in table["kernels"].items():
        found = compiled["kernels"][name]
        for field in MUST_NOT_GROW:
            assert found[field] <= allowed[field], f"{name}: {field}; {remedy}"
        for field in MUST_NOT_SHRINK:
            assert found[field] >= allowed[field], f"{name}: {field}; {remedy}"


def test_the_alternatives_are_those_that_a_sweep_times():
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == "kept_gradient")
    (choices,) = (choices for choices in sweep.PLAN if choices.kernel == kernel.name)
    held = [(name, choices.present_values) for name, _ in resources.alternatives(kernel)]
    assert [name for name, _ in held] == [
        f"kept_gradient {dtype}, {ids}"
        for ids in ("32", "64*", "128")
        for dtype in ("bf16", "fp32")
    ]
    assert [values["GRADIENT_IDS"] for _, values in held] == [32, 32, 64, 64, 128, 128]
    assert choices.present_values == {"GRADIENT_IDS": 64}


@pytest.mark.more
def test_a_kernel_that_does_not_exist_is_refused_by_name():
    done = bench_resources("--only", "softmax")
    assert done.returncode == 1 and "--only softmax: the kernels are row_stat" in done.stderr


def test_the_interpreter_is_refused_because_it_compiles_nothing():
    done = bench_resources(TRITON_INTERPRET="1")
    assert done.returncode == 1 and "unset it" in done.stderr
