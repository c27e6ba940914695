"""Environments of `verifiers` (PyPI), which run unmodified in a Python of their own: the
environment's server is a process of another Python (`serve.py`), started again where it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import uuid
from pathlib import Path
from typing import Any

from r1_grading.base.workers import StderrTail, last_line

from megatron_r1.agents.environment_pool import EnvironmentFailed
from megatron_r1.agents.harness import AgentOutcome
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes.children import kill_group, popen_options
from megatron_r1.config import VerifiersConfig

SCRIPT = Path(__file__).with_name("serve.py")
START_SECONDS = 300.0
LINE_BYTES = 2**28
"""The longest reply, which has the tokens of all branches of an episode."""


class VerifiersHarness:
    """Runs an episode per call; a `harness.AgentFunction`."""

    def __init__(self, settings: VerifiersConfig, tokenizer: str) -> None:
        """Prepare the harness.

        Args:
            settings: the recipe's section.
            tokenizer: the tokenizer's folder, for client `tokens`."""
        self._settings, self._tokenizer = settings, tokenizer
        self._process: asyncio.subprocess.Process | None = None
        self._start_lock = asyncio.Lock()
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def __call__(self, base_url: str, api_key: str, row: dict[str, Any]) -> AgentOutcome:
        """Play the task of a row.

        Raises:
            EnvironmentFailed: the server is lost.
            RuntimeError: verifiers reports an error.
        """
        await self.start()
        gives_tokens = self._settings.client == "tokens"
        job = {
            "id": uuid.uuid4().hex,
            "task": row["task"],
            "key": api_key,
            "client": self._settings.client,
            "base_url": base_url.removesuffix("/v1") if gives_tokens else base_url,
            "renderer": self._settings.renderer,
            "tokenizer": self._tokenizer,
        }
        reply = await self._request_reply(job)
        if not reply["ok"]:
            if reply.get("traces", 1) != 1:
                raise RuntimeError(f"the episode has {reply['traces']} traces; one can be trained")
            if reply.get("is_timeout"):
                reply["errors"].append("a time-out of verifiers, whose clock counts the engines")
            raise RuntimeError(f"verifiers: {'; '.join(reply['errors']) or 'not ok'}")
        return AgentOutcome(reply["reward"], reply["sequences"] if gives_tokens else None)

    async def start(self) -> None:
        """Start the server, unless it runs.

        Raises:
            EnvironmentFailed: the server cannot be started, or does not start in time.
        """
        async with self._start_lock:
            if self._reader is not None and not self._reader.done():
                return
            await self.close()
            environment = env_config(self._settings)
            options = {"environment": environment, "workers": self._settings.workers}
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *script_command(self._settings, options),
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    limit=LINE_BYTES,
                    **popen_options(script_environment()) | {"stdin": asyncio.subprocess.PIPE},
                )
            except OSError as error:
                raise EnvironmentFailed(f"{self._settings.python}: {error}") from None
            ready_future = self._register_future("")
            self._reader = asyncio.create_task(self._read_replies(self._process))
            try:
                async with asyncio.timeout(START_SECONDS):
                    await ready_future
            except TimeoutError:
                raise EnvironmentFailed("verifiers' server did not start in time") from None

    async def close(self) -> None:
        """End the server and the processes that it has started."""
        process, self._process = self._process, None
        if process is not None:
            kill_group(process)
            await process.wait()
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=5.0)
            self._reader = None

    async def _request_reply(self, job: dict[str, Any]) -> dict[str, Any]:
        future = self._register_future(job["id"])
        self._write_message(job)
        try:
            return await future
        except asyncio.CancelledError:
            self._write_message({"cancel": job["id"]})
            raise
        finally:
            self._waiting.pop(job["id"], None)

    def _register_future(self, job_id: str) -> asyncio.Future[dict[str, Any]]:
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[job_id] = future
        return future

    def _write_message(self, message: dict[str, Any]) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(ConnectionError):  # the reader reports the loss
                self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _read_replies(self, process: asyncio.subprocess.Process) -> None:
        """Give each reply to its caller until the process ends; then fail the calls that wait."""
        assert process.stdout and process.stderr, "started with pipes"
        errors = StderrTail(process.stderr)
        try:
            while line := await process.stdout.readline():
                reply = json.loads(line)
                future = self._waiting.get(reply["id"])
                if future is not None and not future.done():
                    future.set_result(reply)
        finally:
            await asyncio.wait({errors.task}, timeout=1.0)
            fault = f"verifiers' server has ended: {errors.last_line or 'no message'}"
            waiting_futures, self._waiting = self._waiting, {}
            for future in waiting_futures.values():
                if not future.done():
                    future.set_exception(EnvironmentFailed(fault))


def env_config(settings: VerifiersConfig) -> dict[str, Any]:
    """Return verifiers' EnvConfig. The runtime is a subprocess: the default is a cloud."""
    agent: dict[str, Any] = {"runtime": {"type": "subprocess"}}
    if settings.harness:
        agent["harness"] = {"id": settings.harness, **settings.harness_options}
    taskset = {"id": settings.taskset, **settings.taskset_options}
    return {"taskset": taskset, "agent": agent, **settings.environment_options}


def script_command(settings: VerifiersConfig, options: dict[str, Any]) -> list[str]:
    """Return the command of the script in verifiers' Python."""
    return [settings.python, str(SCRIPT), json.dumps(options)]


def script_environment() -> dict[str, str]:
    """Return the environment variables of verifiers' Python, which can import modules of the
    working folder."""
    return {"PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1"}


def list_tasks(settings: VerifiersConfig) -> list[dict[str, Any]]:
    """Return the tasks of `agents.verifiers.taskset`, one object each, listed by verifiers' own
    python.

    Raises:
        UserError: the python of `agents.verifiers` cannot run, or verifiers refuses the taskset.
    """
    options = {"environment": env_config(settings), "list": True}
    try:
        process = subprocess.run(
            script_command(settings, options),
            env=os.environ | script_environment(),
            capture_output=True,
            timeout=START_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"agents.verifiers.python: {settings.python} cannot list the tasks: {error}; make an "
            "environment with verifiers (in a checkout: `make agents`), and name its python",
            key="agents.verifiers.python",
            cause=Cause.NOT_FOUND,
        ) from None
    if process.returncode:
        raise UserError(
            f"agents.verifiers.taskset: {settings.taskset}: {last_line(process.stderr)}",
            key="agents.verifiers.taskset",
            cause=Cause.FAILED,
        )
    return [json.loads(line) for line in process.stdout.splitlines()]
