"""Plays episodes with an agent of any make, which reaches the policy through the gateway.

The agent is a function or a program that is given a base URL, a key and a row. It runs unmodified;
what it sampled is the session's tree."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from megatron_r1.agents.continuation import Continuation
from megatron_r1.agents.environment_pool import EnvironmentFault
from megatron_r1.agents.episode import SCORED, Episode, turns_of
from megatron_r1.agents.gateway import (
    Gateway,
    Session,
    SessionLimits,
    TurnSampler,
    TurnSampling,
)
from megatron_r1.agents.parsing import Parser, parser_of
from megatron_r1.agents.player import Generate, Played, row_of
from megatron_r1.config import AgentsConfig
from megatron_r1.data.prompts import Prompt
from megatron_r1.data.text import PromptText
from megatron_r1.errors import UserError
from megatron_r1.processes import lifetime
from megatron_r1.processes.children import popen_options
from megatron_r1.rewards import ENVIRONMENT
from megatron_r1.rewards.base import shorten
from megatron_r1.user_code import find_function

Run = Callable[[str, str, dict[str, Any]], Awaitable[Any]]
"""Runs an agent: (base_url, api_key, row) -> its reward, or None where rewards of ours grade, or an
`Outcome`."""
CLOCK_SECONDS = 0.2
"""Between two looks at an episode's clock, which stands still while engines sample."""
ENDING_SECONDS = 5.0
"""For an agent whose time is over to end by itself."""


@runtime_checkable
class Server(Protocol):
    """A `Run` that has something to start and to end."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """A reward with the agent's own record of the tokens: every sequence up to its last sampled
    token; None where it keeps none."""

    reward: float | None
    sequences: list[list[int]] | None = None


class HarnessPlayer:
    """Plays episodes with one agent; see `player.EpisodePlayer`."""

    def __init__(
        self,
        text: PromptText,
        gateway: Gateway,
        parsers: Parser,
        run: Run,
        limits: tuple[int, float],
        room: int,
        sampling: tuple[float, float],
    ) -> None:
        """limits: turns of an episode, and seconds without those of the engines. room: most tokens
        of a prompt and its answer that an engine takes. sampling: temperature and top_p."""
        self.text, self.gateway, self.parsers, self.run = text, gateway, parsers, run
        self._max_turns, self._timeout_seconds = limits
        self._room, self._sampling = room, sampling

    async def check(self, prompts: Sequence[Prompt]) -> None:
        """Start the gateway, a parser, and what the agent needs. Raises UserError."""
        await self.parsers.check()
        try:
            if isinstance(self.run, Server):
                await self.run.start()
        except EnvironmentFault as fault:
            raise UserError(f"section agents: {fault}") from None
        try:
            await self.gateway.start()
        except OSError as error:
            raise UserError(f"agents.gateway_host: the gateway cannot listen: {error}") from None

    async def close(self) -> None:
        """Stop the gateway, the parsers, and what the agent needed."""
        await self.gateway.close()
        await self.parsers.close()
        if isinstance(self.run, Server):
            await self.run.close()

    async def play(self, prompt: Prompt, generate: Generate, max_tokens: int) -> Played:
        """Play one episode of a row. max_tokens: sampled in all."""
        # The agent's clock does not run while the episode waits for a program to end.
        async with getattr(self.run, "slots", contextlib.nullcontext()):
            return await self._play(prompt, generate, max_tokens)

    async def _play(self, prompt: Prompt, generate: Generate, max_tokens: int) -> Played:
        session = self.gateway.open(
            SessionLimits(self._max_turns, max_tokens),
            TurnSampling(generate, self._room, self.text.end, *self._sampling),
        )
        began = time.monotonic()
        reward: float | None = None
        is_finished = False
        url = f"{self.gateway.url}/v1"
        agent = asyncio.ensure_future(self.run(url, session.secret, row_of(prompt)))
        try:
            if await self._within_its_time(agent, session, began):
                outcome = await agent
                if isinstance(outcome, Outcome):
                    _compare(outcome, session)
                    outcome = outcome.reward
                reward = _as_reward(outcome, prompt)
                is_finished = True
            else:
                session.end("agent_timeout", f"after {self._timeout_seconds:g} s of its own")
        except EnvironmentFault as fault:
            session.end("environment_error", str(fault))
        except Exception as error:  # noqa: BLE001 - an agent may raise anything
            refusals = [note for note in session.notes if note.startswith("refused: ")]
            last = f"; the gateway {refusals[-1]}" if refusals else ""
            session.end("harness_error", f"{type(error).__name__}: {error}{last}")
        finally:
            await self.gateway.end(session)
            await _end(agent)
        if session.failures:
            session.end("engine_error", "")
        if not session.num_turns and session.status in (None, *SCORED):
            # A reward would be for nothing that the policy has done.
            cause = f": {session.reason}" if session.reason else ""
            session.status = "harness_error"
            session.reason = f"the agent ended without a turn of the policy{cause}"
        return self._played(session, reward, is_finished, time.monotonic() - began)

    async def _within_its_time(
        self, agent: asyncio.Future[Any], session: Session, began: float
    ) -> bool:
        """Wait until the agent has ended; return False where its time has passed before."""
        while True:
            own = time.monotonic() - began - session.engine_seconds
            left = self._timeout_seconds - own
            if left <= 0:
                return False
            done, _ = await asyncio.wait({agent}, timeout=max(left, CLOCK_SECONDS))
            if done:
                return True

    def _played(
        self, session: Session, reward: float | None, is_finished: bool, seconds: float
    ) -> Played:
        status: Any = session.status or ("max_tokens" if session.is_cut else "done")
        if status not in SCORED:
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
            turns_of(session.tree, self.text.decode),
            session.tree.branches(),
            num_tool_calls=len(calls),
            tool_seconds=max(0.0, seconds - session.engine_seconds),
            engine_seconds=session.engine_seconds,
            reason=shorten(session.reason, 400),
        )
        return Played(episode, session.last_text, reward)


def harness_player(
    text: PromptText, agents: AgentsConfig, run: Run, room: int, sampling: tuple[float, float]
) -> HarnessPlayer:
    """Return the player of an agent with the settings of a recipe. room, sampling: as
    `HarnessPlayer`'s."""
    tokenizer = text.tokenizer
    parsers = parser_of(
        agents.tool_parser, agents.reasoning_parser, tokenizer.name_or_path, agents.parser_workers
    )
    gateway = Gateway(
        TurnSampler(text.decode, parsers),
        Continuation(tokenizer),
        host=agents.gateway_host,
        sampling_options=agents.sampling_options,
    )
    limits = agents.max_turns, agents.timeout_seconds
    return HarnessPlayer(text, gateway, parsers, run, limits, room, sampling)


def harness_of(agents: AgentsConfig) -> Run:
    """Return what `agents.harness` names. Raises UserError."""
    if isinstance(agents.harness, str):
        return function_harness(agents.harness)
    return CommandHarness(agents.harness, agents.harness_processes)


def function_harness(path: str) -> Run:
    """Return the function "module:function" as what runs an agent. A plain function runs in a
    thread: it cannot be ended, but has no key any more once its episode is over. Raises
    UserError."""
    function = find_function(path)
    if inspect.iscoroutinefunction(function):
        return function

    async def run(base_url: str, api_key: str, row: dict[str, Any]) -> Any:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: Exception | None) -> None:
            if result.done():
                return
            if error is None:
                result.set_result(value)
            else:
                result.set_exception(error)

        def work() -> None:
            ending: tuple[Any, Exception | None]
            try:
                ending = function(base_url, api_key, row), None
            except Exception as error:  # noqa: BLE001 - raised again where it is awaited
                ending = None, error
            with contextlib.suppress(RuntimeError):  # the run has ended
                loop.call_soon_threadsafe(settle, *ending)

        # Not a pool's thread: those would keep the process from ending.
        threading.Thread(target=work, daemon=True, name="agent").start()
        value = await result
        # An object with an async __call__, or a decorated coroutine function.
        return await value if inspect.isawaitable(value) else value

    return run


class CommandHarness:
    """A program per episode, in a folder of its own that is deleted afterwards.

    It finds the gateway in OPENAI_BASE_URL, OPENAI_API_KEY, ANTHROPIC_BASE_URL and
    ANTHROPIC_API_KEY, and the row as JSON on its standard input. Its last line may be
    `{"reward": 0.5}`. It must end with status 0."""

    def __init__(self, command: Sequence[str], most_at_once: int) -> None:
        # Files are named relative to the folder in which the run was started. Links stay: a virtual
        # environment's Python is one.
        self._command = [os.path.abspath(p) if os.path.isfile(p) else p for p in command]
        self.slots = asyncio.Semaphore(most_at_once)
        """To be held around a call."""

    async def __call__(self, base_url: str, api_key: str, row: dict[str, Any]) -> float | None:
        """Run the program. Raises RuntimeError where it fails."""
        root = base_url.removesuffix("/v1")
        keys = {"OPENAI_API_KEY": api_key, "ANTHROPIC_API_KEY": api_key}
        urls = {"OPENAI_BASE_URL": base_url, "OPENAI_API_BASE": base_url}
        environment = keys | urls | {"ANTHROPIC_BASE_URL": root}
        # The program ends with this process: `lifetime` asks the kernel for that, and becomes it.
        # By its path, as the program may have a Python of its own, and no PYTHONPATH of ours.
        command = [sys.executable, "-I", lifetime.__file__, *self._command]
        with tempfile.TemporaryDirectory(prefix="r1-agent-") as folder:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=folder,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                **popen_options(environment) | {"stdin": asyncio.subprocess.PIPE},
            )
            try:
                out, err = await process.communicate(json.dumps(row).encode())
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if process.returncode:
            last = (err.decode("utf-8", "replace").strip() or "no message").splitlines()[-1]
            raise RuntimeError(
                f"{Path(self._command[0]).name} ended with {process.returncode}: {last}"
            )
        return _last_reward(out)


def _last_reward(output: bytes) -> float | None:
    lines = output.strip().splitlines()
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError):
        return json.loads(lines[-1])["reward"]
    return None


def _compare(outcome: Outcome, session: Session) -> None:
    """End the episode as protocol_error where the agent's record has other tokens than the tree."""
    if outcome.sequences is None:
        return
    theirs = {tuple(ids) for ids in outcome.sequences if ids}
    ours = {tuple(branch.token_ids) for branch in session.tree.branches()}
    if theirs != ours:
        session.end(
            "protocol_error",
            f"the agent's record has {len(theirs - ours)} sequences that were not sampled so, and "
            f"lacks {len(ours - theirs)} of {len(ours)}",
        )


def _as_reward(value: Any, prompt: Prompt) -> float | None:
    """Return what an agent's run returned as a reward. Raises ValueError for what is none."""
    if value is None and prompt.kind == ENVIRONMENT:
        raise ValueError("the agent returned no reward, and data.kind: environment has no other")
    if value is None:
        return None
    if not isinstance(value, Real) and hasattr(value, "item"):
        value = value.item()  # a tensor, or numpy's bool
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"the agent returned {value!r:.80}; a reward is a finite number or None")
    return float(value)


async def _end(agent: asyncio.Future[Any]) -> None:
    """Cancel an agent and wait for a moment until it has ended."""
    agent.cancel()
    await asyncio.wait({agent}, timeout=ENDING_SECONDS)
    if agent.done() and not agent.cancelled():
        agent.exception()  # it was reported, or came too late
