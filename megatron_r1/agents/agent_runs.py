"""Runs an agent: a function, or a program per episode, which reaches the policy by HTTP.

Each gets a base URL, a key and a row. It needs no code of this package."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from r1_grading.base import lifetime
from r1_grading.base.workers import last_line

from megatron_r1.base.processes.children import kill_group, popen_options
from megatron_r1.base.user_code import find_function
from megatron_r1.config import AgentsConfig

Run = Callable[[str, str, dict[str, Any]], Awaitable[Any]]
"""Runs an agent: (base_url, api_key, row) → its reward, None where the row's own reward grades the
episode, or an `AgentOutcome`."""


OUTPUT_BYTES = 2**16
"""What is kept of a program's output; its end has the reward, or the error."""


@runtime_checkable
class RunWithServer(Protocol):
    """A `Run` that needs a server, which is started before the first episode."""

    async def start(self) -> None:
        """Start the server; called once, before the first episode."""

    async def close(self) -> None:
        """Stop the server."""


@dataclass(frozen=True)
class AgentOutcome:
    """What an agent's run has returned.

    Attributes:
        reward: None where the row's own reward grades the episode.
        sequences: the agent's record of the tokens, each sequence up to its last sampled token;
            None where the agent keeps no record."""

    reward: float | None
    sequences: list[list[int]] | None = None


def find_harness(agents: AgentsConfig) -> Run:
    """Return the function or the command of `agents.harness`. Raises UserError."""
    if isinstance(agents.harness, str):
        return function_harness(agents.harness)
    return CommandHarness(agents.harness, agents.harness_processes)


def function_harness(path: str) -> Run:
    """Return the function "module:function" as a `Run`. Raises UserError.

    A plain function runs in a thread, which cannot be ended; its key is refused once the episode is
    over."""
    function = find_function(path)
    if inspect.iscoroutinefunction(function):
        return function

    async def run(base_url: str, api_key: str, row: dict[str, Any]) -> Any:
        result: Future[Any] = Future()
        result.set_running_or_notify_cancel()  # a cancelled run leaves it to the thread

        def work() -> None:
            try:
                result.set_result(function(base_url, api_key, row))
            except Exception as error:  # noqa: BLE001 - raised again where it is awaited
                result.set_exception(error)

        # Not a pool's thread: those would keep the process from ending.
        threading.Thread(target=work, daemon=True, name="agent").start()
        value = await asyncio.wrap_future(result)
        # An object with an async __call__, or a decorated coroutine function.
        return await value if inspect.isawaitable(value) else value

    return run


class CommandHarness:
    """Runs a program for each episode, in a new folder that is deleted afterwards.

    The program finds the gateway in OPENAI_BASE_URL, OPENAI_API_KEY, ANTHROPIC_BASE_URL and
    ANTHROPIC_API_KEY, and the row as JSON on its standard input. The last line of its output may be
    `{"reward": 0.5}`. It must end with status 0."""

    def __init__(self, command: Sequence[str], most_at_once: int) -> None:
        # Files are named relative to the folder in which the run was started. Links stay: a virtual
        # environment's Python is one.
        self._command = [os.path.abspath(p) if os.path.isfile(p) else p for p in command]
        self.slots = asyncio.Semaphore(most_at_once)
        """Limits the programs at once; a caller holds it around each call."""

    async def __call__(self, base_url: str, api_key: str, row: dict[str, Any]) -> float | None:
        """Run the program. Raises RuntimeError where it fails."""
        root = base_url.removesuffix("/v1")
        keys = {"OPENAI_API_KEY": api_key, "ANTHROPIC_API_KEY": api_key}
        urls = {"OPENAI_BASE_URL": base_url, "OPENAI_API_BASE": base_url}
        environment = keys | urls | {"ANTHROPIC_BASE_URL": root}
        # `lifetime` sets the kernel's death signal and then becomes the program, which so ends with
        # this process. It is run by path: the program may have another Python, and gets no
        # PYTHONPATH.
        command = [sys.executable, "-I", lifetime.__file__, *self._command]
        with tempfile.TemporaryDirectory(prefix="r1-agent-") as folder:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=folder,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                **popen_options(environment) | {"stdin": asyncio.subprocess.PIPE},
            )
            assert process.stdin and process.stdout and process.stderr, "started with pipes"
            try:
                out, err, _ = await asyncio.gather(
                    _last_bytes(process.stdout),
                    _last_bytes(process.stderr),
                    _write(process.stdin, json.dumps(row).encode()),
                )
                await process.wait()
            finally:
                kill_group(process)
                await process.wait()
        if process.returncode:
            name = Path(self._command[0]).name
            raise RuntimeError(f"{name} ended with {process.returncode}: {last_line(err)}")
        return _last_reward(out)


async def _last_bytes(stream: asyncio.StreamReader) -> bytes:
    """Return the last `OUTPUT_BYTES` of a program's output, which may be gigabytes."""
    last = b""
    while content := await stream.read(OUTPUT_BYTES):
        last = (last + content)[-OUTPUT_BYTES:]
    return last


async def _write(stream: asyncio.StreamWriter, content: bytes) -> None:
    """Write a program's whole input; it need not read it."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stream.write(content)
        await stream.drain()
    stream.close()


def _last_reward(output: bytes) -> float | None:
    lines = output.strip().splitlines()
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError):
        return json.loads(lines[-1])["reward"]
    return None
