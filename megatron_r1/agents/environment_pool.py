"""The controller's side of environments, each of which is a process during its episode."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1_grading.base.workers import LENGTH_HEADER, last_line

from megatron_r1.agents.environment import EnvironmentDescription, environment_target
from megatron_r1.agents.environment_server import CLOSE_SECONDS, GRACE_SECONDS, encode_frame
from megatron_r1.base.errors import Cause, RunError, UserError
from megatron_r1.base.processes.children import kill_group, popen_options
from megatron_r1.base.processes.open_files import allow_open_files
from megatron_r1.base.processes.scratch import Scratch
from megatron_r1.config import AgentsConfig

SERVER_MODULE = "megatron_r1.agents.environment_server"
START_SECONDS = 120.0
LATE_SECONDS = 10.0
"""The time that a reply may take beyond its limit and grace, on a busy machine."""


class EnvironmentFailed(Exception):
    """The environment failed: its `reset` or `get_reward` raised, or its process is gone.

    Attributes:
        message: the fault.
        remedy: what the user should write instead.
        is_of_method: whether `message` begins with the name of one of the environment's methods."""

    def __init__(self, message: str, remedy: str = "", is_of_method: bool = False) -> None:
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.message, self.remedy, self.is_of_method = message, remedy, is_of_method


class ToolCallTimeout(EnvironmentFailed):
    """A call exceeded its time and could not be interrupted, so its process was ended."""


@dataclass(frozen=True)
class CallResult:
    """The result of a tool.

    Attributes:
        text: the result as the model reads it.
        is_error: the tool raised, and text is the error's.
        is_done: whether the environment has ended the episode.
        seconds: the time that the call took."""

    text: str
    is_error: bool
    is_done: bool
    seconds: float


@functools.cache
def describe_in_subprocess(name: str) -> EnvironmentDescription:
    """Return the description of `agents.environment`. Another process imports the user's module and
    describes it.

    Raises:
        UserError: the name is unknown, or the module cannot be imported in time or has no such
            environment.
    """
    target = environment_target(name)
    try:
        process = subprocess.run(
            [sys.executable, "-m", SERVER_MODULE, "describe", target],
            capture_output=True,
            timeout=START_SECONDS,
            check=False,
            **popen_options(),
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"agents.environment: {target} took over {START_SECONDS:g} s to import",
            key="agents.environment",
            cause=Cause.FAILED,
        ) from None
    try:
        answer = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise UserError(
            f"agents.environment: importing {target} ends the process: {last_line(process.stderr)}",
            key="agents.environment",
            cause=Cause.FAILED,
        ) from None
    if error := answer.get("error"):
        raise UserError(error, key="agents.environment", cause=Cause(answer["cause"]))
    return EnvironmentDescription(**answer)


class EnvironmentPool:
    """Makes the environments of a run; their server starts with the first `open`."""

    def __init__(self, agents: AgentsConfig, description: EnvironmentDescription) -> None:
        self.description, self.call_seconds = description, agents.call_seconds
        self._target = environment_target(agents.environment)
        self._options = dict(agents.parameters)
        self._folder = Scratch()
        self._path = str(Path(self._folder.name) / "socket")
        self._process: asyncio.subprocess.Process | None = None
        self._start_lock = asyncio.Lock()
        self._idle: list[EnvironmentProcess] = []
        limit = agents.environment_processes
        self._room = asyncio.Semaphore(limit)
        # A connection to each environment, and one to an engine for its turn.
        allow_open_files(2 * limit + 512, f"agents.environment_processes: {limit:,}")

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[EnvironmentProcess]:
        """Yield a process for an episode, which begins with `reset`. The process is one whose last
        episode ended well, or a new one.

        Raises:
            RunError: the class can no longer be imported.
            EnvironmentFailed: the server has just been killed.
        """
        async with self._room:
            # A server that was killed has taken its processes with it.
            self._idle = [process for process in self._idle if process.is_alive]
            process = self._idle.pop() if self._idle else await self._start_process()
            try:
                yield process
                is_reusable = process.is_reusable and await process.finish()
            except BaseException:
                process.close()
                raise
            if is_reusable:
                self._idle.append(process)
            else:
                process.close()

    async def _start_process(self) -> EnvironmentProcess:
        async with self._start_lock:
            if self._process is None or self._process.returncode is not None:
                await self._start_server()
        try:
            stream = await asyncio.open_unix_connection(self._path)
        except OSError as error:
            raise EnvironmentFailed(f"the environments' server is gone: {error}") from None
        return EnvironmentProcess(*stream, self.call_seconds)

    async def close(self) -> None:
        """Close the environments, within `CLOSE_SECONDS`, and end the server."""
        for environment in self._idle:
            environment.close()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(CLOSE_SECONDS + 2 * GRACE_SECONDS):
                    await self._process.wait()
            except TimeoutError:
                kill_group(self._process)
                await self._process.wait()
        self._folder.cleanup()

    async def _start_server(self) -> None:
        Path(self._path).unlink(missing_ok=True)
        command = [sys.executable, "-m", SERVER_MODULE, "serve", self._target, self._path]
        self._process = await asyncio.create_subprocess_exec(
            *command,
            json.dumps(self._options),
            stdout=asyncio.subprocess.PIPE,
            limit=2**26,  # bytes of one line: importing the user's module may print long ones
            **popen_options(),
        )
        assert self._process.stdout, "started with a pipe"
        try:
            async with asyncio.timeout(START_SECONDS) as limit:
                while line := await self._process.stdout.readline():
                    if line == b"preparing\n":
                        limit.reschedule(None)  # it may take hours
                        print(f"agents.environment: {self._target} is preparing", flush=True)
                    if line == b"ready\n":
                        return
        except TimeoutError:
            self._process.kill()
        raise RunError(f"agents.environment: the server of {self._target} did not start")


class EnvironmentProcess:
    """One episode's environment: `async with environments.open() as environment`.

    Args:
        reader: the replies of the process that has the environment.
        writer: the calls to that process; closed, it ends the process.
        call_seconds: the limit of each call, `agents.call_seconds`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, call_seconds: float
    ) -> None:
        self._reader, self._writer, self._seconds = reader, writer, call_seconds
        self.is_reusable = True
        """Whether another episode may follow: no call has run out of time."""

    @property
    def is_alive(self) -> bool:
        """Whether the process still has its end of the connection open."""
        # A process that was killed before it had read all it was sent resets the connection.
        return not self._reader.at_eof() and self._reader.exception() is None

    def close(self) -> None:
        """Close the connection; the process ends with it."""
        self._writer.close()

    async def reset(self, row: Mapping[str, Any]) -> str | None:
        """Begin an episode. Return the question's text, or None to use the row's.

        Raises:
            EnvironmentFailed: the environment fails.
        """
        return await self._request_value("reset", row)

    async def reward(self, answer: str) -> float:
        """Return the episode's reward, a finite number.

        Args:
            answer: the text of the episode's last answer.

        Raises:
            EnvironmentFailed: where the environment fails."""
        return await self._request_value("reward", answer)

    async def finish(self) -> bool:
        """Close the episode's environment. Return whether the process may play another episode; not
        after an error of `close`, which must not be taken for an error of the next episode."""
        with contextlib.suppress(EnvironmentFailed):
            return (
                "error" not in await self._send_request("close", [], CLOSE_SECONDS)
                and self.is_reusable
            )
        return False

    async def call(self, name: str, arguments: object, seconds: float) -> CallResult:
        """Call a tool, for at most `seconds` and at most `call_seconds`.

        Args:
            name: the tool.
            arguments: its arguments by name, as JSON values.
            seconds: the limit of this call.

        Raises:
            EnvironmentFailed: the process ends, or the tool raises RunError.
            ToolCallTimeout: the process was ended because the call exceeded its time.
        """
        limit = min(seconds, self._seconds)
        reply = await self._send_request("call", [name, arguments], limit)
        if reply.get("is_fault"):
            raise _failure_from_reply(reply)
        is_error = "error" in reply
        text = f"error: {reply['error']}" if is_error else reply["value"]
        return CallResult(text, is_error, reply["done"], reply["seconds"])

    async def _request_value(self, method: str, argument: object) -> Any:
        reply = await self._send_request(method, [argument], self._seconds)
        if "error" in reply:
            raise _failure_from_reply(reply)
        return reply["value"]

    async def _send_request(
        self, method: str, arguments: Sequence[object], seconds: float
    ) -> dict[str, Any]:
        started_at = asyncio.get_running_loop().time()
        try:
            message = {"method": method, "arguments": arguments, "seconds": seconds}
            self._writer.write(encode_frame(message))
            async with asyncio.timeout(seconds + GRACE_SECONDS + LATE_SECONDS):
                (size,) = LENGTH_HEADER.unpack(await self._reader.readexactly(LENGTH_HEADER.size))
                reply = json.loads(await self._reader.readexactly(size))
                self.is_reusable &= "timeout" not in reply
                return reply
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            self.is_reusable = False  # a late reply would be taken for that of the next call
            fault = f"the environment's process ended during {method}"
            if asyncio.get_running_loop().time() - started_at >= seconds:
                raise ToolCallTimeout(f"{fault}, after its {seconds:g} s") from None
            raise EnvironmentFailed(fault) from None


def _failure_from_reply(reply: Mapping[str, Any]) -> EnvironmentFailed:
    return EnvironmentFailed(reply["fault"], reply.get("remedy", ""), is_of_method=True)
