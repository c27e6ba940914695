"""sft.jsonl: the kept responses, rewritten by `sample.rewrite`, in the form to be trained on."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.evaluation.sampling import Grader
from megatron_r1.sample.cache import ResultCache
from megatron_r1.sample.decision import KEPT, NOT_CHOSEN, Decision
from megatron_r1.sample.outputs import PromptResult
from megatron_r1.sample.rendering import Rendering
from megatron_r1.sample.selection import Selection
from megatron_r1.sample.user_function import UserFunction

Rewriter = Callable[[str, str], Awaitable[str | None]]
"""(question, response) → the rewritten response, None to drop it."""


def cached_rewriter(function: UserFunction, cache: ResultCache) -> Rewriter:
    """Return a user's function that makes a response readable, as people and a model did for
    DeepSeek-R1's cold start. Its results are cached until its module changes."""

    async def rewrite(*texts: str) -> str | None:
        text = await function(*texts)
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"{function.key}: {function.path} returned {text!r}; return the response, or None "
                "to drop it",
                key=function.key,
                cause=Cause.FAILED,
            )
        return text

    return lambda *texts: cache.get(("rewrite", function.identity, *texts), lambda: rewrite(*texts))


class SftExamples:
    """Keeps at most `keep.per_prompt` of a question's responses."""

    def __init__(
        self,
        selection: Selection,
        rendering: Rendering | None,
        rewriter: Rewriter | None = None,
        grader: Grader | None = None,
    ) -> None:
        """Take the selection's settings. rendering: None if nothing is written. grader: grades
        rewritten responses, which are then selected again."""
        self._selection, self._rendering = selection, rendering
        self._rewriter, self._grader = rewriter, grader

    async def __call__(self, prompt: Prompt, responses: Sequence[TextResponse]) -> PromptResult:
        decisions = await self._selection.drops(prompt, responses)
        passed = [response for response in responses if response.index not in decisions]
        limit = self._selection.keep.per_prompt or len(responses)
        rows: list[dict[str, Any]] = []
        num_kept = 0
        for response in self._selection.in_order(prompt, passed):
            if num_kept == limit:
                decisions[response.index] = Decision(NOT_CHOSEN)
                continue
            decision, row = await self._example(prompt, response)
            decisions[response.index] = decision
            num_kept += decision.is_kept
            rows += row
        return PromptResult([decisions[response.index] for response in responses], rows)

    async def _example(
        self, prompt: Prompt, response: TextResponse
    ) -> tuple[Decision, list[dict[str, Any]]]:
        if self._rewriter is not None:
            text = await self._rewriter(prompt.question, response.whole)
            if text is None:
                return Decision("not_rewritten", "sample.rewrite gave None"), []
            response = replace(response, text=text, opened=False)
            if self._grader is not None:
                response = await self._grader.grade(prompt, response)
            if dropped := await self._selection.drop(prompt, response):
                return Decision(f"rewritten_{dropped.code}", dropped.why), []
        if self._rendering is None:
            return Decision(KEPT), []
        text = self._rendering.response(response, prompt.question, prompt.before)
        if text is None or not text.strip():
            return Decision("not_renderable", "it lacks a part of sample.render.response"), []
        row = {
            "prompt": self._rendering.prompt(prompt.question, prompt.before),
            "response": text,
            "id": prompt.id,
            "kind": prompt.kind,
        }
        return Decision(KEPT), [row]
