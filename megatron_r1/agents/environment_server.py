"""The process that makes environments: `python -m megatron_r1.agents.environment_server …`.

    … describe TARGET              prints the description of "module:Class" as JSON, or an error
    … serve TARGET SOCKET OPTIONS  forks a process for each connection to SOCKET: one episode

The module is imported once; a fork has it, and what it has loaded, in a few milliseconds. So every
episode has a process of its own: a method that hangs, crashes or takes all memory ends its own
episode only. Messages are frames of JSON."""

import asyncio
import contextlib
import faulthandler
import inspect
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_jsonable_python

from megatron_r1.agents.environment import (
    call_arguments,
    converted,
    describe,
    find_environment,
    row_arguments,
)
from megatron_r1.errors import RunError
from megatron_r1.processes.frames import LENGTH
from megatron_r1.processes.lifetime import die_with_parent, end_without_parent

GRACE_SECONDS = 1.0
"""The time between the interruption of a call whose limit is over and the end of its process; C
code cannot be interrupted."""
CLOSE_SECONDS = 5.0
"""The time limit of an environment's `close` at the end of its process."""
MAX_TEXT = 2**20
"""The most characters of a method's text that are sent: the controller must not read gigabytes."""


class CallTimeout(BaseException):
    """Raised in a method whose time is over; no `except Exception` catches it."""


def frame(message: Mapping[str, Any]) -> bytes:
    """Return a message as it is sent: the length of its JSON (uint32, little-endian), the JSON."""
    payload = json.dumps(message).encode()
    return LENGTH.pack(len(payload)) + payload


def serve(target: str, path: str, options: Mapping[str, Any]) -> None:
    """Fork a process with an environment of class `target` for every connection to `path`."""
    environment = find_environment(target)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1024)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    signal.signal(signal.SIGTERM, _end)
    print("\nready", flush=True)  # the import may have printed half a line
    os.dup2(2, 1)  # the pipe is not read any more, and environments may print
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):  # no memory, or too many processes
            if os.fork() == 0:
                try:
                    _begin_process()
                    listener.close()
                    _Episode(environment, options, connection).serve()
                finally:
                    os._exit(0)


def _begin_process() -> None:
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Every fork has a copy of numpy's global generator; `random` seeds its own after a fork.
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()


def _end(*_: object) -> None:
    """End after the last episode, and kill the processes that episodes have left."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()  # for all of them, because SIGCHLD is ignored
    os.killpg(os.getpid(), signal.SIGKILL)


class _Episode:
    """One environment, called over a connection."""

    def __init__(
        self, environment: type, options: Mapping[str, Any], connection: socket.socket
    ) -> None:
        self._class, self._options = environment, options
        self._stream = connection.makefile("rwb")
        self._loop = asyncio.new_event_loop()
        self._environment: Any = None
        signal.signal(signal.SIGALRM, _interrupt)

    def serve(self) -> None:
        """Reply to calls until the connection ends; then close the environment."""
        self._null = os.open(os.devnull, os.O_WRONLY)
        try:
            while header := self._stream.read(LENGTH.size):
                request = json.loads(self._stream.read(LENGTH.unpack(header)[0]))
                self._stream.write(frame(self._answer(request)))
                self._stream.flush()
        finally:
            self._answer({"method": "close", "arguments": [], "seconds": CLOSE_SECONDS})

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        seconds, began = request["seconds"], time.monotonic()
        faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=self._null)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer: dict[str, Any] = {"done": False}
        try:
            try:
                value = getattr(self, request["method"])(*request["arguments"])
                answer |= {"done": self._is_done(), "value": value}
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except CallTimeout:
            answer |= {"error": f"no result within {seconds:g} s", "timeout": True}
        except BaseException as error:  # noqa: BLE001 - a user's code may raise anything
            answer["error"] = _worded(error)[:MAX_TEXT]
            answer["is_fault"] = isinstance(error, RunError)
        if "error" in answer:
            with contextlib.suppress(Exception):  # the error may be that of `done`
                answer["done"] = self._is_done()
        faulthandler.cancel_dump_traceback_later()
        answer["seconds"] = time.monotonic() - began
        return answer

    def _is_done(self) -> bool:
        return bool(getattr(self._environment, "done", False))

    def reset(self, row: dict[str, Any]) -> str | None:
        """Make the episode's environment, and return the question's text, if `reset` gives one."""
        self.close()
        self._environment = self._class(**self._options)
        reset = self._environment.reset
        positional, named = call_arguments(reset, row_arguments(reset, row))
        question = self._result(reset(*positional, **named))
        return None if question is None else _text(question)

    def close(self) -> None:
        """Call the environment's `close`, if it has one."""
        environment, self._environment = self._environment, None
        if hasattr(environment, "close"):
            self._result(environment.close())

    def call(self, name: str, arguments: Any) -> str:
        """Return a tool's result as text. Raises what the tool raises."""
        if not isinstance(arguments, dict):
            raise TypeError(f"the arguments of {name} must be a JSON object")
        method = getattr(self._environment, name)
        positional, named = call_arguments(method, converted(method, arguments))
        return _text(self._result(method(*positional, **named)))

    def reward(self, answer: str) -> float:
        """Return the episode's reward. answer: the text of its last answer."""
        if hasattr(self._environment, "final_answer"):
            self._result(self._environment.final_answer(answer))
        return float(self._result(self._environment.get_reward()))

    def _result(self, value: Any) -> Any:
        return self._loop.run_until_complete(value) if inspect.isawaitable(value) else value


def _worded(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - of the error's own __str__
        return type(error).__name__


def _text(value: Any) -> str:
    """Return a result as text: JSON, with dataclasses, sets, dates and numpy's arrays as pydantic
    and numpy write them, else its `str`."""
    if value is None or isinstance(value, str):
        return (value or "")[:MAX_TEXT]
    try:
        text = json.dumps(value, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError):  # keys that are no text, or a cycle
        text = str(value)
    return text[:MAX_TEXT]


def _plain(value: Any) -> Any:
    return to_jsonable_python(value, fallback=_list_or_text)


def _list_or_text(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _interrupt(*_: object) -> None:
    raise CallTimeout


def _print_description(target: str) -> None:
    try:
        description = describe(find_environment(target))
        answer: dict[str, Any] = {"tools": description.tools, "grades": description.grades}
    except BaseException as error:  # noqa: BLE001 - a user's module may raise anything
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(f"\n{json.dumps(answer)}")


if __name__ == "__main__":
    end_without_parent()
    if sys.argv[1] == "describe":
        _print_description(sys.argv[2])
    else:
        serve(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
