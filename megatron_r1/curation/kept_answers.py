"""sft.jsonl: the answers that are kept, rewritten where that is asked for, in the form to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_r1.curation.candidate import Candidate
from megatron_r1.curation.curator import Curated
from megatron_r1.curation.grading import Grader
from megatron_r1.curation.memo import Memo
from megatron_r1.curation.rendering import Rendering
from megatron_r1.curation.selection import KEPT, NOT_CHOSEN, Decision, Selection
from megatron_r1.curation.user_function import UserFunction
from megatron_r1.data.prompts import Prompt


class Rewriter:
    """A function that makes an answer readable, as people and a model did for DeepSeek-R1's cold
    start; asked once for each answer, as long as its module stays the same."""

    def __init__(self, function: UserFunction, memo: Memo) -> None:
        self._function, self._memo = function, memo

    async def __call__(self, question: str, response: str) -> str | None:
        """The response to keep, None to keep none. Raises ValueError for anything else."""
        key = ("rewrite", self._function.identity, question, response)
        if key not in self._memo:
            said = await self._function(question, response)
            if said is not None and not isinstance(said, str):
                raise ValueError(
                    f"{self._function.key}: {self._function.path} returned {said!r}; return the "
                    "response, or None to drop it"
                )
            self._memo[key] = said
        return self._memo[key]


class KeptAnswers:
    """A question's answers that pass, `keep.per_prompt` of them at most."""

    def __init__(
        self,
        selection: Selection,
        rendering: Rendering | None,
        rewriter: Rewriter | None = None,
        grader: Grader | None = None,
    ) -> None:
        """rendering: None where nothing is written. grader: of what was rewritten, which must be as
        right as before."""
        self._selection, self._rendering = selection, rendering
        self._rewriter, self._grader = rewriter, grader

    async def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Curated:
        decisions = await self._selection.decide(prompt, candidates)
        open_to_choice = [c for c in candidates if decisions[c.index] is None]
        limit = self._selection.keep.per_prompt or len(candidates)
        rows: list[dict[str, Any]] = []
        num_kept = 0
        for candidate in self._selection.in_order(prompt, open_to_choice):
            if num_kept == limit:
                decisions[candidate.index] = Decision(NOT_CHOSEN)
                continue
            decision, row = await self._write(prompt, candidate)
            decisions[candidate.index] = decision
            num_kept += decision.is_kept
            rows += row
        return Curated([decisions[c.index] for c in candidates], rows)

    async def _write(
        self, prompt: Prompt, candidate: Candidate
    ) -> tuple[Decision, list[dict[str, Any]]]:
        if self._rewriter is not None:
            text = await self._rewriter(prompt.question, candidate.whole)
            if text is None:
                return Decision("not_rewritten", "sample.rewrite gave None"), []
            candidate = replace(candidate, text=text, opened=False)
            if self._grader is not None:
                candidate = await self._grader.grade(prompt, candidate)
            if objection := await self._selection.objection(prompt, candidate):
                return Decision(f"rewritten_{objection.code}", objection.why), []
        if self._rendering is None:
            return Decision(KEPT), []
        response = self._rendering.response(candidate, prompt.question)
        if response is None or not response.strip():
            return Decision("not_renderable", "it lacks a part of sample.render.response"), []
        row = {
            "prompt": self._rendering.prompt(prompt.question),
            "response": response,
            "id": prompt.id,
            "kind": prompt.kind,
        }
        return Decision(KEPT), [row]
