"""Runs a case: the shipped command in a process group of its own, from the overlay or the tree."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.pipeline.stages import merge_settings
from tools.bench import host
from tools.bench.why.cases import WhyCase, check_imports, write_overlay
from tools.bench.why.models import base_model

LIMIT_SECONDS = 400
"""After which a run is ended: it hangs."""


class Ran(NamedTuple):
    """A run that was made.

    Attributes:
        status: exit status of the command; 0 where it ended as it should.
        seconds: how long the command took, by the clock.
        error: the end of its standard error where it failed."""

    status: int
    seconds: float
    error: str


def settings_of(case: WhyCase, common: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Return the recipe of a case.

    Args:
        case: the case.
        common: settings that all runs have.
        seed: `run.seed`.
        folder: the bench's folder, with the models."""
    models = folder / "models"
    run_settings: dict[str, dict[str, Any]] = {
        "run": {"seed": seed},
        "model": {"path": str(base_model(models, case.model))},
        "data": {"path": str(models / "questions.jsonl")},
    }
    return merge_settings(merge_settings(common, run_settings), case.settings)


def run_case(
    case: WhyCase, common: dict[str, Any], seed: int, folder: Path, place: Path
) -> tuple[Ran, Path]:
    """Make the run of a case, from nothing.

    Args:
        case: the case.
        common: settings that all runs have.
        seed: `run.seed`.
        folder: the bench's folder.
        place: the new folder of this case.

    Returns:
        How the command ended, and the run's folder.

    Raises:
        RuntimeError: a process of the run has not imported the planted fault, or this CPU cannot
            make the run."""
    if case.cpu_flags and not _cpu_flags().intersection(case.cpu_flags):
        raise RuntimeError(f"the CPU lacks {' and '.join(case.cpu_flags)}, of which one is needed")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    settings = settings_of(case, common, seed, folder)
    settings = merge_settings(settings, {"run": {"folder": "run"}})
    start = time.monotonic()
    if case.first_run is not None:
        first_settings = merge_settings(settings, case.first_run)
        if (first_outcome := _run_recipe(first_settings, place, None)).status:
            return first_outcome, place / "run"
    overlay = write_overlay(case, place / "overlay") if case.edits else None
    outcome = _run_recipe(settings, place, overlay)
    if overlay is not None and outcome.status == 0:
        check_imports(overlay)
        shutil.rmtree(overlay)
    return outcome._replace(seconds=time.monotonic() - start), place / "run"


def _cpu_flags() -> set[str]:
    """Return the flags of the CPU's instructions, such as avx2; none where Linux names none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()[2:]}


def _run_recipe(settings: dict[str, Any], place: Path, overlay: Path | None) -> Ran:
    recipe = place / "recipe.yaml"
    recipe.write_text(json.dumps(settings), encoding="utf-8")
    environment = host.environment(PYTHONWARNINGS="ignore")
    if overlay is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(overlay), environment["PYTHONPATH"]])
    start = time.monotonic()
    with open(place / "stdout.txt", "ab") as out, open(place / "stderr.txt", "wb") as errors:
        process = subprocess.Popen(
            host.megatron_r1("rl", recipe),
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            start_new_session=True,
        )
        try:
            status = process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = (place / "stderr.txt").read_text(encoding="utf-8", errors="replace")
    error = text[-2000:] if status else ""
    return Ran(status, time.monotonic() - start, error)
