"""Rejection sampling: which of a question's answers are kept, and why the others are not.

In this order, the first that applies: the model gave no answer; the grader failed; the answer is
empty; the whole question is too easy or too hard; the answer is wrong, or its reward too low; a
filter objects; the same answer stands there already. Of those left `keep.per_prompt` are chosen.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from megatron_r1.config.sample import KeepConfig
from megatron_r1.curation.candidate import Candidate
from megatron_r1.curation.filters import DUPLICATE
from megatron_r1.data.prompts import Prompt, normalize
from megatron_r1.rewards.combine import ACCURACY

KEPT, NOT_CHOSEN = "kept", "not_chosen"
CHOSEN, REJECTED = "chosen", "rejected"
SAFE, UNSAFE = "safe", "unsafe"
UNGRADED = "ungraded"


@dataclass(frozen=True)
class Decision:
    """code: what became of an answer, a word that is counted. why: for whoever reads the line."""

    code: str
    why: str = ""

    @property
    def is_kept(self) -> bool:
        """Whether it is in the file that is trained on."""
        return self.code in (KEPT, CHOSEN, REJECTED, SAFE, UNSAFE)


Objection = Callable[[Prompt, Candidate], Awaitable[Decision | None]]
"""The filters: why an answer is dropped, None to keep it (`filters.worker.PooledFilters`)."""


class Selection:
    """The rules of one recipe."""

    def __init__(
        self, keep: KeepConfig, objection: Objection, drops_duplicates: bool, seed: int = 0
    ) -> None:
        """seed: of what is chosen at random."""
        self.keep, self._objection = keep, objection
        self._drops_duplicates, self._seed = drops_duplicates, seed

    async def decide(
        self, prompt: Prompt, candidates: Sequence[Candidate]
    ) -> dict[int, Decision | None]:
        """Index of each candidate → why it is dropped, None for those to choose from."""
        of_question = self._question_objection(candidates)
        found = await asyncio.gather(*(self.objection(prompt, c, of_question) for c in candidates))
        decisions: dict[int, Decision | None] = {}
        first: dict[str, int] = {}
        for candidate, decision in zip(candidates, found, strict=True):
            if decision is None and self._drops_duplicates:
                same = first.setdefault(normalize(candidate.text), candidate.index)
                if same != candidate.index:
                    decision = Decision(DUPLICATE, f"the same as answer {same}")
            decisions[candidate.index] = decision
        return decisions

    async def objection(
        self, prompt: Prompt, candidate: Candidate, of_question: Decision | None = None
    ) -> Decision | None:
        """Why an answer, looked at by itself, is dropped. of_question: why all its like are."""
        if candidate.refusal:
            return Decision("no_answer", candidate.refusal)
        if candidate.is_ungraded:
            return Decision(UNGRADED, candidate.reason)
        if not candidate.text.strip():
            return Decision("empty", "there is nothing to learn")
        if of_question is not None:
            return of_question
        keep = self.keep
        if keep.is_graded:
            accuracy, reward = candidate.rewards[ACCURACY], candidate.reward
            if accuracy < keep.min_accuracy:
                return Decision("wrong", candidate.reason)
            if keep.min_reward is not None and reward < keep.min_reward:
                return Decision("low_reward", f"reward {reward:.3g}: {candidate.reason}")
        return await self._objection(prompt, candidate)

    def in_order(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those to choose from, first the one to take first. Ties go to the earlier answer; random
        depends on (seed, question) alone."""
        choose = self.keep.choose
        if choose == "random":
            shuffled = list(candidates)
            random.Random(f"{self._seed}/{prompt.id}").shuffle(shuffled)
            return shuffled
        if choose == "shortest":
            return sorted(candidates, key=lambda candidate: candidate.length)
        if choose == "best":
            return sorted(candidates, key=lambda candidate: -candidate.reward)
        return list(candidates)

    def _question_objection(self, candidates: Sequence[Candidate]) -> Decision | None:
        keep = self.keep
        if not keep.is_graded:
            return None
        rate = pass_rate(candidates, keep.min_accuracy)
        if rate is None:
            return None
        why = f"{rate:.0%} of its answers are right"
        if keep.max_pass_rate is not None and rate > keep.max_pass_rate:
            return Decision("too_easy", why)
        if keep.min_pass_rate is not None and rate < keep.min_pass_rate:
            return Decision("too_hard", why)
        return None


def pass_rate(candidates: Sequence[Candidate], min_accuracy: float) -> float | None:
    """Share of the graded answers that are right; None where none was graded."""
    graded = [c for c in candidates if c.rewards and not c.is_ungraded]
    if not graded:
        return None
    return sum(c.rewards[ACCURACY] >= min_accuracy for c in graded) / len(graded)
