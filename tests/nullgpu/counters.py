"""Reads what a process on the null GPU counted, and labels what it counts."""

import contextlib
import ctypes
import json
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def labelled(text: str) -> Iterator[None]:
    """Count the waits of the host inside the block under this label, in all threads."""
    runtime = ctypes.CDLL(None)
    runtime.null_gpu_label(text.encode())
    try:
        yield
    finally:
        runtime.null_gpu_label(b"")


def read(prefix: Path) -> list[dict]:
    """Return what each process wrote where NULL_GPU_COUNTERS is this."""
    files = sorted(prefix.parent.glob(f"{prefix.name}.*.json"))
    return [json.loads(file.read_text()) for file in files]


def waits(process: dict, label: str) -> dict[str, int]:
    """Return how often the host waited under a label, by kind."""
    found: dict[str, int] = {}
    for row in process["waits"]:
        if row["label"] == label:
            found[row["kind"]] = found.get(row["kind"], 0) + row["number"]
    return found
