"""What a stage's folder says of how it was made: `begun.json` until it is done, then `stage.json`.

Both are replaced as a whole, so whenever the process is killed, a stage is done or it is not.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from megatron_r1.evaluation.identity import versions
from megatron_r1.files import atomic_write, fsync
from megatron_r1.workflow import digests, identity
from megatron_r1.workflow.plan import Plan, Stage

DONE, BEGUN = "stage.json", "begun.json"
# config.yaml and logs/ are written before a verb looks at anything.
LEFT_BY_A_START = frozenset((BEGUN, "config.yaml", "logs", "tensorboard", "stop"))


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """`stage.json` or `begun.json`, None where there is none. Raises ValueError for damage."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); restore it, or move {folder} away") from None
    return record


def begin(plan: Plan, stage: Stage, upstream: tuple[str, ...], last_sign: float | None) -> None:
    """Write down that `stage` is being worked on, and with what.

    last_sign: when an attempt that was killed wrote its last line, seconds since 1970.
    """
    folder = plan.folder_of(stage.name)
    before = read(folder, BEGUN) or {}
    attempts = before.get("attempts", [])
    if attempts and attempts[-1]["seconds"] is None:
        attempts[-1]["seconds"] = max(0.0, (last_sign or 0.0) - attempts[-1]["began"])
    record = {
        "settings": identity.settings(plan, stage, finished=False),
        "inputs": identity.inputs(plan, stage, upstream),
        "ports": before.get("ports", {}),
        "attempts": [*attempts, {"began": time.time(), "seconds": None, "pid": os.getpid()}],
        "failed": None,
    }
    _write(folder / BEGUN, record)


def keep_ports(folder: Path, ports: dict[str, int]) -> None:
    """A run that continues finds its served models where they were."""
    _write(folder / BEGUN, {**(read(folder, BEGUN) or {}), "ports": ports})


def end_attempt(folder: Path, failed: str | None) -> None:
    """Write down that the attempt is over, and why it failed if it did."""
    record = read(folder, BEGUN) or {}
    last = record["attempts"][-1]
    last["seconds"] = time.time() - last["began"]
    _write(folder / BEGUN, {**record, "failed": failed})


def finish(plan: Plan, stage: Stage, upstream: tuple[str, ...], command: list[str]) -> None:
    """Declare `stage` done: the last thing that is written of it."""
    folder = plan.folder_of(stage.name)
    end_attempt(folder, None)
    begun = read(folder, BEGUN) or {}
    made = digests.outputs(folder)
    settings = identity.settings(plan, stage, finished=True)
    attempts = begun["attempts"]
    record = {
        "stage": stage.name,
        "title": stage.title,
        "verb": stage.config.verb,
        "upstream": list(upstream),
        "command": command,
        "directory": str(Path.cwd()),
        "told": plan.resolve(stage.told, _urls(stage)),
        "settings": settings,
        "settings_digest": digests.of_value(settings),
        # Those it began with: had one changed meanwhile, it would be stale from the start.
        "inputs": begun["inputs"],
        "outputs": made,
        "digest": digests.of_outputs(made),
        "seed": plan.seed,
        "versions": versions(),
        "git": git_commit(),
        "host": socket.gethostname(),
        "started": _date(attempts[0]["began"]),
        "finished": _date(time.time()),
        "attempts": attempts,
        "seconds": round(sum(attempt["seconds"] for attempt in attempts), 3),
    }
    _write(folder / DONE, record)
    (folder / BEGUN).unlink()
    fsync(folder)


def has_made_something(folder: Path) -> bool:
    """Whether an attempt got further than its start."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return bool(names - LEFT_BY_A_START)


def git_commit() -> dict[str, Any] | None:
    """The commit of the working directory and whether files differ from it; None outside git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()


def _urls(stage: Stage) -> dict[str, str]:
    return {name: f"${{serve.{name}.url}}" for name in stage.config.serve}


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def _write(path: Path, record: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
