"""Runs an agent, a function or a program per episode, and plays its episodes: it calls the policy
by HTTP, through the gateway.

The agent is not changed for it, and needs no code of this package: it gets a base URL, a key and a
row. The turns of the episode are those in the session's tree."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from r1_grading.base import lifetime
from r1_grading.base.errors import shorten
from r1_grading.base.workers import last_line
from r1_grading.rewards import ENVIRONMENT

from megatron_r1.agents.environment_pool import EnvironmentFailed
from megatron_r1.agents.gateway import Gateway, GatewaySession, SessionLimits, TurnSampling
from megatron_r1.agents.player import reset_arguments
from megatron_r1.agents.token_tree import tree_turns
from megatron_r1.agents.turn_parsing import Parser
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes.children import kill_group, popen_options
from megatron_r1.base.user_code import find_function
from megatron_r1.config import AgentsConfig
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.engines.episodes import REWARDED_STATUSES, Episode, EpisodeResult, Generate

AgentFunction = Callable[[str, str, dict[str, Any]], Awaitable[Any]]
"""Runs an agent: (base_url, api_key, row) → its reward, None where the row's own reward grades the
episode, or an `AgentOutcome`."""


OUTPUT_BYTES = 2**16
"""What is kept of a program's output; its end has the reward, or the error."""


@runtime_checkable
class AgentServer(Protocol):
    """A `AgentFunction` that needs a server, which is started before the first episode."""

    async def start(self) -> None:
        """Start the server; called once, before the first episode."""

    async def close(self) -> None:
        """End the server, if `start` began one."""


@dataclass(frozen=True)
class AgentOutcome:
    """What an agent's run has returned.

    Attributes:
        reward: None where the row's own reward grades the episode.
        sequences: the agent's record of the tokens, each sequence up to its last sampled token;
            None where the agent keeps no record."""

    reward: float | None
    sequences: list[list[int]] | None = None


def find_harness(agents: AgentsConfig) -> AgentFunction:
    """Return the function or the command of `agents.harness`.

    Raises:
        UserError: the function cannot be imported.
    """
    if isinstance(agents.harness, str):
        return function_harness(agents.harness)
    return CommandHarness(agents.harness, agents.harness_processes)


def function_harness(path: str) -> AgentFunction:
    """Return the function "module:function" as a `AgentFunction`.

    A plain function runs in a thread, which cannot be ended; its key is refused once the episode is
    over.

    Raises:
        UserError: the function cannot be imported.
    """
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
        """Run the program.

        Raises:
            RuntimeError: the program fails.
        """
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
                    _write_input(process.stdin, json.dumps(row).encode()),
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
    last_output = b""
    while content := await stream.read(OUTPUT_BYTES):
        last_output = (last_output + content)[-OUTPUT_BYTES:]
    return last_output


async def _write_input(stream: asyncio.StreamWriter, content: bytes) -> None:
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


CLOCK_SECONDS = 0.2
"""The shortest wait between two checks of an episode's clock, which stands still while engines
sample."""
ENDING_SECONDS = 5.0
"""The time that a cancelled agent gets to end."""


class HarnessPlayer:
    """Plays episodes with one agent; an `engines.episodes.Player`."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        gateway: Gateway,
        parsers: Parser,
        run: AgentFunction,
        *,
        max_turns: int,
        timeout_seconds: float,
        max_model_len: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        """Prepare to play episodes with a harness.

        Args:
            tokenizer: the tokenizer and its template.
            gateway: receives the harness's requests.
            parsers: reads calls and thoughts out of sampled turns.
            run: runs the harness.
            max_turns: limit of an episode.
            timeout_seconds: limit of an episode; the time in which engines sample does not count.
            max_model_len: the most tokens of a prompt and its answer that an engine takes.
            temperature: the sampling temperature.
            top_p: the sampling's probability mass."""
        self.tokenizer = tokenizer
        self.gateway = gateway
        self.parsers = parsers
        self.run = run
        self._max_turns, self._timeout_seconds = max_turns, timeout_seconds
        self._max_model_len = max_model_len
        self._sampling = temperature, top_p

    async def check(self, prompts: Sequence[Prompt]) -> None:
        """Start the gateway, a parser and the agent's server, if it has one.

        Raises:
            UserError: no parser or server starts, or the gateway's address is taken.
        """
        await self.parsers.check()
        try:
            if isinstance(self.run, AgentServer):
                await self.run.start()
        except EnvironmentFailed as fault:
            raise UserError(f"section agents: {fault}", key="agents", cause=Cause.FAILED) from None
        try:
            await self.gateway.start()
        except OSError as error:
            raise UserError(
                f"agents.gateway_host: the gateway cannot listen: {error}",
                key="agents.gateway_host",
                cause=Cause.NOT_FOUND,
            ) from None

    async def close(self) -> None:
        """Close the gateway, the parsers and the agent's server."""
        await self.gateway.close()
        await self.parsers.close()
        if isinstance(self.run, AgentServer):
            await self.run.close()

    async def play(self, prompt: Prompt, generate: Generate, max_tokens: int) -> EpisodeResult:
        """Play one episode of a row.

        Args:
            prompt: the row.
            generate: samples the policy's turns.
            max_tokens: the most that are sampled in all its turns.
        """
        # The agent's clock does not run while the episode waits for a program to end.
        async with getattr(self.run, "slots", contextlib.nullcontext()):
            return await self._play_episode(prompt, generate, max_tokens)

    async def _play_episode(
        self, prompt: Prompt, generate: Generate, max_tokens: int
    ) -> EpisodeResult:
        session = self.gateway.open(
            SessionLimits(self._max_turns, max_tokens),
            TurnSampling(generate, self._max_model_len, *self._sampling),
        )
        started_at = time.monotonic()
        reward: float | None = None
        is_finished = False
        url = f"{self.gateway.url}/v1"
        agent = asyncio.ensure_future(self.run(url, session.secret, reset_arguments(prompt)))
        try:
            if await self._finished_in_time(agent, session, started_at):
                outcome = await agent
                if isinstance(outcome, AgentOutcome):
                    _compare_sequences(outcome, session)
                    outcome = outcome.reward
                reward = _as_reward(outcome, prompt)
                is_finished = True
            else:
                session.end("agent_timeout", f"after {self._timeout_seconds:g} s of its own")
        except EnvironmentFailed as fault:
            session.end("environment_error", str(fault))
        except Exception as error:  # noqa: BLE001 - an agent may raise anything
            refusals = [note for note in session.notes if note.startswith("refused: ")]
            refusal_note = f"; the gateway {refusals[-1]}" if refusals else ""
            session.end("harness_error", f"{type(error).__name__}: {error}{refusal_note}")
        finally:
            await self.gateway.end(session)
            await _end_agent(agent)
        if session.failures:
            session.end("engine_error", "")
        if not session.num_turns and session.status in (None, *REWARDED_STATUSES):
            # The policy has done nothing that could be rewarded.
            cause = f": {session.reason}" if session.reason else ""
            session.status = "harness_error"
            session.reason = f"the agent ended without a turn of the policy{cause}"
        return self._make_result(session, reward, is_finished, time.monotonic() - started_at)

    async def _finished_in_time(
        self, agent: asyncio.Future[Any], session: GatewaySession, started_at: float
    ) -> bool:
        """Wait until the agent has ended; return False where its time is over first."""
        while True:
            agent_seconds = time.monotonic() - started_at - session.engine_seconds
            seconds = self._timeout_seconds - agent_seconds
            if seconds <= 0:
                return False
            done_tasks, _ = await asyncio.wait({agent}, timeout=max(seconds, CLOCK_SECONDS))
            if done_tasks:
                return True

    def _make_result(
        self, session: GatewaySession, reward: float | None, is_finished: bool, seconds: float
    ) -> EpisodeResult:
        status: Any = session.status or ("max_tokens" if session.is_out_of_tokens else "done")
        if status not in REWARDED_STATUSES:
            reward = None
        elif reward is None and not is_finished:
            reward = 0.0  # the policy's own doing: there is no answer to grade
        calls = [
            call
            for node in session.tree.nodes
            if node.is_sampled
            for call in node.messages[0].get("tool_calls") or ()
        ]
        episode = Episode(
            status,
            tree_turns(session.tree, self.tokenizer.decode),
            session.tree.branches(),
            num_tool_calls=len(calls),
            tool_seconds=max(0.0, seconds - session.engine_seconds),
            engine_seconds=session.engine_seconds,
            reason=shorten(session.reason, 400),
        )
        return EpisodeResult(episode, session.last_text, reward)


def _compare_sequences(outcome: AgentOutcome, session: GatewaySession) -> None:
    """End the episode as protocol_error where the agent's record has other tokens than the tree."""
    if outcome.sequences is None:
        return
    recorded_sequences = {tuple(ids) for ids in outcome.sequences if ids}
    sampled_sequences = {tuple(branch.token_ids) for branch in session.tree.branches()}
    if recorded_sequences != sampled_sequences:
        num_unknown = len(recorded_sequences - sampled_sequences)
        num_missing = len(sampled_sequences - recorded_sequences)
        session.end(
            "protocol_error",
            f"the agent's record has {num_unknown} sequences that were not sampled so, and "
            f"lacks {num_missing} of {len(sampled_sequences)}",
        )


def _as_reward(value: Any, prompt: Prompt) -> float | None:
    """Return what an agent's run returned as a reward.

    Raises:
        ValueError: it is not a finite number.
    """
    if value is None and prompt.kind == ENVIRONMENT:
        raise ValueError("the agent returned no reward, and data.kind: environment has no other")
    if value is None:
        return None
    if not isinstance(value, Real) and hasattr(value, "item"):
        value = value.item()  # a tensor, or numpy's bool
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"the agent returned {value!r:.80}; a reward is a finite number or None")
    return float(value)


async def _end_agent(agent: asyncio.Future[Any]) -> None:
    """Cancel an agent and wait for a moment until it has ended."""
    agent.cancel()
    await asyncio.wait({agent}, timeout=ENDING_SECONDS)
    if agent.done() and not agent.cancelled():
        agent.exception()  # it was reported, or came too late
