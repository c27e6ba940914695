"""Votes of a judge: settings, one request per vote, verdicts that count."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import msgspec
from pydantic import Field, model_validator

from megatron_r1.rewards.remote.cache import ReplyCache
from megatron_r1.rewards.remote.judge_prompts import VERDICTS, judge_prompt, read_verdict
from megatron_r1.rewards.remote.response_text import Part
from megatron_r1.rewards.remote.service import Service, Ungradable
from megatron_r1.rewards.remote.settings import ServiceSettings
from megatron_r1.rewards.remote.untrusted_text import break_control_tokens, cut_middle

DEFAULT_VOTES = {"verify": 3, "compare": 4}


class JudgeSettings(ServiceSettings):
    mode: Literal["verify", "compare"] = Field(
        "verify", description="against a reference answer, or against another response"
    )
    votes: int | None = Field(None, ge=1, description="default: 3 to verify, 4 to compare")
    temperature: float | None = Field(0.6, ge=0, description="null: the service's own")
    max_tokens: int | None = Field(4096, gt=0, description="of a judgement; null: not sent")
    part: Part = Field("summary", description="shown: what follows the thought, or the response")
    cache: str | None = Field(None, description="folder that keeps the judge's answers")
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="more keys of the request; one that is null is left out"
    )

    @model_validator(mode="after")
    def _votes_can_decide(self) -> JudgeSettings:
        wanted, why = (
            ("odd", "there is a majority")
            if self.mode == "verify"
            else ("even", "each response is shown first equally often")
        )
        if self.num_votes % 2 != (wanted == "odd"):
            raise ValueError(
                f"votes must be {wanted} to {self.mode}, so that {why}; got {self.votes}"
            )
        return self

    @property
    def num_votes(self) -> int:
        return DEFAULT_VOTES[self.mode] if self.votes is None else self.votes


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class JudgeClient:
    """The judge's service (`/chat/completions`, OpenAI's form) and its cache."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.cache = None if settings.cache is None else ReplyCache(settings.cache)
        self.probe = self._body("Reply with the word ready.")
        url = f"{settings.api_base}/chat/completions"
        self.service = Service(settings, url, _Completion, self.probe)

    async def votes(
        self, instructions: str, texts: dict[str, str], num_votes: int, first: int = 0
    ) -> list[str]:
        """`num_votes` verdicts on `texts`, those named "response…" without their middle where they
        are too long.

        An answer without a verdict is no vote, and another is asked for, `num_votes` times at most;
        Ungradable when that is not enough. first: the number of the first vote of the
        2 x num_votes there may be; a vote's number makes its request, and its place in the cache.
        """
        shown = {name: break_control_tokens(text) for name, text in texts.items()}
        for name in shown:
            if name.startswith("response"):
                shown[name] = cut_middle(shown[name], self.settings.max_chars)
        verdicts: list[str] = []
        asked, end = first, first + 2 * num_votes
        while (missing := num_votes - len(verdicts)) and asked < end:
            batch = range(asked, min(asked + missing, end))
            asked = batch.stop
            answers = await asyncio.gather(*(self._vote(instructions, shown, i) for i in batch))
            verdicts += [verdict for verdict in answers if verdict is not None]
        if missing:
            raise Ungradable(
                f"{len(verdicts)} of {asked - first} answers of {self.settings.model!r} end with "
                f"a verdict, {num_votes} are needed"
            )
        return verdicts

    async def _vote(self, instructions: str, texts: dict[str, str], number: int) -> str | None:
        message, key = judge_prompt(instructions, texts, number)
        verdict = read_verdict(await self._answer(message, number), key, VERDICTS[instructions])
        if verdict is None:
            self.service.counters["no_verdict"] += 1
        return verdict

    async def _answer(self, message: str, number: int) -> str:
        body = self._body(message)
        if self.cache and (answer := await self.cache.get(body, number)) is not None:
            self.service.counters["cached"] += 1
            return answer
        choices = (await self.service.request(body)).choices
        # A judgement that was cut off has not been reached.
        is_whole = choices and choices[0].finish_reason != "length"
        answer = (choices[0].message.content or "") if is_whole else ""
        if self.cache:
            await self.cache.put(body, number, answer)
        return answer

    def _body(self, message: str) -> dict[str, Any]:
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": message}],
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
        } | self.settings.extra_body
        return {name: value for name, value in body.items() if value is not None}
