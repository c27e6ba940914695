"""Pushes over NCCL in the planned rounds, and an engine that is killed at the first, a middle and
the last round of one: `python -m tools.gpu_check.nccl_push`.

Trainer ranks and two engines of a set are processes, each with a GPU of its own, or an engine on
its trainer rank's where there are fewer than four. The program is that of the tests on null GPUs;
every engine compares each push with plain slicing of the same tensors."""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from tools.bench.host import ROOT
from tools.gpu_check import verdict
from tools.gpu_check.miniatures import device_kind, num_gpus
from tools.gpu_check.verdict import CheckFailed, output_of

PROGRAM = ROOT / "tests" / "unit" / "null_gpu" / "push_processes.py"
ENGINES = 2
ROUNDS = ("first", "middle", "last")


def evaluate(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of what the program saw.

    Raises:
        CheckFailed: an engine or a rank was lost, or an engine lacks the newest weights.
    """
    figures = {"rounds of a push": output["rounds"], "seconds of the pushes": output.get("seconds")}
    if output["lost"] != [0] * len(ROUNDS):
        raise CheckFailed(
            f"engines {output['lost']} were lost, and {len(ROUNDS)} times engine 0 was killed"
        )
    if output["others"] != [True] * len(ROUNDS) * (ENGINES - 1):
        raise CheckFailed(
            "another engine was restarted, or loaded weights of a push that broke", **figures
        )
    if not output["trainer"]:
        raise CheckFailed("a trainer rank did not survive the death of an engine", **figures)
    if output["current"] != [True] * ENGINES or output["sets"] != [ENGINES]:
        raise CheckFailed(
            "after the engine was replaced not all have the newest weights", **figures
        )
    return figures


def check() -> dict[str, Any]:
    """Run the program and judge it."""
    host_option = ["host"] if device_kind() == "cpu" else []
    colocated_option = ["colocated"] if not host_option and num_gpus() < 2 + ENGINES else []
    paths: list[object] = [ROOT, ROOT / "kernels", ROOT / "grading", ROOT / "tests", PROGRAM.parent]
    paths.append(os.environ.get("PYTHONPATH", ""))
    arguments = [str(PROGRAM), "qwen", str(ENGINES), *colocated_option, *host_option, *ROUNDS]
    output = output_of(arguments, "it", PYTHONPATH=os.pathsep.join(map(str, paths)))
    result_lines = [line for line in output.splitlines() if line.startswith("{")]
    if not result_lines:
        raise CheckFailed(f"it says nothing of the engines: {verdict.error_in(output)}")
    return evaluate(json.loads(result_lines[-1])) | {
        "engines": "on the trainer's GPUs" if colocated_option else "apart"
    }


if __name__ == "__main__":
    sys.exit(verdict.run(check))
