"""Runs `megatron-r1 why RUN --json FILE` of this tree in forked processes.

They are forked from one which has made the imports, so that their time is that of the examination
alone."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PRELOADED_MODULES = (
    "math_verify",
    "transformers",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "megatron_r1.models.transformers_model",
    "r1_grading.math",
    "matplotlib.pyplot",
    "megatron_r1.commands.cli",
)


def prepare() -> None:
    """Make the imports of `why`, and the tables that its packages make when they are first used; no
    thread is left, which a fork would lose."""
    for name in PRELOADED_MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    package = importlib.import_module("megatron_r1.why")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    import numpy
    from math_verify import parse
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from megatron_r1.reporting import plots

    parse("$1$")
    get_checkpoint_conversion_mapping("qwen2")
    points = numpy.arange(2.0)
    plots.curve_plot("start-up", [plots.Curve("", points, points)])  # reads fonts


def examine(run: Path, log: Path) -> dict[str, Any]:
    """Run the command on a run in a forked process.

    Args:
        run: the run's folder.
        log: a file for what it prints.

    Returns:
        status, the exit status; seconds, of the clock; cpu_seconds; and the fields of the JSON file
        where it was written."""
    target = log.with_suffix(".json")
    target.unlink(missing_ok=True)
    sys.stdout.flush()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be_the_command(run, target, log)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - started
    record = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        **record,
    }


def _be_the_command(run: Path, target: Path, log: Path) -> None:
    status = 70
    try:
        os.chdir(run.parent)
        with open(log, "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            from megatron_r1.commands import cli

            status = cli.main(["why", str(run), "--json", str(target)])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
