"""`python tools/bench WHAT [options]`: measure on this machine, in one run, and say how.

step       whole RL steps beside TRL: tokens per second, overlap; or the phases of a recipe
fp8        what FP8 training does to the loss, against bf16
push       the weight push, here and at the real size
chaos      a run in which everything breaks: is it the run it would have been?
estimators every algorithm of rl/algorithms on the demo's task: steps to 80%, held-out accuracy
kernels    r1_kernels against every public peer: time, memory, error
rewards    grades per second of each reward, and a soak with hostile responses
resources  what r1_kernels' Triton kernels compile to, without a GPU: registers, instructions
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path

import chaos
import cores
import estimators
import fp8
import push
import resources
import rewards
import step

import kernels

BENCHES = {
    "chaos": chaos,
    "estimators": estimators,
    "fp8": fp8,
    "kernels": kernels,
    "push": push,
    "resources": resources,
    "rewards": rewards,
    "step": step,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    choices = parser.add_subparsers(dest="what", required=True)
    for name, bench in BENCHES.items():
        options = choices.add_parser(name, description=bench.__doc__)
        options.add_argument("--json", type=Path, help="also write the result here")
        bench.add_options(options)
    chosen = parser.parse_args()
    result = BENCHES[chosen.what].run(chosen)
    if chosen.json:
        about = {
            "command": " ".join(["python tools/bench", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {cores.count()} cores",
            "python": platform.python_version(),
        }
        chosen.json.write_text(json.dumps({**about, **result}, indent=1) + "\n")
    return 1 if result.get("broken") else 0


if __name__ == "__main__":
    sys.exit(main())
