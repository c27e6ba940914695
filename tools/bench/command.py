"""`python tools/bench WHAT [options]`: one measurement on this machine, with how it was made.

start      from a command to the first token: when, and the CPU seconds by process
step       whole RL steps and those of TRL, with a toy or a pretrained model; or phases of a recipe
fp8        what FP8 training does to the loss, against bf16
push       the weight push, on this machine and planned at the real size
answers    verdicts of the math reward and of math-verify on labelled pairs of one's own
audit      error rates that `megatron-r1 score --audit` estimates, next to those by labels
agents     turns of tool-using agents through the gateway, before an engine that answers at once
prompts    updates with a prompt computed once for all its responses, and for each
controller a full rollout from synthetic engines through the controller to 2,048 ranks
chaos      a run under injected faults: does it end as an undisturbed run does?
algorithms each module of controller/algorithms on the demo's task: steps to 80%, held-out
accuracy
corrections the settings of controller/corrections, where engine and trainer differ: which one when
kernels    r1_kernels against every public peer: time, memory, error
speculative tokens per second of an engine with and without drafts
rewards    grades per second of each reward, and a soak with hostile responses
resources  what r1_kernels' Triton kernels compile to, without a GPU: registers, instructions
why        runs with planted faults, and healthy ones: does `megatron-r1 why` name the fault?"""

import argparse
import datetime
import json
import platform
import sys
from importlib import import_module
from pathlib import Path

from tools.bench import host

OTHER_MODULES = {
    "chaos": "tests.chaos",
    "kernels": "r1_kernels_bench",
    "resources": "r1_kernels_bench.resources",
}
"""Where the benches are that are not in this package."""
IN_FOLDERS = {
    "chaos": "tests.chaos.disturbed_run",
    "controller": "tools.bench.controller.rollout",
    "corrections": "tools.bench.corrections.comparison",
    "fp8": "tools.bench.fp8.losses",
    "kernels": "r1_kernels_bench.command",
    "push": "tools.bench.push.local",
    "rewards": "tools.bench.rewards.pool",
    "step": "tools.bench.step.speed",
    "why": "tools.bench.why.results",
}
"""Benches of several files: the module, in the bench's folder, that runs."""
NAMES = (
    "agents",
    "algorithms",
    "answers",
    "audit",
    "chaos",
    "controller",
    "corrections",
    "fp8",
    "kernels",
    "prompts",
    "push",
    "resources",
    "rewards",
    "speculative",
    "start",
    "step",
    "why",
)
"""Modules of this package, or those of OTHER_MODULES and IN_FOLDERS. Each has
`add_options(parser)`, and `run(args)`, which prints tables and returns the JSON."""


def main() -> int:
    """Return 1 if the result has a non-empty "broken", else 0."""
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choices = parser.add_subparsers(dest="what", required=True)
    # Only the one that is run is imported: kernels and resources need torch and Triton alone.
    bench_name = next((word for word in sys.argv[1:] if word in NAMES), None)
    bench = None
    if bench_name is not None:
        modules = OTHER_MODULES | IN_FOLDERS
        bench = import_module(modules.get(bench_name, f"tools.bench.{bench_name}"))
    for name in NAMES:
        description = bench.__doc__ if name == bench_name else None
        options = choices.add_parser(name, description=description)
        if bench is not None and name == bench_name:
            options.add_argument("--json", type=Path, help="also write the result here")
            bench.add_options(options)
    args = parser.parse_args()
    assert bench is not None, "argparse accepts the names only"
    result = bench.run(args)
    if args.json:
        provenance = {
            "command": " ".join(["python tools/bench", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {host.num_cores()} cores",
            "python": platform.python_version(),
        }
        args.json.write_text(json.dumps({**provenance, **result}, indent=1) + "\n")
    return 1 if result.get("broken") else 0
