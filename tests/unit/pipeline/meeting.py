"""Stages that end only if they run next to each other."""

import time
from pathlib import Path


def meet(folder, *, other, seconds=None):
    """Wait for the stage `other` to have begun, without a limit by default."""
    (folder / "here").write_text("")
    print("waiting for", other)
    began = time.monotonic()
    while not (Path(other) / "here").exists() and not (Path(other) / "stage.json").exists():
        if seconds is not None and time.monotonic() > began + seconds:
            raise RuntimeError("nobody came")
        time.sleep(0.01)


def join(folder, *, sources):
    (folder / "joined").write_text(" ".join(sorted(Path(s).parent.name for s in sources)))


def linger(folder, *, waits):
    (folder / "here").write_text("")
    while waits:
        time.sleep(3600)
    (folder / "done").write_text("")


def fail_beside(folder, *, other):
    meet(folder, other=other)
    raise RuntimeError("broken on purpose")


def meet_and_stay(folder, *, other, until):
    """Outlast the other's failure, however long its process takes to end."""
    meet(folder, other=other)
    while not Path(until).exists():
        time.sleep(0.01)
