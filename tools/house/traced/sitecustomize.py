"""Notes the functions of this project that carry one of `walks.WALKS`: a line of nanoseconds, walk,
file and name of the function.

Python imports it at the start of every process whose PYTHONPATH has this folder. HOUSE_TRACE: the
folder of the notes. HOUSE_WALKS: JSON of the walks. A profile function of each thread looks at
every call and every return."""

import dataclasses
import dis
import json
import os
import sys
import threading
import time
from contextvars import ContextVar

FOLDER = os.environ.get("HOUSE_TRACE")
ROOTS = tuple(os.environ.get("HOUSE_ROOTS", "").split(os.pathsep))
YIELD, RESUME = dis.opmap["YIELD_VALUE"], dis.opmap["RESUME"]
DEPTH, WIDTH = 5, 4096
QUIET_NS = 1_000_000
"""A function that is entered again within a millisecond is noted once."""
# Python, or the program, has one of these for many uses.
SHARED_TYPES = (type(None), bool, int, type)


def parts(value) -> list[object]:
    """Return what a list, tuple, dict, dataclass or msgspec struct holds."""
    if isinstance(value, (list, tuple)):
        return list(value[:WIDTH])
    if isinstance(value, dict):
        return list(value.values())[:WIDTH]
    names = getattr(type(value), "__struct_fields__", None)
    if names is None and dataclasses.is_dataclass(type(value)):
        names = type(value).__dataclass_fields__
    return [getattr(value, name, None) for name in names or ()]


class Carriers:
    """Objects that are the thing of a walk, or made from it, by identity."""

    def __init__(self):
        self._objects = {}  # kept alive, so that no other object gets the same identity
        self._awaited_uses = {}

    def add(self, value, depth=DEPTH) -> list[int] | None:
        """Add a value and its parts, and return the identities of those that are new; None for a
        value that is shared by many uses."""
        if isinstance(value, SHARED_TYPES) or callable(value) or not depth:
            return None
        if isinstance(value, (str, bytes, tuple)) and len(value) < 2:
            return None
        new = [] if id(value) in self._objects else [id(value)]
        self._objects[id(value)] = value
        for part in parts(value):
            new += self.add(part, depth - 1) or []
        return new

    def await_use(self, new, entries) -> None:
        self._awaited_uses |= dict.fromkeys(new, (entries, new))

    def are_in(self, value, use, depth=DEPTH) -> bool:
        """Whether the value is one of them or holds one.

        Args:
            value: the value to search.
            use: called with the entries that await the use of what is found, and the identities
                whose use they await; they do not any more.
            depth: how deep containers are searched."""
        if isinstance(value, SHARED_TYPES) or not self._objects:
            return False
        if id(value) in self._objects:
            entries, awaited = self._awaited_uses.get(id(value), ([], []))
            for identity in awaited:
                self._awaited_uses.pop(identity, None)
            use(entries, awaited)
            return True
        return depth > 0 and sum(self.are_in(part, use, depth - 1) for part in parts(value)) > 0


class WalkedCall:
    """A call on the walk.

    Attributes:
        entries: the entries of it and of the calls under it.
        new: identities of what these have made.
        is_kept: whether something was sent from it."""

    def __init__(self, entries, is_within):
        self.entries, self.is_within = entries, is_within
        self.new, self.is_kept = [], False


class Walk:
    """What one process has seen of a walk; its fields are those of `walks.Walk`.

    Args:
        write: called with time, name of the walk and title of a function."""

    def __init__(self, write, name, begin, end, within, receivers, hands_over, outside, follows):
        self.write, self.name, self.follows = write, name, follows
        self.begin, self.within, self.receivers = begin, tuple(within), tuple(receivers)
        self.outside, self.kept_at = tuple(outside), (end, *hands_over)
        self.carriers = Carriers()
        # Tasks begin with the values of their creator.
        self.num_within: ContextVar[int] = ContextVar("within")
        self.num_outside: ContextVar[int] = ContextVar("outside")
        self.has_begun = False
        self.running = {}  # of frames, by identity

    def note_call(self, title, frame, time_ns) -> None:
        if title.endswith(self.outside):
            self.num_outside.set(self.num_outside.get(0) + 1)
        if self.num_outside.get(0):
            return
        starts = title.endswith(self.within + self.receivers)
        if starts and self.follows and title.endswith(self.begin):
            starts, self.has_begun = not self.has_begun, True
        if starts and title.endswith(self.receivers):
            self.carriers.add(arguments(frame)[frame.f_code.co_varnames[:1] == ("self",) :])
        if starts and title.endswith(self.within):
            self.num_within.set(self.num_within.get(0) + 1)
        elif not self.num_within.get(0) and not self.carriers.are_in(
            arguments(frame), self._write_entries
        ):
            return
        caller = title_of(frame.f_back.f_code) if frame.f_back is not None else None
        entries = [(time_ns, entry) for entry in (caller, title) if entry is not None]
        if not self.follows:  # every call counts, whatever it returns
            self._write_entries(entries)
            entries = []
        self.running[id(frame)] = WalkedCall(entries, starts and title.endswith(self.within))
        if title.endswith(self.kept_at):
            for entry in self._running_calls(frame):
                entry.is_kept = True

    def note_return(self, title, frame, value, time_ns) -> None:
        if title.endswith(self.outside):
            self.num_outside.set(max(0, self.num_outside.get(0) - 1))
        elif self.num_outside.get(0):
            return
        call = self.running.pop(id(frame), None)
        if call is not None and call.is_within:
            self.num_within.set(max(0, self.num_within.get(0) - 1))
        if not self.follows:
            return
        pending = WalkedCall([], False)  # to return what awaits a use is no use of it yet

        def still_awaiting(entries, awaited):
            pending.entries += entries
            pending.new += awaited

        if self.carriers.are_in(value, still_awaiting) and call is None:
            call = WalkedCall([(time_ns, title)], False)
        if call is None:
            return
        new_identities = self.carriers.add(value)
        if new_identities is None and not call.is_kept:
            return  # it hands nothing on
        call.entries += pending.entries
        call.new += (new_identities or []) + pending.new
        outer_call = next(self._running_calls(frame.f_back), None)
        if outer_call is not None:
            outer_call.entries += call.entries
            outer_call.new += call.new
        elif call.new and not call.is_kept:  # of a task or a thread: does anything receive it?
            self.carriers.await_use(call.new, call.entries)
        else:
            self._write_entries(call.entries)

    def _write_entries(self, entries, _=()) -> None:
        for time_ns, title in entries:
            self.write(time_ns, self.name, title)

    def _running_calls(self, frame):
        while frame is not None:
            if id(frame) in self.running:
                yield self.running[id(frame)]
            frame = frame.f_back


def arguments(frame) -> list[object]:
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & 4) + bool(code.co_flags & 8)
    values = frame.f_locals
    return [values[name] for name in code.co_varnames[:count] if name in values]


def is_start(frame) -> bool:
    """Whether a call event is of a new call, and not of a coroutine or generator that goes on."""
    code, offset = frame.f_code.co_code, frame.f_lasti
    return code[offset] == RESUME and code[offset + 1] & 3 == 0


if FOLDER:
    settings = json.loads(os.environ["HOUSE_WALKS"])
    armed = {"is": False, "by": settings["after"]}
    marks = tuple(walk[key] for walk in settings["walks"] for key in ("begin", "end"))
    # Of code objects: "file name", or None outside the project.
    titles: dict[object, str | None] = {}
    last: dict[object, int] = {}  # of walk and title: when it was noted
    busy = threading.local()
    notes = {"file": -1}

    def open_notes() -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        notes["file"] = os.open(f"{FOLDER}/{os.getpid()}", flags, 0o600)

    def title_of(code):
        if code not in titles:
            path = code.co_filename
            titles[code] = f"{path} {code.co_qualname}" if path.startswith(ROOTS) else None
        return titles[code]

    def write(time_ns: int, walk: str, title: str) -> None:
        if walk == "mark" or abs(time_ns - last.get((walk, title), 0)) > QUIET_NS:
            last[walk, title] = time_ns
            os.write(notes["file"], f"{time_ns}|{walk}|{title}\n".encode())

    def look(frame, event, value) -> None:
        title = title_of(frame.f_code)
        if title is None or event not in ("call", "return") or getattr(busy, "is", False):
            return
        busy.__dict__["is"] = True
        try:
            see(frame, event, value, title, time.monotonic_ns())
        finally:
            busy.__dict__["is"] = False

    def see(frame, event, value, title, time_ns) -> None:
        if event == "call":
            if not is_start(frame):
                return
            if title.endswith((armed["by"], *marks)):
                armed["is"] |= title.endswith(armed["by"])
                write(time_ns, "mark", title)
            for walk in walks:
                if armed["is"] or not (walk.follows and title.endswith(walk.begin)):
                    walk.note_call(title, frame, time_ns)
        elif frame.f_code.co_code[frame.f_lasti] != YIELD:  # of one that goes on later
            for walk in walks:
                walk.note_return(title, frame, value, time_ns)

    walks = [Walk(write, **walk) for walk in settings["walks"]]
    open_notes()
    os.register_at_fork(after_in_child=open_notes)
    threading.setprofile(look)
    sys.setprofile(look)
