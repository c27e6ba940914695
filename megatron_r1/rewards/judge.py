"""A language model as the judge, for answers that no rule can grade.

`verify`: the judge sees question, reference answer and response, and says whether the response is
correct. DeepSeek-R1 has DeepSeek-V3 grade so where rejection sampling cannot check by rule (arXiv
2501.12948, section 2.3.3 of v1). `compare`: it sees two responses and says which is better; R1's
preference pairs are four such judgements each, with near-ties dropped (supplement B.3 of v2).
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass

from megatron_r1.rewards.base import Grade
from megatron_r1.rewards.remote.judge_client import JudgeClient, JudgeSettings
from megatron_r1.rewards.remote.judge_prompts import COMPARE, VERIFY
from megatron_r1.rewards.remote.response_text import response_part
from megatron_r1.rewards.remote.service import ServiceError, Ungradable

CHECK_SECONDS = 10.0
CHECK = {"question": "What is 7 + 5?", "right": "The answer is 12.", "wrong": "The answer is 13."}


@dataclass(frozen=True)
class Comparison:
    """How often the first of two responses won, lost, or tied; half of the votes saw it as B."""

    wins: int
    losses: int
    ties: int

    @property
    def preference(self) -> float:
        """Share of the votes for the first response, a tie as one half: in [0, 1]."""
        return (self.wins + self.ties / 2) / (self.wins + self.losses + self.ties)

    def winner(self, margin: float = 0.5) -> int | None:
        """0 or 1 for the better response; None for a tie, and for a near-tie, as preference data
        leaves out: the share of wins exceeds that of losses by less than `margin`, in [0, 1]."""
        lead = 2 * self.preference - 1
        if lead == 0 or abs(lead) < margin:
            return None
        return 0 if lead > 0 else 1


class Judge:
    """Made of settings alone; nothing is sent before the first call."""

    settings_type = JudgeSettings

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.client = JudgeClient(settings)
        self.service = self.client.service

    async def check(self) -> None:
        """Raises ServiceError unless the service answers within seconds, in the form asked for, and
        tells a right answer from a wrong one."""
        question, right, wrong = CHECK.values()
        unfit = f"{self.service.url}: model {self.settings.model!r} cannot serve as a judge"
        try:
            await self.service.request(self.client.probe, CHECK_SECONDS)
            if self.settings.mode == "verify":
                tells_apart = await asyncio.gather(
                    self.verify(question, "12", right), self.verify(question, "12", wrong)
                ) == [True, False]
            else:
                tells_apart = (await self.compare(question, right, wrong)).preference > 0.5
        except Ungradable as error:
            raise ServiceError(f"{unfit}: {error}") from None
        if not tells_apart:
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
        """verify: 1 when most votes find the response correct, else 0. truth: the reference answer.
        compare: the share of votes that prefer it to `truth`, another response to the question.

        question: as the prompt has it. opened: the prompt ended with `<think>`.
        Raises ValueError without a question or a truth.
        """
        mode = self.settings.mode
        if not isinstance(question, str) or truth is None:
            missing = "a question" if truth is not None else "a truth"
            raise ValueError(f"the judge needs {missing} to {mode} a response: add it to the row")
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

        No further votes are asked for when the first majority is of one mind.
        """
        texts = {"question": question, "reference answer": truth, "response": response}
        num_votes = self.settings.num_votes
        majority = num_votes // 2 + 1
        votes = await self.client.votes(VERIFY, texts, majority)
        if len(set(votes)) > 1:
            rest = num_votes - majority
            votes += await self.client.votes(VERIFY, texts, rest, first=2 * majority)
        return votes.count("correct") >= majority

    async def compare(self, question: str, first: str, second: str) -> Comparison:
        """Votes on two responses. Raises Ungradable, ServiceError.

        Each is shown as A in exactly half of the votes, instead of by the toss of a coin: a judge
        that always says A then makes a tie at any number of votes, not only on average.
        """
        num_votes = self.settings.num_votes
        if first == second:
            return Comparison(0, 0, num_votes)
        straight = {"question": question, "response A": first, "response B": second}
        swapped = {"question": question, "response A": second, "response B": first}
        as_a, as_b = map(
            Counter,
            await asyncio.gather(
                self.client.votes(COMPARE, straight, num_votes // 2),
                self.client.votes(COMPARE, swapped, num_votes // 2),
            ),
        )
        return Comparison(as_a["A"] + as_b["B"], as_a["B"] + as_b["A"], as_a["tie"] + as_b["tie"])

    async def close(self) -> None:
        await self.service.close()
