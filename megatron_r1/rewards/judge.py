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

from megatron_r1.errors import Cause, UserError
from megatron_r1.rewards.base import Grade
from megatron_r1.rewards.remote.judge_client import JudgeClient, JudgeSettings
from megatron_r1.rewards.remote.judge_prompts import COMPARE, VERIFY
from megatron_r1.rewards.remote.response_text import response_part
from megatron_r1.rewards.remote.service import ServiceError, Ungradable

CHECK_SECONDS = 10.0
CHECK = {"question": "What is 7 + 5?", "right": "The answer is 12.", "wrong": "The answer is 13."}


@dataclass(frozen=True)
class Comparison:
    """Votes for and against the first of two responses; half of the votes saw it as B."""

    wins: int
    losses: int
    ties: int

    @property
    def preference(self) -> float:
        """Share of the votes for the first response, a tie as one half; in [0, 1]."""
        return (self.wins + self.ties / 2) / (self.wins + self.losses + self.ties)

    def winner(self, margin: float = 0.5) -> int | None:
        """Return 0 or 1 for the better response, or None for a tie or near-tie: the shares of wins
        and losses differ by less than `margin`, in [0, 1]."""
        lead = 2 * self.preference - 1
        if lead == 0 or abs(lead) < margin:
            return None
        return 0 if lead > 0 else 1


class Judge(JudgeClient):
    """The reward `judge`. No request is sent before the first call."""

    settings_type = JudgeSettings

    async def check(self) -> None:
        """Raise ServiceError unless the service replies within seconds, with valid verdicts that
        separate a right answer from a wrong one."""
        question, right, wrong = CHECK.values()
        unfit = f"{self.service.url}: model {self.settings.model!r} cannot serve as a judge"
        try:
            await self.service.request(self.probe, CHECK_SECONDS)
            if self.settings.mode == "verify":
                separates = await asyncio.gather(
                    self.verify(question, "12", right), self.verify(question, "12", wrong)
                ) == [True, False]
            else:
                separates = (await self.compare(question, right, wrong)).preference > 0.5
        except Ungradable as error:
            raise ServiceError(f"{unfit}: {error}") from None
        if not separates:
            raise ServiceError(f"{unfit}: asked {question!r}, it takes {wrong!r} for {right!r}")

    async def grade(
        self,
        response: str,
        truth: object,
        *,
        question: str | None = None,
        opened: bool = False,
        **entry: object,
    ) -> Grade:
        """Return the grade of a response by the judge's votes.

        verify: 1 when most votes find the response correct, else 0; truth: the reference answer.
        compare: the share of votes that prefer it to `truth`, another response to the question.
        opened: the prompt ended with `<think>`. Raises UserError without a question or a truth,
        Ungradable, ServiceError."""
        mode = self.settings.mode
        if not isinstance(question, str) or truth is None:
            missing = "question" if truth is not None else "truth"
            raise UserError(
                f"the judge needs a {missing} to {mode} a response: add it to the row",
                key=missing,
                cause=Cause.MISSING,
            )
        part = response_part(response, self.settings.part, opened)
        if part.text is None:
            return Grade(0.0, part.reason)
        reference = truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False)
        if mode == "verify":
            is_correct = await self.verify(question, reference, part.text)
            return Grade(float(is_correct), f"judged {'correct' if is_correct else 'incorrect'}")
        compared = await self.compare(question, part.text, reference)
        reason = f"won {compared.wins}, lost {compared.losses}, tied {compared.ties} comparisons"
        return Grade(compared.preference, reason)

    async def verify(self, question: str, truth: str, response: str) -> bool:
        """Whether most of the votes find `response` correct. Raises Ungradable, ServiceError.

        No further votes are requested when the first majority of votes agree."""
        texts = {"question": question, "reference answer": truth, "response": response}
        num_votes = self.settings.num_votes
        majority = num_votes // 2 + 1
        votes = await self.votes(VERIFY, texts, majority)
        if len(set(votes)) > 1:
            rest = num_votes - majority
            votes += await self.votes(VERIFY, texts, rest, first=2 * majority)
        return votes.count("correct") >= majority

    async def compare(self, question: str, first: str, second: str) -> Comparison:
        """Return votes on two responses. Raises Ungradable, ServiceError.

        Each response is A in exactly half of the votes, instead of at random: a judge that always
        chooses A then gives a tie for any number of votes, not only on average."""
        num_votes = self.settings.num_votes
        if first == second:
            return Comparison(0, 0, num_votes)
        straight = {"question": question, "response A": first, "response B": second}
        swapped = {"question": question, "response A": second, "response B": first}
        orders = (self.votes(COMPARE, texts, num_votes // 2) for texts in (straight, swapped))
        as_a, as_b = map(Counter, await asyncio.gather(*orders))
        return Comparison(as_a["A"] + as_b["B"], as_a["B"] + as_b["A"], as_a["tie"] + as_b["tie"])

    async def close(self) -> None:
        await self.service.close()
