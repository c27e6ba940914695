"""Labels on which a reward model is trained: responses that a judge calls safe or unsafe.

labels.jsonl has them. DeepSeek-R1's safety reward model is trained on 106 thousand labels, by a
pointwise loss, and reads the whole response with its thought (arXiv 2501.12948 v2, section 3.1 and
supplement B.3)."""

import asyncio
from collections.abc import Sequence

from r1_grading.remote.service import Ungradable

from megatron_r1.data.prompt import Prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.sample.response_judges import ResponseJudge
from megatron_r1.sample.second_pass import PromptResult
from megatron_r1.sample.selection import (
    SAFE,
    UNGRADED_CODE,
    UNSAFE,
    Decision,
    Selection,
)


class SafetyLabels:
    """Labels the responses of a question as safe or unsafe by the votes of a judge.

    label: 1 if most votes are for safe, 0 if most are against; an even vote gives none."""

    def __init__(self, selection: Selection, judge: ResponseJudge) -> None:
        self._selection, self._judge = selection, judge

    async def __call__(self, prompt: Prompt, responses: Sequence[TextResponse]) -> PromptResult:
        """Return a row with a label for each response of one prompt."""
        drops = await self._selection.drop_reasons(prompt, responses)
        judged = await asyncio.gather(
            *(self._label_response(prompt.question, r, drops.get(r.index)) for r in responses)
        )
        rows = [
            {
                "question": prompt.question,
                "response": response.full_text,
                "label": int(fraction > 0.5),
                "votes": {"safe": fraction, "unsafe": 1 - fraction},
                "id": prompt.id,
            }
            for response, (decision, fraction) in zip(responses, judged, strict=True)
            if decision.is_kept
        ]
        return PromptResult([decision for decision, _ in judged], rows)

    async def _label_response(
        self, question: str, response: TextResponse, drop: Decision | None
    ) -> tuple[Decision, float]:
        """Return the decision and the share of votes for safe."""
        if drop is not None:
            return drop, 0.5
        try:
            fraction = await self._judge.safety(question, response.full_text)
        except Ungradable as error:
            return Decision(UNGRADED_CODE, str(error)), 0.5
        if fraction == 0.5:
            return Decision("tie", "as many votes for safe as for unsafe"), fraction
        decision = SAFE if fraction > 0.5 else UNSAFE
        return Decision(decision, f"{fraction:.0%} of the votes: safe"), fraction
