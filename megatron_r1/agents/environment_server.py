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
import math
import os
import reprlib
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic_core import to_jsonable_python
from r1_grading.base.workers import LENGTH_HEADER, frame_payload

from megatron_r1.agents.environment import describe_environment, find_environment
from megatron_r1.agents.method_arguments import (
    call_arguments,
    convert_arguments,
    missing_arguments,
    row_arguments,
)
from megatron_r1.base.errors import Cause, RunError, UserError
from megatron_r1.base.processes.children import die_with_parent, end_without_parent
from megatron_r1.base.user_code import user_location_of

GRACE_SECONDS = 1.0
"""The time between the interruption of a call whose limit is over and the end of its process; C
code cannot be interrupted."""
CLOSE_SECONDS = 5.0
"""The time limit of an environment's `close` at the end of its process."""
MAX_TEXT = 2**20
"""The most characters of a method's text that are sent: the controller must not read gigabytes."""


class CallInterrupt(BaseException):
    """Raised in a method whose time is over; no `except Exception` catches it."""


class InvalidMethod(Exception):
    """A method's signature or result is not what an environment's must be.

    Args:
        fault: what is wrong.
        remedy: what to write."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.remedy = remedy


def encode_frame(message: Mapping[str, Any]) -> bytes:
    """Return the frame of a message's JSON, by `json`: msgspec would write NaN as null."""
    return frame_payload(json.dumps(message).encode())


def serve_environment(target: str, path: str, options: Mapping[str, Any]) -> None:
    """Fork a process with an environment of class `target` for every connection to `path`.

    Before the first, a classmethod `_before_episodes` of the class is called with `options`; it may
    take longer than the calls of an episode.

    Args:
        target: "module:Class".
        path: the Unix socket to listen at.
        options: keyword arguments of the class (`agents.parameters`)."""
    environment = find_environment(target)
    if hasattr(environment, "_before_episodes"):
        print("\npreparing", flush=True)  # the import may have printed half a line
        with contextlib.suppress(Exception):  # the first `reset` fails likewise, and names its row
            environment._before_episodes(**options)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1024)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    signal.signal(signal.SIGTERM, _end_process_group)
    print("\nready", flush=True)
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


def _end_process_group(*_: object) -> None:
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
        self._running = ""
        """The method that is running, for errors."""
        signal.signal(signal.SIGALRM, _interrupt_call)

    def serve(self) -> None:
        """Reply to calls until the connection ends; then close the environment."""
        self._null = os.open(os.devnull, os.O_WRONLY)
        try:
            while header := self._stream.read(LENGTH_HEADER.size):
                request = json.loads(self._stream.read(LENGTH_HEADER.unpack(header)[0]))
                self._stream.write(encode_frame(self._answer_request(request)))
                self._stream.flush()
        finally:
            self._answer_request({"method": "close", "arguments": [], "seconds": CLOSE_SECONDS})

    def _answer_request(self, request: dict[str, Any]) -> dict[str, Any]:
        seconds, started_at = request["seconds"], time.monotonic()
        faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=self._null)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer: dict[str, Any] = {"done": False}
        try:
            try:
                value = getattr(self, request["method"])(*request["arguments"])
                answer |= {"done": self._is_done(), "value": value}
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except CallInterrupt:
            answer |= {"error": f"no result within {seconds:g} s", "timeout": True}
            answer["fault"] = f"{self._running}: {answer['error']} (agents.call_seconds)"
        except InvalidMethod as error:
            answer["error"] = str(error)
            answer |= {"fault": f"{self._running}() {error}", "remedy": error.remedy}
        except BaseException as error:  # noqa: BLE001 - a user's code may raise anything
            answer["error"] = _describe_error(error)[:MAX_TEXT]
            answer["fault"] = f"{self._running}: {answer['error']}{user_location_of(error)}"
            answer["is_fault"] = isinstance(error, RunError)
        if "error" in answer:
            with contextlib.suppress(Exception):  # the error may be that of `done`
                answer["done"] = self._is_done()
        faulthandler.cancel_dump_traceback_later()
        answer["seconds"] = time.monotonic() - started_at
        return answer

    def _is_done(self) -> bool:
        return bool(getattr(self._environment, "done", False))

    def reset(self, row: dict[str, Any]) -> str | None:
        """Make the episode's environment, and return the question's text, if `reset` gives one."""
        self.close()
        self._running = "__init__"
        self._environment = self._class(**self._options)
        self._running, reset = "reset", self._environment.reset
        arguments = row_arguments(reset, row)
        if missing_names := missing_arguments(reset, arguments):
            columns = [name for name in row if name != "truth" or row[name] is not None]
            raise InvalidMethod(
                f"needs {', '.join(missing_names)}",
                f"the row has {', '.join(columns)}; add the column, "
                f"or give {missing_names[0]} a default",
            )
        positional, keywords = call_arguments(reset, arguments)
        question = self._awaited_result(reset(*positional, **keywords))
        if not isinstance(question, str | None):
            raise InvalidMethod(
                f"returned {reprlib.repr(question)}",
                "return the question's text, or None for the row's",
            )
        return None if question is None else question[:MAX_TEXT]

    def close(self) -> None:
        self._running = "close"
        environment, self._environment = self._environment, None
        if hasattr(environment, "close"):
            self._awaited_result(environment.close())

    def call(self, name: str, arguments: Any) -> str:
        """Return a tool's result as text.

        Raises:
            TypeError: the arguments are not an object, or have a name that the tool does not take.
            ValueError: an argument cannot be converted to its type.
            Exception: what the tool raises.
        """
        self._running = name
        if not isinstance(arguments, dict):
            raise TypeError(f"the arguments of {name} must be a JSON object")
        method = getattr(self._environment, name)
        positional, keywords = call_arguments(method, convert_arguments(method, arguments))
        return _result_text(self._awaited_result(method(*positional, **keywords)))

    def reward(self, answer: str) -> float:
        if hasattr(self._environment, "final_answer"):
            self._running = "final_answer"
            self._awaited_result(self._environment.final_answer(answer))
        self._running = "get_reward"
        reward = self._awaited_result(self._environment.get_reward())
        fault = f"returned {reprlib.repr(reward)}"
        try:
            number = None if isinstance(reward, str | bytes) else float(reward)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None:
            raise InvalidMethod(fault, "return a number")
        if not math.isfinite(number):
            raise InvalidMethod(fault, "return a finite number")
        return number

    def _awaited_result(self, value: Any) -> Any:
        return self._loop.run_until_complete(value) if inspect.isawaitable(value) else value


def _describe_error(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - of the error's own __str__
        return type(error).__name__


def _result_text(value: Any) -> str:
    """Return a result as text: JSON, with dataclasses, sets, dates and numpy's arrays as pydantic
    and numpy write them, else its `str`."""
    if value is None or isinstance(value, str):
        return (value or "")[:MAX_TEXT]
    try:
        text = json.dumps(value, ensure_ascii=False, default=_to_jsonable)
    except (TypeError, ValueError):  # keys that are no text, or a cycle
        text = str(value)
    return text[:MAX_TEXT]


def _to_jsonable(value: Any) -> Any:
    return to_jsonable_python(value, fallback=_list_or_text)


def _list_or_text(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _interrupt_call(*_: object) -> None:
    raise CallInterrupt


def _print_description(target: str) -> None:
    try:
        answer: dict[str, Any] = asdict(describe_environment(find_environment(target)))
    except UserError as error:
        key = "agents.environment: "
        answer = {"error": key + str(error).removeprefix(key), "cause": error.cause}
    except BaseException as error:  # noqa: BLE001 - a user's module may raise anything
        text = error.msg if isinstance(error, SyntaxError) else str(error)
        fault = f"{type(error).__name__}: {text}{user_location_of(error)}"
        text = f"agents.environment: {target}: {fault}"
        answer = {"error": text, "cause": Cause.FAILED}
    print(f"\n{json.dumps(answer)}")


if __name__ == "__main__":
    end_without_parent()
    if sys.argv[1] == "describe":
        _print_description(sys.argv[2])
    else:
        serve_environment(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
