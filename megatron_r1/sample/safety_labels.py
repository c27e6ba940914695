"""The rows of labels.jsonl: single responses, each labelled safe or unsafe by a judge.

DeepSeek-R1's safety reward model is trained on 106 thousand of them, by a pointwise loss, and reads
the whole response with its thought (arXiv 2501.12948 v2, section 3.1 and supplement B.3)."""

import asyncio
from collections.abc import Sequence

from r1_grading.served.service import Ungradable

from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.sample.judge import ResponseJudge
from megatron_r1.sample.outputs import PromptResult
from megatron_r1.sample.selection import SAFE, UNGRADED, UNSAFE, Decision, Selection


class SafetyLabels:
    """Labels the responses of a question as safe or unsafe by the votes of a judge. label: 1 if
    most votes are for safe, 0 if most are against; an even vote gives none."""

    def __init__(self, selection: Selection, judge: ResponseJudge) -> None:
        self._selection, self._judge = selection, judge

    async def __call__(self, prompt: Prompt, responses: Sequence[TextResponse]) -> PromptResult:
        """Return a row with a label for each response of one prompt."""
        drops = await self._selection.drops(prompt, responses)
        judged = await asyncio.gather(
            *(self._label(prompt.question, r, drops.get(r.index)) for r in responses)
        )
        rows = [
            {
                "question": prompt.question,
                "response": response.whole,
                "label": int(fraction > 0.5),
                "votes": {"safe": fraction, "unsafe": 1 - fraction},
                "id": prompt.id,
            }
            for response, (decision, fraction) in zip(responses, judged, strict=True)
            if decision.is_kept
        ]
        return PromptResult([decision for decision, _ in judged], rows)

    async def _label(
        self, question: str, response: TextResponse, dropped: Decision | None
    ) -> tuple[Decision, float]:
        """Return the decision and the share of votes for safe."""
        if dropped is not None:
            return dropped, 0.5
        try:
            fraction = await self._judge.safety(question, response.whole)
        except Ungradable as error:
            return Decision(UNGRADED, str(error)), 0.5
        if fraction == 0.5:
            return Decision("tie", "as many votes for safe as for unsafe"), fraction
        decision = SAFE if fraction > 0.5 else UNSAFE
        return Decision(decision, f"{fraction:.0%} of the votes: safe"), fraction
