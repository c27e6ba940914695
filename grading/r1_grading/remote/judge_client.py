"""Calls the server of a judge."""

import asyncio
from typing import Any

from r1_grading.reading import break_control_tokens, cut_middle
from r1_grading.remote.judge_prompt import (
    VERDICTS_BY_TASK,
    judge_prompt,
    read_verdict,
)
from r1_grading.remote.judge_settings import JudgeSettings
from r1_grading.remote.reply_cache import ReplyCache
from r1_grading.remote.service import ChatChoice, Completion, Service, Ungradable


class JudgeClient:
    """The judge's service (`/chat/completions`, OpenAI's form) and its cache."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.cache = None if settings.cache is None else ReplyCache(settings.cache)
        self.probe = self._request_body("Reply with the word ready.")
        url = f"{settings.api_base}/chat/completions"
        self.service = Service(settings, url, Completion[ChatChoice], self.probe)

    async def votes(
        self, instructions: str, texts: dict[str, str], num_votes: int, first: int = 0
    ) -> list[str]:
        """Return `num_votes` verdicts on `texts`.

        A reply without a verdict is no vote and is replaced, `num_votes` times at most.

        Args:
            instructions: the template of a request.
            texts: name → text in the template; those named "response…" are cut if too long.
            num_votes: the number of verdicts.
            first: the number of the first of up to 2 x num_votes requests; a vote's number is part
                of its request, and of its name in the cache.

        Raises:
            Ungradable: too many replies without a verdict."""
        texts = {name: break_control_tokens(text) for name, text in texts.items()}
        for name in texts:
            if name.startswith("response"):
                texts[name] = cut_middle(texts[name], self.settings.max_chars)
        verdicts: list[str] = []
        next_vote, end = first, first + 2 * num_votes
        while (num_missing := num_votes - len(verdicts)) and next_vote < end:
            batch = range(next_vote, min(next_vote + num_missing, end))
            next_vote = batch.stop
            votes = await asyncio.gather(
                *(self._request_vote(instructions, texts, i) for i in batch)
            )
            verdicts += [verdict for verdict in votes if verdict is not None]
        if num_missing:
            raise Ungradable(
                f"{len(verdicts)} of {next_vote - first} answers of {self.settings.model!r} end "
                f"with a verdict, {num_votes} are needed"
            )
        return verdicts

    async def _request_vote(
        self, instructions: str, texts: dict[str, str], number: int
    ) -> str | None:
        message, key = judge_prompt(instructions, texts, number)
        verdict = read_verdict(
            await self._fetch_reply(message, number), key, VERDICTS_BY_TASK[instructions]
        )
        if verdict is None:
            self.service.counters["no_verdict"] += 1
        return verdict

    async def _fetch_reply(self, message: str, number: int) -> str:
        body = self._request_body(message)
        if self.cache and (cached_reply := await self.cache.get(body, number)) is not None:
            self.service.counters["cached"] += 1
            return cached_reply
        choices = (await self.service.request(body)).choices
        # A reply that was cut off has no verdict.
        is_whole = choices and choices[0].finish_reason != "length"
        reply = (choices[0].message.content or "") if is_whole else ""
        if self.cache:
            await self.cache.put(body, number, reply)
        return reply

    def _request_body(self, message: str) -> dict[str, Any]:
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": message}],
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
        } | self.settings.extra_body
        return {name: value for name, value in body.items() if value is not None}
