"""The checks of a machine with a GPU, in the order of the damage that a failure would do, and their
run: one after the other, each in a process of its own, within the time there is."""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.host import ROOT, environment
from tools.gpu_check import verdict

PYTEST = (
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    # The page shows the end of a check's output, which names what failed.
    "-rfEs",
    "--tb=short",
    "--disable-warnings",
)
# Where only torch and Triton are installed, the conftest files do not import.
STANDALONE_PYTEST = (*PYTEST, "--noconftest", "-c", "/dev/null", "--rootdir", ".")
BENCH_MINUTES = 1.5

PARTS = ("one", "several")
"""Of the checks: those of one GPU, and those of two or more."""


@dataclass(frozen=True)
class Check:
    """One command that succeeds or fails.

    A program of tools/gpu_check prints its verdict (`verdict`); of others the status is the
    verdict.

    Attributes:
        name: how --only names it.
        arguments: the arguments of python, from the repository's root; {out}: the folder of
            results.
        seconds: its limit.
        needs: modules without which it is not possible.
        settles: the lines of docs/gpu-checklist.md that it settles, by a phrase of theirs.
        interpreted: arguments instead, where Triton's interpreter runs on a CPU; none: not run
            there.
        num_gpus: how many it needs."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ("triton", "pytest")
    settles: tuple[str, ...] = ()
    interpreted: tuple[str, ...] = ()
    num_gpus: int = 1

    @property
    def command(self) -> str:
        """The command as it is typed in the repository's root."""
        return " ".join(("python", *self.arguments))

    @property
    def part(self) -> str:
        """The part that it belongs to."""
        return PARTS[self.num_gpus > 1]


TRAINER = ("transformer_engine", "megatron.core", "pydantic", "blake3", "zmq")
ENGINE = (*TRAINER, "vllm")


def _program(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"tools.gpu_check.{name}", *arguments)


def _layers(name: str, case: str, seconds: float, num_gpus: int, settles: str) -> Check:
    arguments = _program("layers", case, "{out}")
    return Check(name, arguments, seconds, TRAINER, (settles,), num_gpus=num_gpus)


FP8_AND_IPC = (
    "tests/gpu/test_fp8_engine.py",
    "tests/gpu/test_push_fp8_gpu.py",
    "tests/gpu/test_push_cuda_ipc.py",
)
BENCH = "`pip install -r requirements/bench.txt && python tools/bench kernels"

CHECKS = (
    _layers(
        "bf16, latent attention, packed batches",
        "one",
        120,
        1,
        "bf16 and latent attention on packed batches",
    ),
    Check(
        "the recipe: sleep, push, wake",
        _program("recipe", "recipe", "{out}"),
        240,
        needs=ENGINE,
        settles=("`rollout.colocated`:", "logprob_diff/mean (about 0.01 expected)"),
    ),
    Check(
        "an FP8 engine, pushed to over CUDA IPC",
        _program("recipe", "fp8", "{out}"),
        200,
        needs=ENGINE,
        settles=("The push over `push.transport: cuda_ipc`", "`push.fp8: true` in an RL run"),
    ),
    _layers(
        "an FP8 step",
        "fp8",
        100,
        1,
        "a DeepSeek-shaped model in bf16 and with `fp8: {recipe: blockwise}`",
    ),
    Check(
        "FP8 products and writes over CUDA IPC, against the CPU",
        (*PYTEST, *FP8_AND_IPC),
        90,
        needs=("pytest", *TRAINER),
        settles=(
            "`pytest tests/gpu/test_fp8_engine.py` on Hopper",
            "FP8 pushes: `pytest tests/gpu/test_push_fp8_gpu.py`",
        ),
    ),
    Check(
        "kernels against fp64",
        (*STANDALONE_PYTEST, "tests/gpu/test_kernels.py"),
        150,
        settles=("`pytest tests/gpu`: the kernels compiled",),
        interpreted=(*PYTEST, "tests/kernels/test_token_logprobs.py", "-k", "triton"),
    ),
    Check(
        "kernels beside their peers",
        _program("kernel_times", "{out}/kernels.json", "--minutes", str(BENCH_MINUTES)),
        60 * BENCH_MINUTES + 60,
        needs=("triton", "numpy", "xxhash"),
        settles=(BENCH,),
    ),
    Check(
        "a rank's share of the vocabulary",
        _program(
            "kernel_times",
            "{out}/kernels-shard.json",
            "--preset",
            "shard",
            "--minutes",
            "1",
        ),
        100,
        needs=("triton", "numpy", "xxhash"),
        settles=(BENCH,),
    ),
    Check(
        "seconds of a decoding pass",
        _program("decode_seconds", "{out}"),
        270,
        needs=ENGINE,
        settles=("`seconds of a decoding pass`",),
    ),
    Check(
        "seconds of a micro-batch",
        _program("step_seconds", "micro-batch", "{out}"),
        200,
        needs=TRAINER,
        settles=("`seconds of a micro-batch`",),
    ),
    Check(
        "seconds between phases",
        _program("step_seconds", "phases", "{out}"),
        240,
        needs=ENGINE,
        settles=("`seconds between phases`",),
    ),
    Check(
        "the driver's answer and torch's",
        (*PYTEST, "tests/unit/engines/server/test_gpu.py"),
        40,
        needs=("pytest", "pydantic"),
        settles=("`pytest tests/unit/engines/server/test_gpu.py`",),
    ),
    Check(
        "a push over NCCL, and an engine killed in it",
        _program("nccl_push"),
        180,
        needs=("pydantic", "zmq", "blake3", "megatron.core"),
        settles=("The push over `push.transport: nccl`",),
        num_gpus=2,
    ),
    Check(
        "the recipe: expert-parallel engines, NCCL",
        _program("recipe", "recipe", "{out}"),
        270,
        needs=ENGINE,
        settles=("Engines with ranks inside:",),
        num_gpus=2,
    ),
    _layers(
        "context parallelism, latent attention",
        "context",
        100,
        2,
        "Context parallelism with Transformer Engine's attention",
    ),
    _layers("tensor x expert", "experts", 100, 2, "2 GPUs: TP 2, EP 2, PP 2"),
    _layers("tensor x expert x pipeline", "grid", 120, 4, "2 GPUs: TP 2, EP 2, PP 2"),
    _layers("all axes", "whole", 120, 8, "2 GPUs: TP 2, EP 2, PP 2"),
    Check(
        "trainer and checkpoints",
        (*PYTEST, "tests/parallel/test_trainer.py", "tests/parallel/test_checkpoints.py"),
        180,
        needs=("pytest", *TRAINER),
        settles=(
            "`pytest tests/unit tests/parallel` in the trainer image",
            "`tests/parallel/test_checkpoints.py` on NCCL",
        ),
        num_gpus=2,
    ),
)


SHORTEST_SECONDS = 20.0
"""A check is not begun with less time than this."""
GRACE_SECONDS = 20.0
"""How long a check whose time is over may take to stop what it has started."""
TAIL_LINES = 25
NO_TIME = "no time"
NOISE = ("nanobind: ", " - leaked ", " - ... skipped remainder", "See https://nanobind")
"""Beginnings of lines that Triton's libraries print when Python ends."""


@dataclass
class CheckOutcome:
    """The outcome of a check.

    Attributes:
        check: the check.
        status: `verdict.PASSED`, `FAILED`, `IMPOSSIBLE` or `NO_TIME`.
        seconds: how long it took.
        reason: the reason of each but the first.
        tail: the end of its output.
        figures: what it has measured."""

    check: Check
    status: str
    seconds: float
    reason: str = ""
    tail: list[str] = field(default_factory=list)
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the outcome with the command as it is typed."""
        return {
            "name": self.check.name,
            "command": self.check.command,
            "settles": self.check.settles,
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "figures": self.figures,
            "tail": self.tail,
        }


def run_all(
    checks: Sequence[Check], out: Path, deadline: float, num_gpus: int
) -> Iterator[CheckOutcome]:
    """Yield the outcome of every check, in order.

    Args:
        checks: the checks to run.
        out: the folder of results.
        deadline: the time at which the checks must have ended, as `time.time()`.
        num_gpus: the number of GPUs of this machine."""
    for check in checks:
        missing_modules = [name for name in check.needs if not _is_installed(name)]
        remaining_seconds = deadline - time.time()
        if missing_modules:
            reason = f"not installed: {', '.join(missing_modules)}"
            yield CheckOutcome(check, verdict.IMPOSSIBLE, 0.0, reason)
        elif num_gpus < check.num_gpus:
            reason = f"it needs {check.num_gpus} GPUs; there: {num_gpus}"
            yield CheckOutcome(check, verdict.IMPOSSIBLE, 0.0, reason)
        elif remaining_seconds < SHORTEST_SECONDS:
            yield CheckOutcome(check, NO_TIME, 0.0, "raise --minutes, or choose it by --only")
        else:
            yield _run_check(check, out, min(check.seconds, remaining_seconds))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _run_check(check: Check, out: Path, seconds: float) -> CheckOutcome:
    arguments = [part.format(out=out) for part in check.arguments]
    log = out / f"{check.name.replace(' ', '-').replace(chr(39), '')}.log"
    start_time = time.time()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            _stop_check(process)
    lines = log.read_text(errors="replace").splitlines()
    status, reason, figures = _verdict_of(code, lines)
    if code is None and status != verdict.PASSED:
        is_cut = seconds < check.seconds
        status = NO_TIME if is_cut else verdict.FAILED
        reason = f"stopped after {seconds:.0f} s{', when the time of all was over' * is_cut}"
    output_lines = [line for line in lines if not line.startswith((verdict.MARK, *NOISE))]
    tail = output_lines[-TAIL_LINES:]
    return CheckOutcome(check, status, time.time() - start_time, reason, tail, figures)


def _stop_check(process: subprocess.Popen[bytes]) -> None:
    """End a check, which stops what it has started, in sessions of their own too."""
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _verdict_of(code: int | None, lines: list[str]) -> verdict.Verdict:
    """Return what a check said, or else what pytest did, which also ends with 0 if all tests were
    skipped: passed is where something ran."""
    if printed_verdict := verdict.read(lines):
        is_consistent = (code == 0) == (printed_verdict.status != verdict.FAILED)
        return printed_verdict if is_consistent else printed_verdict._replace(status=verdict.FAILED)
    summaries = [line for line in lines if re.search(r"\d+ (passed|skipped|failed|error)", line)]
    summary = summaries[-1].strip("= ") if summaries else ""
    if code != 0:
        return verdict.Verdict(verdict.FAILED, summary or f"it ended with status {code}")
    if "skipped" in summary and "passed" not in summary:
        skip_lines = [line for line in lines if line.startswith("SKIPPED")]
        return verdict.Verdict(verdict.IMPOSSIBLE, (skip_lines or [summary])[-1].strip("= "))
    return verdict.Verdict(verdict.PASSED, figures={"tests": summary} if summary else {})
