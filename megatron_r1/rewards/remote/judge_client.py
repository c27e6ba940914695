"""A client of a judge: its settings, one request per vote, the valid verdicts, their cache."""

import asyncio
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megatron_r1.errors import Cause, UserError
from megatron_r1.files import atomic_write
from megatron_r1.rewards.remote.completions import ChatChoice, Completion
from megatron_r1.rewards.remote.judge_prompts import VERDICTS, judge_prompt, read_verdict
from megatron_r1.rewards.remote.response_text import Part, break_control_tokens, cut_middle
from megatron_r1.rewards.remote.service import Service, Ungradable
from megatron_r1.rewards.remote.settings import ServiceSettings

DEFAULT_VOTES = {"verify": 3, "compare": 4}


class JudgeSettings(ServiceSettings):
    """Settings of `judge`, as a reward and for preference pairs."""

    mode: Literal["verify", "compare"] = Field(
        "verify", description="against a reference answer, or against another response"
    )
    votes: int | None = Field(None, ge=1, description="default: 3 to verify, 4 to compare")
    temperature: float | None = Field(0.6, ge=0, description="null: the service's own")
    max_tokens: int | None = Field(4096, gt=0, description="limit of a judgement; null: not sent")
    part: Part = Field("summary", description="shown: what follows the thought, or the response")
    cache: str | None = Field(None, description="folder that keeps the judge's replies")
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="more keys of the request; one that is null is left out"
    )

    @model_validator(mode="after")
    def _votes_can_decide(self) -> Self:
        if self.num_votes % 2 != (self.mode == "verify"):
            need = {
                "verify": "odd to verify, so that there is a majority",
                "compare": "even to compare, so that each response is shown first equally often",
            }
            message = f"votes must be {need[self.mode]}; got {self.votes}"
            raise UserError(message, key="votes", cause=Cause.CONFLICT)
        return self

    @property
    def num_votes(self) -> int:
        return DEFAULT_VOTES[self.mode] if self.votes is None else self.votes


def compared_part(options: dict[str, Any]) -> Part | None:
    """Return the part of a response that a judge with these options compares; None for a judge that
    verifies. options: `rewards.options.judge`, after validation."""
    settings = JudgeSettings.model_fields
    if options.get("mode", settings["mode"].default) != "compare":
        return None
    part: Part = options.get("part", settings["part"].default)
    return part


class JudgeClient:
    """The judge's service (`/chat/completions`, OpenAI's form) and its cache."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.cache = None if settings.cache is None else ReplyCache(settings.cache)
        self.probe = self._body("Reply with the word ready.")
        url = f"{settings.api_base}/chat/completions"
        self.service = Service(settings, url, Completion[ChatChoice], self.probe)

    async def votes(
        self, instructions: str, texts: dict[str, str], num_votes: int, first: int = 0
    ) -> list[str]:
        """Return `num_votes` verdicts on `texts`; those named "response…" are cut if too long.

        A reply without a verdict is no vote and is replaced, `num_votes` times at most; then this
        raises Ungradable. first: number of the first of up to 2 x num_votes requests; a vote's
        number is part of its request, and of its name in the cache."""
        texts = {name: break_control_tokens(text) for name, text in texts.items()}
        for name in texts:
            if name.startswith("response"):
                texts[name] = cut_middle(texts[name], self.settings.max_chars)
        verdicts: list[str] = []
        next_vote, end = first, first + 2 * num_votes
        while (missing := num_votes - len(verdicts)) and next_vote < end:
            batch = range(next_vote, min(next_vote + missing, end))
            next_vote = batch.stop
            votes = await asyncio.gather(*(self._vote(instructions, texts, i) for i in batch))
            verdicts += [verdict for verdict in votes if verdict is not None]
        if missing:
            raise Ungradable(
                f"{len(verdicts)} of {next_vote - first} answers of {self.settings.model!r} end "
                f"with a verdict, {num_votes} are needed"
            )
        return verdicts

    async def _vote(self, instructions: str, texts: dict[str, str], number: int) -> str | None:
        message, key = judge_prompt(instructions, texts, number)
        verdict = read_verdict(await self._reply(message, number), key, VERDICTS[instructions])
        if verdict is None:
            self.service.counters["no_verdict"] += 1
        return verdict

    async def _reply(self, message: str, number: int) -> str:
        body = self._body(message)
        if self.cache and (cached := await self.cache.get(body, number)) is not None:
            self.service.counters["cached"] += 1
            return cached
        choices = (await self.service.request(body)).choices
        # A reply that was cut off has no verdict.
        is_whole = choices and choices[0].finish_reason != "length"
        reply = (choices[0].message.content or "") if is_whole else ""
        if self.cache:
            await self.cache.put(body, number, reply)
        return reply

    def _body(self, message: str) -> dict[str, Any]:
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": message}],
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
        } | self.settings.extra_body
        return {name: value for name, value in body.items() if value is not None}


class ReplyCache:
    """One JSON file per reply, named by the hash of the request and of the vote's number.

    Several processes may share a folder: a file appears whole, by a rename, and processes that
    write the same name write replies to the same request. Files are never evicted: each is 2-10 KB,
    and the folder may be deleted at any time, or by age with `find FOLDER -mtime +30 -delete`.
    The model's name is part of the request and the address is not, so that a served model may move;
    use a folder per model where two have the same name. An invalid file counts as absent."""

    def __init__(self, folder: str | Path) -> None:
        """Open the cache. Raises UserError when its folder cannot be created or written to."""
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cache: {folder} cannot be made ({error.strerror}); choose another",
                key="cache",
                cause=Cause.UNREADABLE,
            ) from None
        if not os.access(self.folder, os.W_OK):
            raise UserError(
                f"cache: {folder} cannot be written to; choose another",
                key="cache",
                cause=Cause.UNREADABLE,
            )

    async def get(self, request: dict[str, Any], vote: int) -> str | None:
        return await asyncio.to_thread(self._read, self._path(request, vote))

    async def put(self, request: dict[str, Any], vote: int, reply: str) -> None:
        entry = {"request": request, "vote": vote, "answer": reply}
        # Not durable: a reply lost in a power cut is requested again.
        path, content = self._path(request, vote), json.dumps(entry)
        await asyncio.to_thread(atomic_write, path, content, durable=False)

    def _path(self, request: dict[str, Any], vote: int) -> Path:
        name = hashlib.sha256(json.dumps([request, vote], sort_keys=True).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def _read(self, path: Path) -> str | None:
        try:
            reply = json.loads(path.read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return reply if isinstance(reply, str) else None
