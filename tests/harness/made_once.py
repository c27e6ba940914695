"""A folder that the processes of a parallel test run make once between them and only read."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder `name`. The first process that needs it fills it by make(FOLDER); others
    wait for that. A folder that was left half-made is never returned: each attempt has its own."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    link = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not link.exists():
            folder = factory.mktemp(name)
            make(folder)
            link.symlink_to(folder)
    return link.resolve()
