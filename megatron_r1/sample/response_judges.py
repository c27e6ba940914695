"""Judges that compare two responses or call one safe: a served model, or a user's function."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from r1_grading.remote import read_settings
from r1_grading.remote.judge import Judge, PairVotes
from r1_grading.remote.judge_prompt import SAFETY
from r1_grading.remote.judge_settings import JudgeSettings

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.sample import SERVED_JUDGE, SampleConfig
from megatron_r1.sample.result_cache import ResultCache
from megatron_r1.sample.user_functions import UserFunction, load_function

NO_VOTE = {"url", "api_key_env", "timeout_seconds", "retry_seconds", "concurrency", "cache"}
"""Settings of a served judge that change none of its votes."""
JUDGE_ARGUMENTS = {"pairs": "question, first, second", "labels": "question, response"}


class ResponseJudge(ABC):
    """Base class of judges. Votes are cached on disk by the texts that were judged, so that a
    resumed command requests no vote twice.

    Args:
        identity: a JSON value of everything besides the texts that the votes depend on.
        cache: where votes are kept."""

    def __init__(self, identity: object, cache: ResultCache) -> None:
        self._identity, self._cache = identity, cache

    async def compare(self, question: str, first: str, second: str) -> PairVotes:
        """Return the votes on two responses; half of them see `second` first.

        Args:
            question: the text that both responses answer.
            first: the text of a response.
            second: that of the other.

        Raises:
            Ungradable: the judge cannot decide on these responses."""
        key = ("compare", self._identity, question, first, second)
        return PairVotes(*await self._cache.get(key, lambda: self._vote_counts(*key[2:])))

    async def safety(self, question: str, response: str) -> float:
        """Return the share of votes for safe, in [0, 1].

        Raises:
            Ungradable: the judge cannot decide on this response.
        """
        key = ("safety", self._identity, question, response)
        return await self._cache.get(key, lambda: self._safe_fraction(*key[2:]))

    async def check(self) -> None:  # noqa: B027 - a function needs none
        """Raise an error if the judge cannot be used at all."""

    async def close(self) -> None:  # noqa: B027
        """Close its connections."""

    @abstractmethod
    async def _vote_counts(self, question: str, first: str, second: str) -> list[int]:
        """Return the counts of `PairVotes`: wins, losses, ties."""

    @abstractmethod
    async def _safe_fraction(self, question: str, response: str) -> float: ...


class FunctionJudge(ResponseJudge):
    """Asks a user's function for the votes on responses. compare: above 0.5 is a vote for the first
    response, below for the second, 0.5 is a tie.

    Args:
        function: takes a question and responses, and returns a number.
        num_votes: the votes on a pair, half of them in each order of its responses.
        cache: where votes are kept."""

    def __init__(self, function: UserFunction, num_votes: int, cache: ResultCache) -> None:
        super().__init__((function.identity, num_votes), cache)
        self._function, self._num_votes = function, num_votes

    async def _vote_counts(self, question: str, first: str, second: str) -> list[int]:
        orders = [(first, second), (second, first)] * (self._num_votes // 2)
        votes = await asyncio.gather(*(self._call_function(question, *order) for order in orders))
        for_first = [1 - vote if i % 2 else vote for i, vote in enumerate(votes)]
        wins, losses = sum(v > 0.5 for v in for_first), sum(v < 0.5 for v in for_first)
        return [wins, losses, self._num_votes - wins - losses]

    async def _safe_fraction(self, question: str, response: str) -> float:
        return await self._call_function(question, response)

    async def _call_function(self, *texts: str) -> float:
        """Return the function's number for `texts`.

        Raises:
            UserError: the function returns anything but a number from 0 to 1.
        """
        vote = await self._function(*texts)
        if not isinstance(vote, bool | int | float) or not 0 <= vote <= 1:
            raise UserError(
                f"{self._function.key}: {self._function.path} returned {vote!r}; return a number "
                "from 0 to 1",
                key=self._function.key,
                cause=Cause.FAILED,
            )
        return float(vote)


class ServedJudge(ResponseJudge):
    """Votes of `r1_grading.remote.judge`; docs/rewards/models.md has what a judge is shown."""

    def __init__(self, judge: Judge, cache: ResultCache) -> None:
        settings = judge.settings.model_dump(exclude=NO_VOTE)
        super().__init__({**settings, "votes": judge.settings.num_votes}, cache)
        self._judge = judge

    async def check(self) -> None:
        """Ask the judge once.

        Raises:
            ServiceError: it does not reply, or its verdicts do not tell right from wrong.
        """
        await self._judge.check()

    async def close(self) -> None:
        """Close the connections to the judge."""
        await self._judge.close()

    async def _vote_counts(self, question: str, first: str, second: str) -> list[int]:
        compared = await self._judge.compare(question, first, second)
        return [compared.wins, compared.losses, compared.ties]

    async def _safe_fraction(self, question: str, response: str) -> float:
        num_votes = self._judge.settings.num_votes
        texts = {"question": question, "response": response}
        votes = await self._judge.votes(SAFETY, texts, num_votes)
        return votes.count("safe") / num_votes


def make_judge(
    config: SampleConfig, options: Mapping[str, Any], cache: ResultCache
) -> ResponseJudge:
    """Return the judge that `sample.judge` names.

    Args:
        config: the recipe's section.
        options: `rewards.options.judge`.
        cache: where votes are kept.

    Raises:
        UserError: a judge without an address, and a function that cannot be called."""
    if config.judge != SERVED_JUDGE:
        function = load_function(config.judge, "sample.judge", JUDGE_ARGUMENTS[config.output])
        return FunctionJudge(function, config.pairs.votes, cache)
    mode = "compare" if config.output == "pairs" else "verify"
    try:
        settings = read_settings("judge", JudgeSettings, {**options, "mode": mode})
    except UserError as error:
        raise UserError(
            f"sample.output: {config.output} needs a judge: {error}; or name a function of yours, "
            f"sample.judge: module:function({JUDGE_ARGUMENTS[config.output]})",
            key=error.key,
            cause=error.cause,
        ) from None
    return ServedJudge(Judge(settings), cache)
