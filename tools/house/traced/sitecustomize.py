"""Notes each function of this project that a process enters: a line of nanoseconds, file and name.

Python imports it at the start of every process whose PYTHONPATH has this folder. A function that
is entered again within a millisecond is noted once. HOUSE_TRACE: the folder of the notes."""

import os
import sys
import threading
import time

FOLDER = os.environ.get("HOUSE_TRACE")
ROOTS = tuple(os.environ.get("HOUSE_ROOTS", "").split(os.pathsep))
QUIET_NS = 1_000_000

if FOLDER:
    names: dict = {}  # of code objects: "file name", or None outside the project
    last: dict = {}  # of code objects: when it was noted
    notes = {"file": -1}

    def open_notes() -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        notes["file"] = os.open(f"{FOLDER}/{os.getpid()}", flags, 0o600)

    def note(frame, event, _) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in names:
            path = code.co_filename
            names[code] = f"{path} {code.co_qualname}" if path.startswith(ROOTS) else None
        if names[code] is not None:
            now = time.monotonic_ns()
            if now - last.get(code, 0) > QUIET_NS:
                last[code] = now
                os.write(notes["file"], f"{now} {names[code]}\n".encode())

    open_notes()
    os.register_at_fork(after_in_child=open_notes)
    threading.setprofile(note)
    sys.setprofile(note)
