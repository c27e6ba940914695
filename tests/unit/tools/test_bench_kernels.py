"""tools/bench kernels: its oracle against plain fp64, its memory reading against a known size, and
that a subject which fails, dies or hangs ends as a row."""

import dataclasses
import math
import sys
import time

import pytest
import torch
from r1_kernels_bench import measure, supervisor, table
from r1_kernels_bench.cases import CASES, KernelCase
from r1_kernels_bench.implementations import OURS, Implementation
from r1_kernels_bench.inputs import (
    PRESETS,
    HiddenInputs,
    LogitsInputs,
    MatrixInputs,
    PolicyInputs,
    ProblemSizes,
)
from r1_kernels_bench.worker import run_case
from refusals import raised
from waiting import PATIENT

CPU = torch.device("cpu")
SMALL = ProblemSizes(tokens=48, vocab=333, hidden=16, dtype="float32")


def plain_loss(logprobs, tokens):
    """The policy loss written out again, with the clip and the KL of the bench's settings."""
    ratio = torch.exp(logprobs - tokens.old.double())
    gain = torch.minimum(ratio * tokens.advantages, ratio.clamp(-9, 11) * tokens.advantages)
    gap = tokens.ref.double() - logprobs
    terms = 0.001 * (torch.exp(gap) - gap - 1) - gain
    return (terms * tokens.mask).sum() / tokens.mask.sum()


def test_the_oracle_of_hidden_states_is_fp64_autograd_through_softmax():
    inputs = HiddenInputs(SMALL, CPU)
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in inputs.leaves(True))
    rows = torch.arange(SMALL.tokens)
    logprobs = torch.softmax(hidden @ weight.t(), -1)[rows, inputs.tokens.targets].log()
    loss = plain_loss(logprobs, inputs.tokens)
    exact = torch.autograd.grad(loss, (hidden, weight))
    # fp64 of the same formulae in another order
    torch.testing.assert_close(inputs.logprobs, logprobs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inputs.exact_hidden, exact[0][inputs.rows], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(inputs.exact_weight, exact[1][inputs.columns], rtol=1e-9, atol=1e-12)
    outputs = {"logprobs": logprobs + 0.5, "hidden": 1.25 * exact[0], "weight": exact[1]}
    errors = inputs.errors(outputs)
    assert errors["log-probs"] == pytest.approx(0.5)
    assert errors["d hidden"] == pytest.approx(0.25)
    assert errors["d weight"] < 1e-9


def test_the_oracle_of_logits_is_fp64_autograd_through_softmax():
    inputs = LogitsInputs(dataclasses.replace(SMALL, dtype="bfloat16"), CPU)
    logits = inputs.logits.detach().double().requires_grad_()
    rows = torch.arange(SMALL.tokens)
    logprobs = torch.softmax(logits, -1)[rows, inputs.tokens.targets].log()
    (exact,) = torch.autograd.grad(plain_loss(logprobs, inputs.tokens), logits)
    torch.testing.assert_close(inputs.logprobs, logprobs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inputs.exact, exact[inputs.rows], rtol=1e-9, atol=1e-12)


def test_the_oracle_of_blocks_walks_ragged_ones_too():
    inputs = MatrixInputs(dataclasses.replace(SMALL, hidden=200), CPU)
    amax = inputs.x[256:333, 128:200].abs().max()  # the last block, cut off on both sides
    last = (inputs.rows >= 256).nonzero()[:, 0]
    scale = inputs.exact_scale[last][:, 128:]
    torch.testing.assert_close(scale, (amax.double() / 448).expand_as(scale))


def test_inputs_are_what_every_implementation_can_take():
    tokens = PolicyInputs(ProblemSizes(tokens=96, vocab=7, hidden=2, dtype="float32"), CPU).tokens
    mask, advantages = tokens.rows(tokens.mask), tokens.rows(tokens.advantages)
    assert not mask[:, -1].any() and mask[:, 0].all()
    assert (advantages == advantages[:, :1]).all()


@pytest.mark.more
@pytest.mark.parametrize("megabytes", [64, 8])
def test_memory_is_what_the_call_needed_whatever_was_freed_before(megabytes):
    meter = measure.CPUMeter()
    torch.ones(megabytes * 2**18).sum()  # the first call keeps memory: threads, tables of kernels
    if meter(lambda: None).extra_bytes is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    kept = [torch.ones(2**18) for _ in range(200)]  # freed memory an allocator likes to keep
    del kept
    sample = meter(lambda: torch.ones(megabytes * 2**18).sum())
    # The reading is in pages, and the process allocates a little of its own.
    assert sample.extra_bytes == pytest.approx(megabytes * 2**20, abs=2**21)


def failing(name, error):
    def load():
        raise error

    return Implementation(name, doubled, load)


def doubled(function, inputs):
    return {"loss": inputs.exact_loss, "logprobs": 2 * inputs.exact}


def doubling(name, **how):
    return Implementation(name, doubled, lambda: None, **how)


def rows_of(*implementations, seconds=PATIENT):
    case = KernelCase("policy_loss", "", PolicyInputs, implementations)
    task = {"sizes": dataclasses.asdict(SMALL), "device": "cpu", "repeats": 2}
    reports = []
    result = run_case(case, task, time.time() + seconds, {}, lambda **m: reports.append(m))
    return result["rows"], reports


@pytest.mark.more
def test_a_subject_that_raises_is_a_row_and_the_others_are_measured():
    rows, _ = rows_of(
        failing("a", ModuleNotFoundError("no", name="liger_kernel")),
        failing("b", torch.OutOfMemoryError("tried to allocate 9 GiB")),
        failing("c", RuntimeError("CUDA error:\n   no kernel image")),
        doubling(OURS),
        doubling("d", gpu_only=True),
    )
    reasons = {row["name"]: row["not_run"] for row in rows}
    assert "liger_kernel" in reasons["a"] and "requirements/bench.txt" in reasons["a"]
    assert reasons["b"] == "out of memory"
    assert reasons["c"] == "RuntimeError: CUDA error: no kernel image"
    assert reasons["d"] == "runs on a GPU only"
    ours = rows[3]
    assert not ours["not_run"] and len(ours["seconds"]) == 2
    assert ours["errors"] == {"loss": 0.0, "d log-probs": pytest.approx(1.0)}


@pytest.mark.more
def test_no_time_left_is_a_reason_too():
    rows, reports = rows_of(doubling(OURS), seconds=-1.0)
    assert "--minutes" in rows[0]["not_run"]
    assert {"doing": OURS} not in reports


WORKER = """
import json, os, signal, sys
task = json.load(sys.stdin)
for case in task["cases"]:
    for name in ("good", "dies", "hangs"):
        print(json.dumps({"case": case, "doing": name}), flush=True)
        if name in task["skip"][case]:
            continue
        if name == "dies" and case == "first":
            os.abort()
        if name == "hangs" and case == "second":
            signal.pause()
    print(json.dumps({"case": case, "result": task["skip"][case]}), flush=True)
print(json.dumps({"done": True}), flush=True)
"""


@pytest.mark.more  # is silent for as long as an honest process may need to start
def test_a_subject_that_kills_or_hangs_its_process_is_left_out_and_the_rest_goes_on():
    task = {"cases": ["first", "second", "third"], "deadline": time.time() + PATIENT}
    found = supervisor.worker_results(
        task, lambda doing: None, silence=30.0, worker=[sys.executable, "-c", WORKER]
    )
    assert dict(found) == {
        "first": {"dies": "ended the process: SIGABRT"},
        "second": {"hangs": "no answer for 30 seconds: stopped"},
        "third": {},
    }


def test_the_table_says_ratios_and_shares_and_reasons():
    rows = [
        {"name": OURS, "computes": "", "not_run": "", "seconds": [0.2, 0.1, 0.4]},
        {"name": "peer", "computes": "no entropy", "not_run": "", "seconds": [0.5]},
        {"name": "other", "computes": "", "not_run": "out of memory", "seconds": []},
    ]
    sizes = [10**6, 25 * 10**6, None]
    for row, size in zip(rows, sizes, strict=True):
        row |= {"extra_bytes": size, "errors": {"log-probs": 1.5e-3} if size else {}}
    bound = {"name": "a copy", "unit": "B", "rate": 1e12, "needed": 5e10}
    case = table.summarize("k", "about", {"rows": rows, "bound": bound})
    assert [row["time_ratio"] for row in case["rows"]] == [1.0, 2.5, None]
    assert case["rows"][1]["memory_ratio"] == 25
    assert math.isclose(case["rows"][0]["share_of_bound"], 0.25)
    lines = table.lines(case)
    assert lines[1].endswith("1 TB/s")
    assert lines[3].split() == [
        "r1_kernels",
        "200",
        "ms",
        "1.00",
        "1",
        "MB",
        "1.00",
        "25%",
        "1.5e-03",
    ]
    assert lines[4].split()[-2:] == ["no", "entropy"]
    assert lines[5].split() == ["other", "not", "run:", "out", "of", "memory"]


def test_presets_and_sizes_are_checked():
    assert PRESETS["shard"].shard == 16_160
    with raised(ValueError, "vocab 10", "tp 3"):
        ProblemSizes(tokens=8, vocab=10, hidden=1, dtype="float32", tp=3)
    with raised(ValueError, "tokens", 12, 8):
        ProblemSizes(tokens=12, vocab=10, hidden=1, dtype="float32")


@pytest.mark.more
def test_a_registered_kernel_that_no_table_includes_is_measured_alone():
    (case,) = [case for case in CASES if case.name == "segment_sums"]
    case = dataclasses.replace(case, implementations=case.implementations[:2])  # no compilation
    task = {"sizes": dataclasses.asdict(SMALL), "device": "cpu", "repeats": 2}
    result = run_case(case, task, time.time() + PATIENT, {}, lambda **m: None)
    for row in result["rows"]:
        assert row["seconds"] and not row["not_run"], row
        assert row["errors"]["result"] < 1e-6, row  # fp32 sums of six numbers
    # 48 values read as fp32
    assert result["bound"]["needed"] == 48 * 4


def test_every_table_has_ours_first():
    assert all(case.implementations[0].name == OURS for case in CASES)
    for case in CASES:
        names = [each.name for each in case.implementations]
        assert len(set(names)) == len(names)


@pytest.mark.first_cases(2)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_our_row_of_every_table_is_measured(case):
    ours = [each for each in case.implementations if each.name.startswith(OURS)]
    case = dataclasses.replace(case, implementations=tuple(ours))
    task = {"sizes": dataclasses.asdict(SMALL), "device": "cpu", "repeats": 1}
    for row in run_case(case, task, time.time() + PATIENT, {}, lambda **m: None)["rows"]:
        assert row["seconds"] and not row["not_run"], row
