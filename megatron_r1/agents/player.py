"""Plays an episode: the policy's answer, the results of its tool calls, the next answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from r1_grading.base.errors import shorten

from megatron_r1.agents.continuation import Continuation, RenderError
from megatron_r1.agents.conversation_matching import read_arguments
from megatron_r1.agents.environment_pool import (
    EnvironmentFailed,
    EnvironmentPool,
    EnvironmentProcess,
    ToolCallTimeout,
)
from megatron_r1.agents.token_tree import Message, TokenTree, tree_turns
from megatron_r1.agents.turn_parsing import TurnReader, find_parser, require_finished
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import AgentsConfig
from megatron_r1.data.chats import without_nulls
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.engines.episodes import (
    REWARDED_STATUSES,
    Episode,
    EpisodeResult,
    EpisodeStatus,
    Generate,
)
from megatron_r1.engines.server.errors import EngineError


class EpisodePlayer:
    """Plays episodes in environments of one class.

    Args:
        tokenizer: tokenizer and template.
        environments: the pool of environments of one class.
        settings: the recipe's section.
        max_model_len: most tokens of a prompt and its answer that an engine takes.
    """

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        environments: EnvironmentPool,
        settings: AgentsConfig,
        max_model_len: int,
    ) -> None:
        self.tokenizer, self.environments, self.settings = tokenizer, environments, settings
        self.max_model_len = max_model_len
        self.continuation = Continuation(tokenizer.hf_tokenizer, tokenizer.end_tokens)
        self.parsers = find_parser(settings, tokenizer.hf_tokenizer.name_or_path)
        self.reader = TurnReader(self.parsers, self.continuation)

    async def play(self, prompt: Prompt, generate: Generate, max_tokens: int) -> EpisodeResult:
        """Play one episode of a row.

        Args:
            prompt: the row.
            generate: samples the policy's turns.
            max_tokens: the most tokens after the first prompt.
        """
        running_episode = _RunningEpisode(self, generate, max_tokens)
        status: EpisodeStatus
        reward, reason = None, ""
        try:
            async with self.environments.open() as environment:
                status = await running_episode.play(prompt, environment)
                if self.environments.description.has_reward and not running_episode.is_lost:
                    answer = running_episode.answer if status == "done" else ""
                    reward = await environment.reward(answer)
        except EnvironmentFailed as fault:
            status, reason = "environment_error", str(fault)
        except EngineError as error:
            status, reason = "engine_error", str(error)
        except RenderError as error:
            status, reason = "protocol_error", str(error)
        except Exception as error:  # noqa: BLE001 - one episode must not end the run
            status, reason = "protocol_error", f"{type(error).__name__}: {error}"
        if status not in REWARDED_STATUSES:
            reward = None
        elif running_episode.is_lost:
            reward = 0.0
        return EpisodeResult(
            running_episode.episode(status, shorten(reason, 400)), running_episode.text, reward
        )

    async def check(self, prompts: Sequence[Prompt]) -> None:
        """Start a parser, and begin an episode for one row of each set of fields.

        Raises:
            UserError: vLLM has no such parser, or the environment fails for a row.
        """
        await self.parsers.check()
        for prompt in {frozenset(prompt.fields): prompt for prompt in prompts}.values():
            try:
                async with self.environments.open() as environment:
                    await environment.reset(reset_arguments(prompt))
                    if self.environments.description.has_reward:
                        await environment.reward("")
            except EnvironmentFailed as fault:
                name = f"{self.settings.environment}{'.' if fault.is_of_method else ': '}"
                row = f"{prompt.location or prompt.id} ({shorten(prompt.question)})"
                remedy = f"; {fault.remedy}" if fault.remedy else ""
                raise UserError(
                    f"agents.environment: {name}{fault.message} for the row {row}{remedy}",
                    key="agents.environment",
                    cause=Cause.FAILED,
                ) from None

    async def close(self) -> None:
        """Stop the environments' and the parsers' processes."""
        await asyncio.gather(self.environments.close(), self.parsers.close())


def reset_arguments(prompt: Prompt) -> dict[str, Any]:
    """Return the arguments that a row offers to `reset`; keys of null in its mappings are absent,
    as Arrow fills the keys that other rows have."""
    fields = {name: without_nulls(value) for name, value in prompt.fields.items()}
    return {"question": prompt.question, "truth": without_nulls(prompt.truth), **fields}


class _RunningEpisode:
    """One episode while it is played."""

    def __init__(self, player: EpisodePlayer, generate: Generate, max_tokens: int) -> None:
        self._player, self._generate, self._max_tokens = player, generate, max_tokens
        self._settings = player.settings
        self._tools = player.environments.description.tools
        self._tree = TokenTree()
        self._messages: list[Message] = []
        self._first_prompt = 0
        self._totals: dict[str, Any] = {"num_tool_calls": 0, "num_tool_errors": 0}
        self._totals |= {"tool_seconds": 0.0, "engine_seconds": 0.0}
        self.text = ""
        """The text of the last answer."""
        self.answer = ""
        """The last answer without reasoning."""
        self.is_lost = False
        """Whether one of the policy's calls has ended the environment."""

    async def play(self, prompt: Prompt, environment: EnvironmentProcess) -> EpisodeStatus:
        """Play the episode to its end, and return how it ended."""
        question = await environment.reset(reset_arguments(prompt))
        messages_before = prompt.messages_before
        if self._settings.system:
            self._messages.append({"role": "system", "content": self._settings.system})
            messages_before = [
                message for message in messages_before if message["role"] != "system"
            ]
        self._messages += messages_before
        content = prompt.question if question is None else question
        self._messages.append({"role": "user", "content": content})
        for _ in range(self._settings.max_turns):
            message = await self._sample_next_turn()
            if message is None:
                return "max_tokens"
            for call in message.get("tool_calls") or ():
                if (end_status := await self._call_tool(call, environment)) is not None:
                    return end_status
            if not message.get("tool_calls"):
                self.answer = message["content"]
                return "done"
        return "max_turns"

    async def _sample_next_turn(self) -> Message | None:
        """Sample the next turn; None where the episode is out of tokens."""
        tree, player = self._tree, self._player
        next_prompt = player.continuation.next_prompt(tree, self._messages, self._tools)
        tools = self._tools if next_prompt.parent is None else ()
        node = tree.add_prompt(
            next_prompt.parent, next_prompt.token_ids, next_prompt.messages, tools
        )
        num_tokens = tree.num_tokens(node)
        if not self._first_prompt:
            self._first_prompt = num_tokens
            if num_tokens >= player.max_model_len:
                raise EnvironmentFailed(
                    f"the first prompt has {num_tokens} tokens, and an engine takes "
                    f"{player.max_model_len} (rollout.max_model_len)"
                )
        max_length = min(self._first_prompt + self._max_tokens, player.max_model_len)
        max_tokens = max_length - num_tokens
        if max_tokens <= 0:
            return None
        started_at = time.monotonic()
        response = await self._generate(tree.token_ids(node), max_tokens)
        self._totals["engine_seconds"] += time.monotonic() - started_at
        require_finished(response)
        self.text = player.tokenizer.decode(response.token_ids)
        message = await player.reader.read(
            self.text, response.token_ids, tree.token_ids(node), self._tools
        )
        tree.add_sampled(node, response, message)
        self._messages.append(message)
        return None if response.finish_reason != "stop" else message

    async def _call_tool(
        self, call: dict[str, Any], environment: EnvironmentProcess
    ) -> EpisodeStatus | None:
        """Call a tool; return a status if the episode ends with it."""
        function = call["function"]
        self._totals["num_tool_calls"] += 1
        names = [tool["function"]["name"] for tool in self._tools]
        is_done = False
        if function["name"] not in names:
            self._totals["num_tool_errors"] += 1
            text = f"error: there is no tool {function['name']!r}; there are {', '.join(names)}"
        else:
            seconds = self._settings.timeout_seconds - self._totals["tool_seconds"]
            try:
                arguments = read_arguments(function)  # the environment names the model's mistakes
                result = await environment.call(function["name"], arguments, seconds)
            except ToolCallTimeout:
                self.is_lost = True
                self._totals["tool_seconds"] += min(seconds, self._settings.call_seconds)
                return "agent_timeout"
            self._totals["tool_seconds"] += result.seconds
            self._totals["num_tool_errors"] += result.is_error
            text, is_done = result.text, result.is_done
        limit = self._settings.max_result_chars
        text = text if len(text) <= limit else f"{text[:limit]} … (cut off)"
        self._messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
        if self._totals["tool_seconds"] >= self._settings.timeout_seconds:
            return "agent_timeout"
        return "done" if is_done else None

    def episode(self, status: EpisodeStatus, reason: str) -> Episode:
        """Return the episode as it has been played so far."""
        turns = tree_turns(self._tree, self._player.tokenizer.decode)
        branches = self._tree.branches()
        return Episode(status, turns, branches, **self._totals, reason=reason)
