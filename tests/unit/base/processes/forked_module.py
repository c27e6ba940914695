"""A module for a fork server: prints, and ends or sleeps as its arguments say."""

import os
import signal
import sys
import tempfile
import threading
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from megatron_r1.base.files import atomic_write
from megatron_r1.base.processes import children

VARIABLES_READ_AFTER_IMPORT = {"LATE"}
imports = 0


def preload() -> None:
    global imports
    imports = os.getpid()
    print("imported", flush=True)
    if os.environ.get("FAIL"):
        sys.exit("no such library")
    if path := os.environ.get("IMPORT_FOR_EVER"):
        atomic_write(Path(path), str(os.getpid()))
        time.sleep(1e6)
    if os.environ.get("THREAD"):
        threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()


def main() -> None:
    how, *rest = sys.argv[1:]
    origin = "forked" if imports else "fresh"
    facts = [origin, os.getenv("LATE"), os.getenv("EARLY"), tempfile.gettempdir(), os.getcwd()]
    print(*facts, sep="\t", flush=True)
    if how == "exit":
        sys.exit(int(rest[0]))
    if how == "signal":
        os.kill(os.getpid(), int(rest[0]))
    if how == "child":  # of the same group, which does not end by itself
        if os.fork() == 0:
            children.die_with_parent()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # In one write: both processes append to one file.
        os.write(sys.stdout.fileno(), b"pid %d\n" % os.getpid())
    if rest == ["memory"]:
        memory = SharedMemory(create=True, size=4096)
        print("shared", memory.name, flush=True)
    time.sleep(1e6)


if __name__ == "__main__":
    main()
