"""The weight push: on this machine, trainer to engine, against memory copies and against export and
reload; at the real size, what the plan moves and how long it takes to make."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from push.here import measure, model
from push.real_size import plan_of_671b


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--repeats", type=int, default=30, help="pushes")
    options.add_argument("--reloads", type=int, default=5, help="exports and reloads")
    options.add_argument("--hidden", type=int, default=1024, help="of the model pushed here")
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options.add_argument(
        "--plain-matrices", action="store_true", help="an engine that packs none for oneDNN"
    )


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    plan = plan_of_671b()
    print("671B, 2,048 training ranks (TP1 PP16 EP64) to 64 engines x 16 GPUs")
    for name, found in plan.items():
        print(f"  {name}")
        for key, value in found.items():
            print(
                f"    {key:44} {value:.4g}" if isinstance(value, float) else f"    {key}: {value}"
            )
    with tempfile.TemporaryDirectory() as folder:
        shape = model(chosen.hidden, chosen.layers, chosen.dtype)
        environment = {"MEGATRON_R1_PLAIN_MATRICES": "1"} if chosen.plain_matrices else {}
        times = chosen.repeats, chosen.reloads
        here = asyncio.run(measure(Path(folder), shape, environment, *times))
    print(
        f"here, {here['model']}: medians of {chosen.repeats} pushes and {chosen.reloads} reloads, "
        "without the first"
    )
    for key, value in here.items():
        if not isinstance(value, str):
            values = value if isinstance(value, list) else [value]
            print(f"    {key:44} {' to '.join(f'{number:.4g}' for number in values)}")
    return {"real_size": plan, "here": here}
