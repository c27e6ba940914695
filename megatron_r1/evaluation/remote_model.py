"""A model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, a provider."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from r1_grading.reading import END_THINK, THINK
from r1_grading.remote.service import (
    Completion,
    CompletionChoice,
    Service,
    ServiceError,
    Ungradable,
)

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import AgentsConfig
from megatron_r1.config.eval import ServerConfig
from megatron_r1.data.chats import Message
from megatron_r1.data.few_shot import FewShotExamples
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompt_templates import (
    find_template,
    opens_thought,
    render_template,
    system_text,
)
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.evaluation.sampling_settings import SamplingSettings

TINY_QUESTION = "1 + 1 ="
CONNECT_SECONDS = 5.0
"""The time limit of one attempt to connect."""
FIRST_TOKENS = (
    "<|begin_of_text|>",
    "<s>",
    "<bos>",
    "<｜begin▁of▁sentence｜>",
    "<|startoftext|>",
    "[BOS]",
    "[gMASK]",
    "<BOS_TOKEN>",
)
"""Tokens with which models' texts begin. A server that completes a text puts its own in front, a
second one where the text has it; `add_special_tokens: false` of vLLM and SGLang says not to."""
PAUSE_SECONDS = 1.0
REPORT_SECONDS = 5.0


UNSET_OPTIONS = {"stop": (), "stop_token_ids": (), "top_k": None, "min_p": 0.0}
"""Sampling parameters that are no part of OpenAI's API, by the value that changes nothing."""


class RemoteModel:
    """Sends one request per response, and repeats it while the server is busy or away
    (`r1_grading.remote.service`).

    Args:
        server: the recipe's section.
        template: used with api "completions" only.
        decoding: temperature, cut and limit.
        shots: worked examples before every question.
        key: the recipe's key of the server, for errors.

    Raises:
        ValueError: for a template that needs a tokenizer, and for an api_key_env that is not set.
    """

    def __init__(
        self,
        server: ServerConfig,
        template: str,
        decoding: SamplingSettings,
        shots: FewShotExamples | None = None,
        key: str = "eval.server",
    ) -> None:
        self._server = server
        self._decoding = decoding
        self._shots = shots
        self._key = key
        self._chat = server.api == "chat"
        if not self._chat:
            find_template(template)
        self._template = template
        path = "/chat/completions" if self._chat else "/completions"
        probe = self._request_body(TINY_QUESTION, 0) | {"max_tokens": 1}
        address = server.api_base + path
        try:
            self._service = Service(server, address, Completion[CompletionChoice], probe)
        except UserError as error:
            error.key = f"{key}.{error.key}"
            raise
        self._takes_limits = False
        self.concurrency = server.concurrency
        # The address is not part of it: a server may restart on another node.
        self.identity: dict[str, Any] = {
            f"{key}.model": server.model,
            f"{key}.api": server.api,
            "data.template": None if self._chat else template,
        }

    async def start(self) -> None:
        """Request one token, so that a wrong address, name or key is reported now. An unreachable
        server is retried for `wait_seconds`, one that is loading for `retry_seconds`.

        Raises:
            ServiceError: the server refuses the request, or cannot be reached in time.
        """
        url, failures = self._server.url, [""]
        name = f"model {self._server.model} at {url}"
        async with _report_waiting(name, lambda: self._service.trouble or failures[-1]):
            await wait_until_listening(url, self._server.wait_seconds, failures.append, self._key)
            try:
                await self._service.request(
                    self._request_body(TINY_QUESTION, 0) | {"max_tokens": 1}
                )
            except Ungradable as error:
                raise ServiceError(f"{url}: {error}; check {self._key}") from None

    async def respond(
        self, question: str, seed: int, before: Sequence[Message] = ()
    ) -> TextResponse:
        """Sample one response. A question that the server refuses gets no response.

        Args:
            question: the user's last message.
            seed: the seed of the sampling, which the server may ignore.
            before: the messages before the question.

        Raises:
            ServiceError: the server refuses every question, or is down."""
        try:
            reply = await self._service.request(self._request_body(question, seed, before))
        except Ungradable as error:
            await self._refuse_limits(error)
            return TextResponse("", refusal=f"the server gave no response: {error}")
        self._takes_limits = True
        if not reply.choices:
            return TextResponse("", refusal="the server's reply has no choices")
        text, truncated = _choice_text(reply.choices[0]), reply.choices[0].finish_reason == "length"
        num_tokens = reply.usage.completion_tokens if reply.usage else None
        return TextResponse(text, num_tokens, truncated, self._thought_opened(text, truncated))

    async def check(self, agents: AgentsConfig, prompts: Sequence[Prompt]) -> None:
        """Raise UserError: no episode can be played without the tokens of a model folder."""
        raise UserError(
            f"{self._key}: episodes in environment {agents.environment} need the tokens of a model "
            "folder; give model.path instead",
            key=self._key,
            cause=Cause.CONFLICT,
        )

    async def play(self, agents: AgentsConfig, prompt: Prompt, seed: int) -> TextResponse:
        """Refuse an episode, as `check` does before.

        Args:
            agents: the environment.
            prompt: its first question.
            seed: the seed of its sampling.

        Raises:
            AssertionError: always."""
        raise AssertionError("refused by check()")

    async def close(self) -> None:
        """Close the connections to the server."""
        await self._service.close()

    async def _refuse_limits(self, refusal: Ungradable) -> None:
        """Raise ServiceError if the server refuses every question, not just the refused one."""
        if self._takes_limits:
            return
        try:
            await self._service.request(self._request_body(TINY_QUESTION, 0))
        except Ungradable:
            raise ServiceError(
                f"{self._server.url} answers no question: {refusal}; "
                "rollout.max_response_tokens and the prompt must fit the model"
            ) from None
        self._takes_limits = True

    def _request_body(
        self, question: str, seed: int, before: Sequence[Message] = ()
    ) -> dict[str, Any]:
        content: dict[str, Any]
        if self._chat:
            turns: list[Message] = [{"role": "user", "content": question}]
            turns = self._shots.chat_messages(question) if self._shots else turns
            content = {"messages": [*before, *turns]}
        elif self._shots:
            content = {"prompt": self._shots.prompt_text(self._template, question, before)}
        else:
            system = system_text(before, "data.template")
            content = {"prompt": render_template(self._template, question, system)}
        if content.get("prompt", "").startswith(FIRST_TOKENS):
            content["add_special_tokens"] = False
        decoding = {
            k: v for k, v in asdict(self._decoding).items() if v != UNSET_OPTIONS.get(k, ...)
        }
        if self._decoding.stop:  # vLLM's; the reward reads the string
            decoding["include_stop_str_in_output"] = True
        return {"model": self._server.model, **content, **decoding, "seed": seed}

    def _thought_opened(self, text: str, is_truncated: bool) -> bool:
        """Return whether the response starts inside a thought that the prompt opened. A server does
        not show its chat template, and the templates of reasoning models end with <think>. So a
        truncated response without any tag counts as an unfinished thought, which has no answer."""
        if not self._chat:
            return opens_thought(find_template(self._template))
        return is_truncated and THINK not in text and END_THINK not in text


def _choice_text(choice: CompletionChoice) -> str:
    if choice.message is None:
        return choice.text or ""
    thought = choice.message.reasoning_content or choice.message.reasoning
    content = choice.message.content or ""
    if thought and END_THINK not in content:
        # Joined again, so that it is graded like any other response. Without content the thought
        # was cut off.
        return f"{THINK}\n{thought}\n" + (f"{END_THINK}\n\n{content}" if content else "")
    return content


async def wait_until_listening(
    url: str, wait_seconds: float, on_failure: Callable[[str], None], key: str = "eval.server"
) -> None:
    """Return when the host and port of `url` accept connections.

    Args:
        url: the server's.
        wait_seconds: the time limit. The default is short: a wrong address should show at once, and
            only the user knows how long the server takes to start.
        on_failure: called with the reason after each failed attempt.
        key: the recipe's key of the server, for the error.

    Raises:
        ServiceError: nothing listens after `wait_seconds`."""
    address = urlsplit(url)
    port = address.port or {"http": 80, "https": 443}[address.scheme]
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            connecting = asyncio.open_connection(address.hostname, port)
            _, writer = await asyncio.wait_for(connecting, CONNECT_SECONDS)
            writer.close()
            return
        except TimeoutError:
            failure = f"no connection within {CONNECT_SECONDS:g} s"
        except OSError as error:  # refused, no route, no such host
            failure = error.strerror or str(error)
        on_failure(failure)
        if time.monotonic() + PAUSE_SECONDS > deadline:
            raise ServiceError(
                f"{url}: no server answers there ({failure}). Start the server or correct "
                f"{key}.url; for a server that is still loading, raise {key}.wait_seconds, now "
                f"{wait_seconds:g}"
            )
        await asyncio.sleep(PAUSE_SECONDS)


@contextlib.asynccontextmanager
async def _report_waiting(name: str, reason: Callable[[], str]) -> AsyncIterator[None]:
    """Print a line when the block begins, and a line with the latest reason every few seconds."""
    print(f"waiting for {name}", flush=True)
    started_at = time.monotonic()

    async def report() -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            explanation = f": {reason()}" if reason() else ""
            print(
                f"waiting for {name}, {time.monotonic() - started_at:.0f} s{explanation}",
                flush=True,
            )

    reporting = asyncio.create_task(report())
    try:
        yield
    finally:
        reporting.cancel()
