"""The manifest in a stage's folder, how its files were made: `begun.json`, then `stage.json`.

`stage.json` is written last and atomically: a stage is done exactly when it exists, whenever a
process is killed. It holds the fingerprints of the stage (`fingerprint`)."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write, fsync
from megatron_r1.evaluation.package_versions import package_versions
from megatron_r1.pipeline.digests import digest_of_outputs, digest_of_value
from megatron_r1.pipeline.fingerprint import (
    START_FILES,
    deciding_settings,
    input_digests,
    output_digests,
)
from megatron_r1.pipeline.stages import PipelinePlan, PipelineStage

STAGE_FILE, BEGUN_FILE = "stage.json", "begun.json"


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """Read `stage.json` or `begun.json`; None if it does not exist.

    Raises:
        UserError: the file is not JSON.
    """
    path = folder / name
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: not JSON ({error}); restore it, or move {folder} away",
            key=name,
            cause=Cause.MALFORMED,
        ) from None


def record_begin(
    plan: PipelinePlan, stage: PipelineStage, upstream: tuple[str, ...], last_output: float | None
) -> None:
    """Record that an attempt at `stage` begins, with its settings and inputs.

    Args:
        plan: the plan of the pipeline.
        stage: the pipeline stage.
        upstream: the names of the stages that it needs.
        last_output: when an attempt that was killed wrote its last line, in seconds since 1970."""
    folder = plan.folder_of(stage.name)
    earlier_record = read_record(folder, BEGUN_FILE) or {}
    attempts = earlier_record.get("attempts", [])
    if attempts and attempts[-1]["seconds"] is None:
        attempts[-1]["seconds"] = max(0.0, (last_output or 0.0) - attempts[-1]["began"])
    record = {
        "settings": deciding_settings(plan, stage, finished=False),
        "inputs": input_digests(plan, stage, upstream),
        "ports": earlier_record.get("ports", {}),
        "attempts": [*attempts, {"began": time.time(), "seconds": None, "pid": os.getpid()}],
        "failed": None,
    }
    _write_record(folder / BEGUN_FILE, record)


def keep_ports(folder: Path, ports: dict[str, int]) -> None:
    """Record the ports of served models, which an attempt that continues uses again."""
    _write_record(folder / BEGUN_FILE, {**(read_record(folder, BEGUN_FILE) or {}), "ports": ports})


def end_attempt(folder: Path, failed: str | None) -> None:
    """Record the end of the attempt.

    Args:
        folder: the stage's folder.
        failed: why the attempt failed; None if it did not."""
    record = read_record(folder, BEGUN_FILE) or {}
    last_attempt = record["attempts"][-1]
    last_attempt["seconds"] = time.time() - last_attempt["began"]
    _write_record(folder / BEGUN_FILE, {**record, "failed": failed})


def record_finish(
    plan: PipelinePlan, stage: PipelineStage, upstream: tuple[str, ...], command: list[str]
) -> None:
    """Write `stage.json`, which declares a stage done.

    Args:
        plan: the pipeline's stages for one seed.
        stage: the stage whose attempt has succeeded.
        upstream: names of the stages that it needs.
        command: the command that ran it, in words."""
    folder = plan.folder_of(stage.name)
    end_attempt(folder, None)
    begun_record = read_record(folder, BEGUN_FILE) or {}
    outputs = output_digests(folder)
    settings = deciding_settings(plan, stage, finished=True)
    attempts = begun_record["attempts"]
    urls = {name: f"${{serve.{name}.url}}" for name in stage.config.serve}
    record = {
        "stage": stage.name,
        "title": stage.title,
        "verb": stage.config.verb,
        "upstream": list(upstream),
        "command": command,
        "directory": str(Path.cwd()),
        "told": plan.resolve(stage.settings, urls),  # named as in older manifests
        "settings": settings,
        "settings_digest": digest_of_value(settings),
        # The inputs at the beginning: if one has changed since, the stage is stale at once.
        "inputs": begun_record["inputs"],
        "outputs": outputs,
        "digest": digest_of_outputs(outputs),
        "seed": plan.seed,
        "versions": package_versions(),
        "git": _git_commit(),
        "host": socket.gethostname(),
        "started": _format_date(attempts[0]["began"]),
        "finished": _format_date(time.time()),
        "attempts": attempts,
        "seconds": round(sum(attempt["seconds"] for attempt in attempts), 3),
    }
    _write_record(folder / STAGE_FILE, record)
    (folder / BEGUN_FILE).unlink()
    fsync(folder)


def has_outputs(folder: Path) -> bool:
    """Return whether an attempt wrote more than a start does."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return bool(names - START_FILES)


def _git_commit() -> dict[str, Any] | None:
    """Return the commit of the working directory and whether files differ from it; None outside
    git."""
    try:
        commit = _run_git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_run_git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _run_git(*arguments: str) -> str:
    command, devnull = ["git", *arguments], subprocess.DEVNULL
    return subprocess.check_output(command, stderr=devnull, text=True, timeout=30).strip()


def _format_date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def _write_record(path: Path, record: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
