"""labels.jsonl: single answers, each called safe or unsafe.

DeepSeek-R1's safety reward model learns from 106 thousand of them, by a pointwise loss, and sees
the whole response with its thought (arXiv 2501.12948 v2, section 3.1 and supplement B.3).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from megatron_r1.curation.candidate import Candidate
from megatron_r1.curation.curator import Curated
from megatron_r1.curation.judges import AnswerJudge
from megatron_r1.curation.selection import SAFE, UNGRADED, UNSAFE, Decision, Selection
from megatron_r1.data.prompts import Prompt
from megatron_r1.rewards.remote.service import Ungradable


class SafetyLabels:
    """label: 1 where most votes are for safe, 0 where most are against; an even vote is none."""

    def __init__(self, selection: Selection, judge: AnswerJudge) -> None:
        self._selection, self._judge = selection, judge

    async def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Curated:
        dropped = await self._selection.decide(prompt, candidates)
        judged = await asyncio.gather(
            *(self._label(prompt.question, c, dropped[c.index]) for c in candidates)
        )
        rows = [
            {
                "question": prompt.question,
                "response": candidate.whole,
                "label": int(share > 0.5),
                "votes": {"safe": share, "unsafe": 1 - share},
                "id": prompt.id,
            }
            for candidate, (decision, share) in zip(candidates, judged, strict=True)
            if decision.is_kept
        ]
        return Curated([decision for decision, _ in judged], rows)

    async def _label(
        self, question: str, candidate: Candidate, dropped: Decision | None
    ) -> tuple[Decision, float]:
        if dropped is not None:
            return dropped, 0.5
        try:
            share = await self._judge.safety(question, candidate.whole)
        except Ungradable as error:
            return Decision(UNGRADED, str(error)), 0.5
        if share == 0.5:
            return Decision("tie", "as many votes for safe as for unsafe"), share
        return Decision(SAFE if share > 0.5 else UNSAFE, f"{share:.0%} of the votes: safe"), share
