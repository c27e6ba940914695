"""Records what a test's code makes durable."""

import os
from pathlib import Path

import pytest


def recorded_syncs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that will have the path of every file and folder that is synced, in order."""
    paths, upstream = [], os.fsync

    def fsync(descriptor: int) -> None:
        paths.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        upstream(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return paths
