"""A language model as the judge, for answers that no rule can grade.

`verify`: the judge reads question, reference answer and response, and decides whether the response
is correct. DeepSeek-R1 uses DeepSeek-V3 in this way where rejection sampling cannot check by rule
(arXiv 2501.12948, section 2.3.3 of v1). `compare`: it reads two responses and decides which is
better; R1's preference pairs take four such judgements each, with near-ties dropped (supplement B.3
of v2)."""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from r1_grading.base.errors import Cause, UserError
from r1_grading.reading import Part, response_part
from r1_grading.remote.judge_client import JudgeClient
from r1_grading.remote.judge_prompt import (
    COMPARE,
    VERIFY,
)
from r1_grading.remote.judge_settings import JudgeSettings
from r1_grading.remote.service import ServiceError, Ungradable
from r1_grading.rewards import Grade


def compared_part(options: dict[str, Any]) -> Part | None:
    """Return the part of a response that a judge with these options compares.

    None for a judge that verifies.

    Args:
        options: `rewards.options.judge`, after validation."""
    settings = JudgeSettings.model_fields
    if options.get("mode", settings["mode"].default) != "compare":
        return None
    part: Part = options.get("part", settings["part"].default)
    return part


CHECK_SECONDS = 10.0
JUDGE_CHECK = {
    "question": "What is 7 + 5?",
    "right": "The answer is 12.",
    "wrong": "The answer is 13.",
}


@dataclass(frozen=True)
class PairVotes:
    """Votes for and against the first of two responses; half of the votes saw it as B.

    Attributes:
        wins: votes for the first response.
        losses: votes for the second.
        ties: votes for neither."""

    wins: int
    losses: int
    ties: int

    @property
    def preference(self) -> float:
        """Share of the votes for the first response, a tie as one half; in [0, 1]."""
        return (self.wins + self.ties / 2) / (self.wins + self.losses + self.ties)

    def winner(self, margin: float = 0.5) -> int | None:
        """Return 0 or 1 for the better response, or None for a tie or near-tie.

        In a near-tie the shares of wins and losses differ by less than `margin`, in [0, 1]."""
        lead = 2 * self.preference - 1
        if lead == 0 or abs(lead) < margin:
            return None
        return 0 if lead > 0 else 1


class Judge(JudgeClient):
    """The reward `judge`. No request is sent before the first call."""

    settings_type = JudgeSettings

    async def check(self) -> None:
        """Raise ServiceError unless the service separates a right answer from a wrong one.

        It has to reply within seconds, with valid verdicts."""
        question, correct_answer, incorrect_answer = JUDGE_CHECK.values()
        error_prefix = f"{self.service.url}: model {self.settings.model!r} cannot serve as a judge"
        try:
            await self.service.request(self.probe, CHECK_SECONDS)
            if self.settings.mode == "verify":
                separates = await asyncio.gather(
                    self.verify(question, "12", correct_answer),
                    self.verify(question, "12", incorrect_answer),
                ) == [True, False]
            else:
                separates = (
                    await self.compare(question, correct_answer, incorrect_answer)
                ).preference > 0.5
        except Ungradable as error:
            raise ServiceError(f"{error_prefix}: {error}") from None
        if not separates:
            raise ServiceError(
                f"{error_prefix}: asked {question!r}, it takes {incorrect_answer!r} for "
                f"{correct_answer!r}"
            )

    async def grade(
        self,
        response: str,
        truth: object,
        *,
        question: str | None = None,
        thought_opened: bool = False,
        **entry: object,
    ) -> Grade:
        """Return the grade of a response by the judge's votes.

        In the mode "verify" it is 1 when most votes find the response correct, else 0; in the mode
        "compare", the share of votes that prefer it to `truth`.

        Args:
            response: the text that the policy sampled.
            truth: to verify: the reference answer; to compare: another response to the question.
            question: what was asked.
            thought_opened: the prompt ended with `<think>`.
            **entry: the prompt's other fields, which are not used.

        Raises:
            UserError: no question or no truth.
            Ungradable: too few replies have a verdict.
            ServiceError: the service cannot grade."""
        mode = self.settings.mode
        if not isinstance(question, str) or truth is None:
            missing_field = "question" if truth is not None else "truth"
            raise UserError(
                f"the judge needs a {missing_field} to {mode} a response: add it to the row",
                key=missing_field,
                cause=Cause.MISSING,
            )
        part = response_part(response, self.settings.part, thought_opened)
        if part.text is None:
            return Grade(0.0, part.reason)
        reference = truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False)
        if mode == "verify":
            is_correct = await self.verify(question, reference, part.text)
            return Grade(float(is_correct), f"judged {'correct' if is_correct else 'incorrect'}")
        comparison = await self.compare(question, part.text, reference)
        reason = (
            f"won {comparison.wins}, lost {comparison.losses}, tied {comparison.ties} comparisons"
        )
        return Grade(comparison.preference, reason)

    async def verify(self, question: str, truth: str, response: str) -> bool:
        """Whether most of the votes find `response` correct.

        No further votes are requested when the first majority of votes agree.

        Args:
            question: the prompt's question.
            truth: the reference answer.
            response: the part of the response that is shown.

        Raises:
            Ungradable: the judge cannot decide on this response.
            ServiceError: the service is down."""
        texts = {"question": question, "reference answer": truth, "response": response}
        num_votes = self.settings.num_votes
        majority = num_votes // 2 + 1
        votes = await self.votes(VERIFY, texts, majority)
        if len(set(votes)) > 1:
            num_missing = num_votes - majority
            votes += await self.votes(VERIFY, texts, num_missing, first=2 * majority)
        return votes.count("correct") >= majority

    async def compare(self, question: str, first: str, second: str) -> PairVotes:
        """Return votes on two responses.

        Each response is A in exactly half of the votes, instead of at random: a judge that always
        chooses A then gives a tie for any number of votes, not only on average.

        Args:
            question: the prompt's question.
            first: one response.
            second: the other.

        Raises:
            Ungradable: the judge cannot decide on these responses.
            ServiceError: the service is down."""
        num_votes = self.settings.num_votes
        if first == second:
            return PairVotes(0, 0, num_votes)
        ordered_texts = {"question": question, "response A": first, "response B": second}
        swapped_texts = {"question": question, "response A": second, "response B": first}
        orders = (
            self.votes(COMPARE, texts, num_votes // 2) for texts in (ordered_texts, swapped_texts)
        )
        as_a, as_b = map(Counter, await asyncio.gather(*orders))
        return PairVotes(as_a["A"] + as_b["B"], as_a["B"] + as_b["A"], as_a["tie"] + as_b["tie"])

    async def close(self) -> None:
        """Close the connections to the service."""
        await self.service.close()
