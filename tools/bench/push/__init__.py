"""The weight push, on this machine and at the real size.

From a trainer to an engine here, compared with memory copies and with export and reload. With
--simulate: the order of pushes over NCCL at their real size, executed by a model of stream queues.
With --control-path: 256 processes that meet, push to each other, and die in the middle. With
--gloo: rates of gloo on this machine."""

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from tools.bench.push.control import control_path
from tools.bench.push.here import gloo_rates, measure, model
from tools.bench.push.scale import simulate

ENGINES = {
    "bf16-plain": ("bfloat16", True),
    "bf16": ("bfloat16", False),
    "fp32": ("float32", False),
}
"""The dtype of each variant, and whether matrices stay plain; else vLLM packs them for oneDNN."""


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--simulate", action="store_true", help="only the simulation at scale")
    options.add_argument("--control-path", action="store_true", help="only 256 processes")
    options.add_argument("--gloo", action="store_true", help="only gloo's rates here")
    options.add_argument("--repeats", type=int, default=30, help="pushes")
    options.add_argument("--reloads", type=int, default=5, help="exports and reloads")
    options.add_argument("--hidden", type=int, default=2048, help="of the model pushed here")
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the measurements on this machine, or what an option selects."""
    if chosen.simulate:
        return simulate()
    if chosen.control_path:
        return control_path()
    if chosen.gloo:
        found = {"two": gloo_rates(2), "four": gloo_rates(4)}
        _print_values({f"{n}: {k}": v for n, of in found.items() for k, v in of.items()})
        return found
    here = {}
    for name in chosen.engines:
        dtype, plain_matrices = ENGINES[name]
        shape = model(chosen.hidden, chosen.layers, dtype)
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(Path(folder), shape, plain_matrices, chosen.repeats, chosen.reloads)
            here[name] = asyncio.run(measured)
        rounds = f"{chosen.repeats} pushes and {chosen.reloads} reloads, without the first"
        print(f"here, {name}: medians of {rounds}", flush=True)
        _print_values(here[name])
    return {"here": here}


def _print_values(found: dict[str, Any]) -> None:
    for key, value in found.items():
        values = value if isinstance(value, list) else [value]
        shown = (each if isinstance(each, str) else f"{each:.4g}" for each in values)
        print(f"    {key:48} {' to '.join(shown)}")
