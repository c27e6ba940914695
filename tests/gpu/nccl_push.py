"""Pushes over NCCL in the planned rounds, and an engine that is killed at the first, a middle and
the last round of one.

Trainer ranks and two engines of a set are processes, each with a GPU of its own, or an engine on
its trainer rank's where there are fewer than four. The program is that of the tests on null GPUs;
every engine compares each push with plain slicing of the same tensors."""

import json
import os

from gpu_miniatures import device_kind, num_gpus
from processes import error_in, output_of

from tools.bench.host import ROOT

PROGRAM = ROOT / "tests" / "unit" / "null_gpu" / "push_processes.py"
ENGINES = 2
ROUNDS = ("first", "middle", "last")


def check(record_figures) -> None:
    """Run the program and judge it."""
    host_option = ["host"] if device_kind() == "cpu" else []
    colocated_option = ["colocated"] if not host_option and num_gpus() < 2 + ENGINES else []
    paths = [ROOT, ROOT / "kernels", ROOT / "grading", ROOT / "tests", PROGRAM.parent]
    path = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    arguments = [str(PROGRAM), "qwen", str(ENGINES), *colocated_option, *host_option, *ROUNDS]
    output = output_of(arguments, "it", PYTHONPATH=path)
    result_lines = [line for line in output.splitlines() if line.startswith("{")]
    assert result_lines, f"it says nothing of the engines: {error_in(output)}"
    seen = json.loads(result_lines[-1])
    place = "on the trainer's GPUs" if colocated_option else "apart"
    record_figures({"rounds": seen.pop("rounds"), "seconds": seen.pop("seconds"), "engines": place})
    assert seen == {
        "lost": [0] * len(ROUNDS),
        "others": [True] * len(ROUNDS) * (ENGINES - 1),
        "trainer": True,
        "current": [True] * ENGINES,
        "sets": [ENGINES],
    }, seen
