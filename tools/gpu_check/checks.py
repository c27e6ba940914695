"""The checks of a machine with a GPU, in the order of what a second of each proves."""

import re
from collections.abc import Sequence
from typing import NamedTuple

PYTEST: tuple[str, ...] = ("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider")
# The page shows the end of a check's output, which names what failed.
PYTEST += ("-p", "tools.gpu_check.pytest_plugin", "-rfEs", "--tb=short", "--disable-warnings")
# Where only torch and Triton are installed, the conftest files do not import.
STANDALONE = ("--noconftest", "-c", "/dev/null", "--rootdir", ".")
OVERHEAD_SECONDS = 0.5
"""What the launcher needs between two checks."""
ONE, SEVERAL, BY_NAME = "one", "several", "by name"
"""Parts: of one GPU, of two or more, and of what runs only where --only names it."""


class Check(NamedTuple):
    """Tests that run in a process of their own.

    Attributes:
        name: how --only names it.
        tests: the arguments of pytest, from the repository's root.
        limit: the seconds after which it is stopped.
        part: the part that it belongs to."""

    name: str
    tests: tuple[str, ...]
    limit: float
    part: str = ONE

    @property
    def slug(self) -> str:
        """The name of its folder: short, as paths of sockets have 107 bytes."""
        return "-".join(re.findall(r"\w+", self.name)[:4])

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of Python."""
        return (*PYTEST, *self.tests)


def _step(name: str, case: str, limit: float, part: str = ONE) -> Check:
    return Check(name, (f"tests/gpu/test_trainer_step.py::test_step[{case}]",), limit, part)


CHECKS = (
    Check("attention, and what is loaded", ("tests/gpu/test_attention_questions.py",), 45),
    _step("a bf16 step", "one", 35),
    _step("an FP8 step", "fp8", 35),
    Check(
        "the recipe: sleep, push, wake",
        ("tests/gpu/test_recipe.py::test_recipe[recipe]",),
        155,
    ),
    Check(
        "an FP8 engine, pushed to over CUDA IPC",
        (
            "tests/gpu/test_recipe.py::test_recipe[fp8]",
            "tests/gpu/test_recipe.py::test_recipe[fp8-eager]",
        ),
        105,
    ),
    Check("seconds of a micro-batch", ("tests/gpu/test_seconds.py::test_micro_batch",), 45),
    Check(
        "FP8 products, writes over CUDA IPC, the driver",
        (
            "tests/gpu/test_fp8_engine.py",
            "tests/gpu/test_push_fp8_gpu.py",
            "tests/gpu/test_push_cuda_ipc.py",
            "tests/unit/engines/server/test_gpu.py",
        ),
        25,
    ),
    Check("linear_policy_loss, five rounds", ("tests/gpu/test_kernel_times.py",), 25),
    Check("seconds of a decoding pass", ("tests/gpu/test_seconds.py::test_decoding_pass",), 40),
    Check("kernels against fp64", (*STANDALONE, "tests/gpu/test_kernels.py"), 15),
    Check(
        "a push over NCCL, and an engine killed in it",
        ("tests/gpu/test_push_nccl_gpu.py",),
        100,
        SEVERAL,
    ),
    Check(
        "the recipe: expert-parallel engines, NCCL",
        ("tests/gpu/test_recipe.py::test_recipe[nccl]",),
        160,
        SEVERAL,
    ),
    _step("context parallelism, latent attention", "context", 50, SEVERAL),
    _step("tensor x expert", "experts", 50, SEVERAL),
    _step("tensor x expert x pipeline", "grid", 50, SEVERAL),
    _step("all axes", "whole", 50, SEVERAL),
    Check(
        "trainer and checkpoints",
        ("tests/parallel/test_trainer.py", "tests/parallel/test_checkpoints.py"),
        65,
        SEVERAL,
    ),
    Check("seconds between phases", ("tests/gpu/test_seconds.py::test_phases",), 240, BY_NAME),
)
INTERPRETED = (
    Check("kernels", ("tests/kernels/test_token_logprobs.py", "-k", "triton"), 300, BY_NAME),
)
"""Runs in Triton's interpreter."""


def seconds_for(check: Check, later: Sequence[Check], remaining: float, factor: float) -> float:
    """Return the seconds that a check may take; 0 where its limit is more than what remains.

    It gets these, without the limits of the later checks, which are `factor` times as long where
    the budget has more time than all checks need."""
    if check.limit > remaining:
        return 0.0
    reserved = sum(factor * each.limit + OVERHEAD_SECONDS for each in later)
    return max(check.limit, remaining - reserved)
