"""Who prefers one answer to another, and calls one safe or not: a served model, or a function."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from megatron_r1.config.sample import SERVED_JUDGE, SampleConfig
from megatron_r1.curation.memo import Memo
from megatron_r1.curation.user_function import UserFunction, load_function
from megatron_r1.rewards.judge import Comparison, Judge
from megatron_r1.rewards.remote.judge_client import JudgeSettings
from megatron_r1.rewards.remote.judge_prompts import SAFETY
from megatron_r1.rewards.remote.settings import read_settings

NO_VOTE = frozenset(
    ("url", "api_key_env", "timeout_seconds", "retry_seconds", "concurrency", "cache")
)
"""Settings of a served judge that change none of its votes."""
ARGUMENTS = {"pairs": "question, first, second", "labels": "question, response"}


class AnswerJudge(Protocol):
    """Votes are remembered: none is asked for twice, also by a command that continues."""

    async def check(self) -> None:
        """Raises what shows that it cannot judge at all."""

    async def compare(self, question: str, first: str, second: str) -> Comparison:
        """Half of the votes see `second` first. Raises Ungradable."""

    async def safety(self, question: str, response: str) -> float:
        """Share of the votes for safe, in [0, 1]. Raises Ungradable."""

    async def close(self) -> None: ...


def make_judge(config: SampleConfig, options: Mapping[str, Any], memo: Memo) -> AnswerJudge:
    """options: `rewards.options.judge`. Raises ValueError for a judge without an address, and for a
    function that cannot be called."""
    if config.judge != SERVED_JUDGE:
        arguments = ARGUMENTS[config.output]
        function = load_function(config.judge, "sample.judge", arguments)
        return FunctionJudge(function, config.pairs.votes, memo)
    mode = "compare" if config.output == "pairs" else "verify"
    try:
        settings = read_settings("judge", JudgeSettings, {**options, "mode": mode})
    except ValueError as error:
        raise ValueError(
            f"sample.output: {config.output} needs a judge: {error}; or name a function of yours, "
            f"sample.judge: module:function({ARGUMENTS[config.output]})"
        ) from None
    return ServedJudge(Judge(settings), memo)


class FunctionJudge:
    """compare: above 0.5 is a vote for the first answer, below for the second, 0.5 is a tie."""

    def __init__(self, function: UserFunction, num_votes: int, memo: Memo) -> None:
        self._function, self._memo = function, memo
        self._num_votes = num_votes

    async def check(self) -> None: ...

    async def compare(self, question: str, first: str, second: str) -> Comparison:
        key = ("compare", self._function.identity, self._num_votes, question, first, second)
        if key not in self._memo:
            orders = [(first, second), (second, first)] * (self._num_votes // 2)
            votes = await asyncio.gather(*(self._ask(question, *order) for order in orders))
            straight = [1 - v if i % 2 else v for i, v in enumerate(votes)]
            wins, losses = sum(v > 0.5 for v in straight), sum(v < 0.5 for v in straight)
            self._memo[key] = [wins, losses, self._num_votes - wins - losses]
        return Comparison(*self._memo[key])

    async def safety(self, question: str, response: str) -> float:
        key = ("safety", self._function.identity, question, response)
        if key not in self._memo:
            self._memo[key] = await self._ask(question, response)
        return self._memo[key]

    async def close(self) -> None: ...

    async def _ask(self, *texts: str) -> float:
        said = await self._function(*texts)
        if not isinstance(said, bool | int | float) or not 0 <= said <= 1:
            raise ValueError(
                f"{self._function.key}: {self._function.path} returned {said!r}; return a number "
                "from 0 to 1"
            )
        return float(said)


class ServedJudge:
    """Asks `rewards.judge`; see docs/rewards/models.md for what a judge is shown."""

    def __init__(self, judge: Judge, memo: Memo) -> None:
        self._judge, self._memo = judge, memo
        settings = judge.settings.model_dump(exclude=NO_VOTE)
        self._identity = {**settings, "votes": judge.settings.num_votes}

    async def check(self) -> None:
        await self._judge.check()

    async def compare(self, question: str, first: str, second: str) -> Comparison:
        key = ("compare", self._identity, question, first, second)
        if key not in self._memo:
            made = await self._judge.compare(question, first, second)
            self._memo[key] = [made.wins, made.losses, made.ties]
        return Comparison(*self._memo[key])

    async def safety(self, question: str, response: str) -> float:
        key = ("safety", self._identity, question, response)
        if key not in self._memo:
            num_votes = self._judge.settings.num_votes
            texts = {"question": question, "response": response}
            votes = await self._judge.client.votes(SAFETY, texts, num_votes)
            self._memo[key] = votes.count("safe") / num_votes
        return self._memo[key]

    async def close(self) -> None:
        await self._judge.close()
