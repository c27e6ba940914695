"""tools/gpu_check: what passes, fails and is skipped is reported so, and its commands exist."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from waiting import PATIENT

from megatron_r1 import config as configuration
from megatron_r1.models import read_hf_config
from megatron_r1.models.hf_config import sparse_layers
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.timing import time_section
from tools.gpu_check import (
    decode_seconds,
    kernel_times,
    layers,
    nccl_push,
    recipe,
    runner,
    step_seconds,
    verdict,
)
from tools.gpu_check.checks import CHECKS, PARTS, STANDALONE_PYTEST, Check
from tools.gpu_check.command import page

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
IMPOSSIBLE = verdict.IMPOSSIBLE


def planned():
    """The recipe on its GPUs."""
    recipe = ROOT / "examples" / "deepseek_r1" / "r1_zero.yaml"
    hf_config = read_hf_config(str(ROOT / "examples" / "deepseek_r1" / "model"))
    return PlannedJob(hf_config, configuration.load_recipe(recipe), 2048, HARDWARE["H800"])


def outcomes(tmp_path, *checks, minutes=PATIENT / 60, num_gpus=1):
    return list(runner.run_all(checks, tmp_path, time.time() + 60 * minutes, num_gpus))


def python(code, **options):
    options = {"seconds": PATIENT, "needs": (), **options}
    return Check("a check", ("-c", code), **options)


def says(status, **more):
    line = verdict.MARK + json.dumps({"status": status, "reason": "", "figures": {}} | more)
    # The runner fills {out} into arguments.
    return python(
        f"print({line!r}); raise SystemExit({status == 'failed'})".replace("{", "{{").replace(
            "}", "}}"
        )
    )


@pytest.mark.parametrize(
    ("check", "status", "words"),
    [
        (python("print('3 passed in 1 s')"), "passed", ""),
        (python("print('1 passed, 2 skipped'); print('nanobind: leaked')"), "passed", ""),
        (python("print('2 skipped in 1 s')"), IMPOSSIBLE, "2 skipped"),
        (python("print('SKIPPED [1] no FP8 here'); print('1 skipped')"), IMPOSSIBLE, "no FP8 here"),
        (python("import sys; sys.exit('it is broken')"), "failed", "status 1"),
        (python("import signal; signal.pause()", seconds=1), "failed", "stopped after 1 s"),
        (python("", needs=("no_such_module",)), IMPOSSIBLE, "not installed: no_such_module"),
        (python("", needs=("no_such.module",)), IMPOSSIBLE, "not installed: no_such.module"),
        (python("", num_gpus=2), IMPOSSIBLE, "it needs 2 GPUs"),
        (says("passed", figures={"seconds": 3}), "passed", ""),
        (says("failed", reason="the sum is wrong"), "failed", "the sum is wrong"),
        (says(IMPOSSIBLE, reason="no FP8"), IMPOSSIBLE, "no FP8"),
    ],
)
def test_what_becomes_of_a_check(tmp_path, check, status, words):
    (outcome,) = outcomes(tmp_path, check)
    assert outcome.status == status and words in outcome.reason
    assert bool(outcome.reason) == (status != "passed")


PROGRAM = """
import sys, time
from tools.gpu_check import verdict

def check():
    BODY

sys.exit(verdict.run(check))
"""


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("return dict(gap=0.5)", "passed", ""),
        ("raise verdict.CheckFailed('the gap is 2', gap=2)", "failed", "the gap is 2"),
        ("raise verdict.Impossible('no FP8')", IMPOSSIBLE, "no FP8"),
        ("print(1 / 0)", "failed", "ZeroDivisionError: division by zero"),
    ],
)
def test_the_verdict_of_a_program(tmp_path, body, status, words):
    (outcome,) = outcomes(tmp_path, python(PROGRAM.replace("BODY", body)))
    assert outcome.status == status and words in outcome.reason
    assert ("gap" in outcome.figures) == ("gap" in body)


def test_a_program_whose_time_is_over_stops_what_it_has_started(tmp_path):
    stopped = tmp_path / "stopped"
    body = f"""
    open({str(tmp_path / "began")!r}, "w")
    try:
        time.sleep(1000)
    finally:
        open({str(stopped)!r}, "w")
    """
    (outcome,) = outcomes(tmp_path, python(PROGRAM.replace("BODY", body), seconds=3))
    assert outcome.status == "failed" and "stopped after 3 s" in outcome.reason
    assert stopped.exists() or not (tmp_path / "began").exists()


def test_a_check_that_the_time_of_all_cuts_has_not_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "SHORTEST_SECONDS", 0.0)
    (outcome,) = outcomes(tmp_path, python("import signal; signal.pause()"), minutes=1 / 60)
    assert outcome.status == runner.NO_TIME and "stopped" in outcome.reason


def test_a_check_is_not_begun_too_late(tmp_path):
    (outcome,) = outcomes(tmp_path, python("print('ran')"), minutes=0)
    assert outcome.status == "no time" and "--minutes" in outcome.reason


def test_the_end_of_a_failed_test_s_output_names_it(tmp_path):
    file = tmp_path / "test_planted.py"
    warned = "    warnings.warn('noise', stacklevel=1)\n" * runner.TAIL_LINES
    file.write_text(f"import warnings\ndef test_broken():\n{warned}    assert not 'planted'\n")
    (outcome,) = outcomes(
        tmp_path, Check("a check", (*STANDALONE_PYTEST, str(file)), PATIENT, needs=())
    )
    assert outcome.status == "failed"
    assert any("FAILED" in line and "test_broken" in line for line in outcome.tail)
    assert any("assert not 'planted'" in line for line in outcome.tail)


def test_the_page_names_what_is_settled_and_shows_what_failed(tmp_path):
    good, bad = python("", settles=("a line",)), python("raise SystemExit('broken')")
    about = {"command": "x", "date": "today", "gpus": ["H100"], "nvidia-smi": ["driver 1"]}
    about |= {"cuda": "13", "python": "3", "processor": "CPU", "versions": {"torch": "2"}}
    text = page(about, outcomes(tmp_path, good, bad, says("passed", figures={"gap": 0.5})))
    assert re.search(r"\| a check \| passed \| \d+ \| a line \|", text)
    assert "## Failed: a check" in text and "broken" in text
    assert "| gap 0.5 |" in text
    assert "meaningless" not in text
    text = page(about | {"gpus": ["NVIDIA H100 (null)"]}, outcomes(tmp_path, good))
    assert "times are meaningless" in text and "a line" not in text


STEPS = {"gap": 0.02, "moved": 0.5, "cosine": 0.94}
TRAINED = {
    "before": {**STEPS, "cosine": 0.0},
    "update": {"grad_norm": 4.1},
    "after": STEPS,
    "parts": {"attention": "TEDotProductAttention (Transformer Engine)"},
}
LINE = {"grad_norm": 4.0, "logprob_diff/mean": 0.007, "push/probe_diff": 0.003}
RUN = [LINE | {"step": step} for step in (1, 2)]
PUSHES = {
    **{"lost": [0] * 3, "others": [True] * 3, "trainer": True, "current": [True] * 2},
    **{"sets": [2], "rounds": [13] * 3},
}
OURS = {"name": "r1_kernels", "median_seconds": 1e-3, "share_of_bound": 0.8, "not_run": ""}
EAGER = OURS | {"name": kernel_times.EAGER, "errors": {"loss": 2e-6}}
KERNEL = {"kernel": "policy_loss", "failed": "", "rows": [OURS | {"errors": {"loss": 1e-6}}, EAGER]}


def trained(backend="FusedAttention", **parts):
    found = {name: TRAINED[name] | parts.get(name, {}) for name in TRAINED}
    return layers.evaluate(found, {"update": {"grad_norm": 4.0}}, backend)


def ran(lines, *used):
    memory = recipe.UsedMemory()
    memory.samples.extend(used)
    return recipe.evaluate(lines, 2, memory, 0.05)


def timed(**changes):
    return kernel_times.evaluate([KERNEL | changes])


@pytest.mark.parametrize(
    ("judge", "wrong", "words"),
    [
        (lambda: trained(), False, "cosine"),
        (lambda: trained(before={"gap": 0.1}), True, "differ by 0.1 nats"),
        (lambda: trained(before={"gap": float("nan")}), True, "differ by nan nats"),
        (lambda: trained(update={"grad_norm": 3.7}), True, "norm is 3.7"),
        (lambda: trained(after={"cosine": 0.2}), True, "cosine 0.2"),
        (lambda: trained(backend=layers.UNFUSED_ATTENTION), True, layers.UNFUSED_ATTENTION),
        (lambda: ran(RUN, 10, 60, 8, 55, 0), False, "woke"),
        (lambda: ran(RUN[:1]), True, "steps [1]"),
        (lambda: ran([RUN[0], RUN[1] | {"logprob_diff/mean": 0.8}]), True, "differ by 0.8"),
        (lambda: ran([RUN[0], RUN[1] | {"grad_norm": 0.0}]), True, "norm is 0.0"),
        (lambda: ran([RUN[0], {**RUN[1], "push/probe_diff": None}]), True, "no probe"),
        (lambda: ran(RUN, 10, 60, 58, 60, 0), True, "while they sleep"),
        (lambda: nccl_push.evaluate(PUSHES), False, "rounds"),
        (lambda: nccl_push.evaluate(PUSHES | {"lost": [0, 1, 0]}), True, "[0, 1, 0]"),
        (lambda: nccl_push.evaluate(PUSHES | {"others": [True, False, True]}), True, "restarted"),
        (lambda: nccl_push.evaluate(PUSHES | {"trainer": False}), True, "trainer rank"),
        (lambda: nccl_push.evaluate(PUSHES | {"current": [True, False]}), True, "newest weights"),
        (lambda: timed(), False, "policy_loss"),
        (lambda: timed(failed="illegal memory access"), True, "illegal memory access"),
        (lambda: timed(failed=kernel_times.TOO_LATE, rows=[]), True, "no kernel was measured"),
        (lambda: timed(rows=[OURS | {"errors": {"loss": 1e-2}}, EAGER]), True, "error of loss"),
        (lambda: timed(rows=[EAGER]), True, "no time was measured"),
    ],
)
def test_a_subject_that_is_broken_is_judged_so(judge, wrong, words):
    if not wrong:
        assert any(words in name for name in judge())
        return
    with pytest.raises(verdict.CheckFailed) as failed:
        judge()
    assert words in str(failed.value)


SIZES = dict(zip(decode_seconds.VARIANTS, (8e8, 8e8, 3.6e9), strict=True))
DENSE_AND_HEAD = 2e9
FEW_BYTES = DENSE_AND_HEAD + SIZES[decode_seconds.FEW]


def decoded(latency, efficiency, rest=3e-3):
    """The judge's values of engines whose layers take so long, by hand."""
    read = 3.35e12 * efficiency
    seconds = {
        variant: rest
        + DENSE_AND_HEAD / read
        + variant.layers * latency
        + (variant.layers - 1) * SIZES[variant] / read
        for variant in decode_seconds.VARIANTS
    }
    return decode_seconds.evaluate(seconds, SIZES, FEW_BYTES, HARDWARE["H100"])


def test_the_seconds_of_a_pass_are_split_into_weights_layers_and_the_rest():
    found = decoded(90e-6, 0.7)
    assert found == pytest.approx(
        {"decode_latency_per_layer": 90e-6, "bandwidth_efficiency": 0.7, "pass_seconds": 3e-3}
    )
    for latency, efficiency, rest, words in (
        (90e-6, 1.2, 3e-3, "1.20"),
        (-1e-4, 0.7, 3e-3, "besides its weights"),
        (90e-6, 0.7, -1e-4, "besides its layers"),
    ):
        with pytest.raises(verdict.CheckFailed, match=words):
            decoded(latency, efficiency, rest)
    same = dict.fromkeys(decode_seconds.VARIANTS, 0.01)
    with pytest.raises(verdict.CheckFailed, match="more layers"):
        decode_seconds.evaluate(same, SIZES, FEW_BYTES, HARDWARE["H100"])


def test_engines_of_a_rank_s_share_have_v3_s_widths_and_a_layer_its_bytes(monkeypatch):
    """By hand: MLA of 16 heads, a shared expert, the router and 8 or 40 experts, in bf16."""
    monkeypatch.setattr(decode_seconds, "device_kind", lambda: "gpu")
    attention = 7168 * (1536 + 576) + 16 * (1536 * 192 + 512 * 256 + 128 * 7168)
    for variant in decode_seconds.VARIANTS:
        hf_config = decode_seconds.model(variant, {"vocab_size": 300})
        assert hf_config["vocab_size"] == 300 and "quantization_config" not in hf_config
        assert sparse_layers(hf_config) == [False] + [True] * (variant.layers - 1)
        weights = attention + (1 + variant.experts) * 3 * 7168 * 2048 + variant.experts * 7168
        assert decode_seconds.layer_bytes(hf_config) == pytest.approx(2 * weights, rel=1e-3)
        dense = attention + 3 * 7168 * 18432 + 300 * 7168  # and the head
        whole = 2 * (dense + (variant.layers - 1) * weights)
        assert decode_seconds.pass_bytes(hf_config) == pytest.approx(whole, rel=1e-3)


def test_the_numbers_of_the_phases_are_those_with_which_the_plan_takes_their_seconds():
    """Seconds that the planner itself gives with other numbers lead back to these."""
    wanted = {"tensor_load_seconds": 3e-4, "push_efficiency": 0.5}
    hidden = planned()
    hidden = replace(hidden, assumptions=replace(hidden.assumptions, **wanted))
    hidden = replace(hidden, hardware=replace(hidden.hardware, host_link=20e9))
    section = time_section(JobEstimate(hidden).times)
    every = hidden.config.checkpoint.every
    line = {
        "push/pause": section["load"].value,
        "push/transfer": section["push"].value,
        "checkpoint/seconds_blocked": section["saves"].value * every,
    }
    log = (
        "INFO It took 0.400000 seconds to fall asleep.\n"
        "INFO It took 0.700000 seconds to wake up tags {'weights'}.\n"
        "INFO It took 0.200000 seconds to wake up tags {'kv_cache'}.\n"
    )
    found = step_seconds.fit_phases([line] * 3, 2 * log, planned())
    assert found == pytest.approx(
        wanted | {"host_link": 20e9, "sleep_seconds": 0.4, "wake_seconds": 0.9}
    )
    assert step_seconds.fit_phases([{"step": 2}], "", planned()) == {}


@pytest.mark.more
@pytest.mark.parametrize(
    ("command", "planted", "where", "words"),
    [
        (["layers", "one"], None, HERE, ""),
        (["layers", "one"], "packing", HERE, "differ by"),
        (["layers", "one"], "gradient", HERE, "cosine"),
        (["layers", "fp8"], None, HERE, ""),
        (["layers", "fp8"], "gradient", HERE, "cosine"),
        (["layers", "context"], None, HERE, ""),
        (["recipe", "recipe"], None, HERE, ""),
        (["recipe", "recipe"], "undelivered", ROOT / "tests" / "system", "not what the engine"),
        (["recipe", "fp8"], None, HERE, ""),
        (["step_seconds", "micro-batch"], None, HERE, ""),
        (["step_seconds", "phases"], None, HERE, ""),
        (["decode_seconds"], None, HERE, ""),
    ],
)
def test_the_checks_themselves_without_a_gpu(tmp_path, command, planted, where, words):
    """Where there is none, the same programs compute on the CPU, in the recipe's bf16."""
    name, *case = command
    folder = where / ("planted_in_checks" if where == HERE else "planted")
    variables = {"PYTHONPATH": f"{folder}:{ROOT}", "PLANTED": planted} if planted else {}
    done = subprocess.run(
        [sys.executable, "-m", f"tools.gpu_check.{name}", *case, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    said = verdict.read(done.stdout.splitlines())
    assert said, done.stderr[-4000:]
    assert (said.status, words in said.reason) == ("failed" if planted else "passed", True), said
    assert done.returncode == (planted is not None)
    if name == "step_seconds":  # these programs also found the numbers that they are for
        number = {"micro-batch": "compute_efficiency", "phases": "tensor_load_seconds"}[case[0]]
        assert said.figures[number] > 0
    assert not (tmp_path / "calibration.yaml").exists()  # a CPU's times say nothing of a GPU


def test_every_check_is_of_files_and_lines_that_exist():
    checklist = " ".join((ROOT / "docs" / "gpu-checklist.md").read_text().split())
    assert {check.part for check in CHECKS} == set(PARTS)
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        files = [part for part in (*check.arguments, *check.interpreted) if "/" in part]
        if check.arguments[1].startswith("tools."):
            files.append(f"{check.arguments[1].replace('.', '/')}.py")
        for file in files:
            if not file.startswith(("{out}", "/dev")):
                assert (ROOT / file).exists(), f"{check.name}: {file}"
        for phrase in check.settles:
            assert phrase in checklist, f"{check.name}: {phrase}"


@pytest.mark.more
def test_without_a_gpu_it_says_what_to_do():
    done = subprocess.run(
        [sys.executable, "tools/gpu_check"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "--interpret" in done.stderr


KERNELS = next(check for check in CHECKS if check.name == "kernels against fp64")
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "zmq", "blake3", "msgspec", "megatron", "vllm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""


@pytest.mark.more
@pytest.mark.parametrize(
    "arguments",
    [
        ("tools/gpu_check", "--help"),
        ("tools/bench", "kernels", "--help"),
        (*KERNELS.arguments, "--collect-only"),
    ],
)
def test_torch_and_triton_are_enough_for_the_kernels(tmp_path, arguments):
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join((str(tmp_path), str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_reason_against_fused_attention_is_read_from_the_log():
    log = (
        "[DEBUG    | DotProductAttention]: Running with config={'cudnn_version': '9.19.0'}\n"
        "[DEBUG    | DotProductAttention]: Disabling FusedAttention as no backend supports the "
        "provided input\n"
        "[INFO     | DotProductAttention]: Running with UnfusedDotProductAttention backend\n"
    )
    assert layers._logged_backends(2 * log) == "UnfusedDotProductAttention"
    assert layers._why_not_fused(2 * log) == "no backend supports the provided input"
