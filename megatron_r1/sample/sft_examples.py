"""sft.jsonl: the kept responses, rewritten by `sample.rewrite`, in the form to be trained on:
prompt template and parts of the response.

R1-Zero writes `<think>…</think> <answer>…</answer>` after a prompt that describes these tags; R1
is trained on a chat whose assistant thinks, then writes a summary."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from r1_grading.reading import ANSWER, END_ANSWER, END_THINK, THINK, extract_answer

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.sample import RenderConfig
from megatron_r1.data.chats import Message
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompt_templates import (
    CHAT_TEMPLATE_NAME,
    find_template,
    opens_thought,
    render_template,
    system_text,
)
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.evaluation.text_response_grader import TextResponseGrader
from megatron_r1.sample.result_cache import ResultCache
from megatron_r1.sample.second_pass import PromptResult
from megatron_r1.sample.selection import KEPT, NOT_CHOSEN, Decision, Selection
from megatron_r1.sample.user_functions import UserFunction


def _response_summary(response: TextResponse) -> str | None:
    """Return what follows the thought, without R1-Zero's tags around the answer."""
    summary = response.part("summary") or ""
    return summary.replace(ANSWER, "").replace(END_ANSWER, "").strip() or None


EXAMPLE_TEXTS: dict[str, Callable[[TextResponse], str | None]] = {
    "thought": lambda response: response.thought,
    "summary": _response_summary,
    "answer": lambda r: (
        extract_answer(r.text, thought_opened=r.thought_opened, reads_last_line=True).text
    ),
    "response": lambda response: response.full_text,
}
TEMPLATE_PLACEHOLDERS = re.compile(r"\{(" + "|".join(EXAMPLE_TEXTS) + r")\}")


class Rendering:
    """The prompts and responses of sft.jsonl."""

    def __init__(self, settings: RenderConfig, template: str, model_path: str) -> None:
        """Load what prompts are rendered with.

        Args:
            settings: the recipe's.
            template: the template of the prompts that responses were sampled from.
            model_path: the folder with the tokenizer whose chat template is used, unless the
                settings name another tokenizer.

        Raises:
            ValueError: an invalid template, or a chat without a tokenizer."""
        self._response = settings.response
        self._template = settings.template or template
        self._chat_text: tuple[PromptTokenizer, PromptTokenizer] | None = None
        tokenizer_path = settings.tokenizer or model_path
        if self._template != CHAT_TEMPLATE_NAME:
            find_template(self._template, "sample.render.template")
        elif not tokenizer_path:
            raise UserError(
                "sample.render.template: chat needs a tokenizer; set sample.render.tokenizer to "
                "the folder of the model that is to be trained, or give a text with {question}",
                key="sample.render.tokenizer",
                cause=Cause.MISSING,
            )
        else:
            keys = ("sample.render.tokenizer", "sample.render.template")
            self._chat_text = (
                PromptTokenizer(tokenizer_path, CHAT_TEMPLATE_NAME, keys),
                PromptTokenizer(tokenizer_path, "{question}", keys),
            )

    def prompt(self, question: str, before: Sequence[Message] = ()) -> str:
        """Return the prompt without the tokens that the tokenizer puts in front by itself. `sft`
        adds them when it encodes the prompt; a chat template that writes them too would otherwise
        have them twice."""
        if self._chat_text is None:
            return render_template(self._template, question, system_text(before, "data.template"))
        chat, tokenizer = self._chat_text
        return chat.render(question, before).removeprefix(tokenizer.decode(tokenizer.encode("")))

    def response(
        self, response: TextResponse, question: str, before: Sequence[Message] = ()
    ) -> str | None:
        """Return the response in its new form; a thought that the prompt opens is not opened again.
        None if a part that the form has is missing, or the thought that the prompt opens.

        Args:
            response: the response as it was sampled, or rewritten.
            question: the user's last message.
            before: the messages before the question."""
        parts: dict[str, str] = {}
        for name in TEMPLATE_PLACEHOLDERS.findall(self._response):
            part = EXAMPLE_TEXTS[name](response)
            if part is None:
                return None
            parts[name] = part
        # One pass: a response that contains "{thought}" keeps it.
        text = TEMPLATE_PLACEHOLDERS.sub(lambda match: parts[match[1]], self._response)
        if not opens_thought(self.prompt(question, before)):
            return text
        return text.lstrip().removeprefix(THINK) if END_THINK in text else None


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


class SFTKeeper:
    """Keeps at most `keep.per_prompt` of a question's responses."""

    def __init__(
        self,
        selection: Selection,
        rendering: Rendering | None,
        rewriter: Rewriter | None = None,
        grader: TextResponseGrader | None = None,
    ) -> None:
        """Take the selection's settings.

        Args:
            selection: chooses the responses.
            rendering: None if nothing is written.
            rewriter: rewrites responses; None: they stay as sampled.
            grader: grades rewritten responses, which are then selected again."""
        self._selection, self._rendering = selection, rendering
        self._rewriter, self._grader = rewriter, grader

    async def __call__(self, prompt: Prompt, responses: Sequence[TextResponse]) -> PromptResult:
        """Return the responses to one prompt that become examples, and why others do not."""
        decisions = await self._selection.drop_reasons(prompt, responses)
        passed = [response for response in responses if response.index not in decisions]
        limit = self._selection.keep.per_prompt or len(responses)
        rows: list[dict[str, Any]] = []
        num_kept = 0
        for response in self._selection.in_order(prompt, passed):
            if num_kept == limit:
                decisions[response.index] = Decision(NOT_CHOSEN)
                continue
            decision, row = await self._make_example(prompt, response)
            decisions[response.index] = decision
            num_kept += decision.is_kept
            rows += row
        return PromptResult([decisions[response.index] for response in responses], rows)

    async def _make_example(
        self, prompt: Prompt, response: TextResponse
    ) -> tuple[Decision, list[dict[str, Any]]]:
        if self._rewriter is not None:
            text = await self._rewriter(prompt.question, response.full_text)
            if text is None:
                return Decision("not_rewritten", "sample.rewrite gave None"), []
            response = replace(response, text=text, thought_opened=False)
            if self._grader is not None:
                response = await self._grader.grade(prompt, response)
            if dropped := await self._selection.drop_reason(prompt, response):
                return Decision(f"rewritten_{dropped.code}", dropped.why), []
        if self._rendering is None:
            return Decision(KEPT), []
        text = self._rendering.response(response, prompt.question, prompt.messages_before)
        if text is None or not text.strip():
            return Decision("not_renderable", "it lacks a part of sample.render.response"), []
        row = {
            "prompt": self._rendering.prompt(prompt.question, prompt.messages_before),
            "response": text,
            "id": prompt.id,
            "kind": prompt.kind,
        }
        return Decision(KEPT), [row]
