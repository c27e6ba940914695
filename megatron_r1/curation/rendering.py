"""Kept answers in the form that is trained on: another prompt template, another form of response.

R1-Zero answers `<think>…</think> <answer>…</answer>` to a prompt that describes these tags; what R1
is trained on is a chat whose assistant thinks, then writes a summary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property

from megatron_r1.config.sample import RenderConfig
from megatron_r1.curation.candidate import Candidate
from megatron_r1.data.templates import CHAT, find_template, is_opened, render
from megatron_r1.data.text import PromptText
from megatron_r1.rewards.answer import ANSWER, END_ANSWER, END_THINK, THINK, extract


def _summary(candidate: Candidate) -> str | None:
    """What follows the thought, without R1-Zero's tags around the answer."""
    summary = candidate.part("summary")
    if summary is None:
        return None
    summary = summary.replace(ANSWER, "").replace(END_ANSWER, "").strip()
    return summary or None


PARTS: dict[str, Callable[[Candidate], str | None]] = {
    "thought": lambda candidate: candidate.thought,
    "summary": _summary,
    "answer": lambda c: extract(c.text, opened=c.opened, plain_line=True).text,
    "response": lambda candidate: candidate.whole,
}
PLACES = re.compile(r"\{(" + "|".join(PARTS) + r")\}")


class Rendering:
    """The prompts and responses of sft.jsonl."""

    def __init__(self, settings: RenderConfig, template: str, model_path: str) -> None:
        """template: the one the answers were sampled in. model_path: whose tokenizer renders a chat
        unless the settings name another. Raises ValueError for a template that is none, and for a
        chat without a tokenizer."""
        self._response = settings.response
        self._template = settings.template or template
        self._tokenizer_path = settings.tokenizer or model_path
        if self._template != CHAT:
            find_template(self._template)
        elif not self._tokenizer_path:
            raise ValueError(
                "sample.render.template: chat needs a tokenizer; set sample.render.tokenizer to "
                "the folder of the model that is to be trained, or give a text with {problem}"
            )
        else:
            self._chat_text  # noqa: B018 - a folder without one is a mistake to be told now

    def prompt(self, question: str) -> str:
        """As `sft` reads it. What the tokenizer puts in front by itself is left out, for `sft` has
        it put there: a chat template that writes it too would begin with it twice."""
        if self._template != CHAT:
            return render(self._template, question)
        text, plain = self._chat_text
        return text.render(question).removeprefix(plain.decode(plain.encode("")))

    def response(self, candidate: Candidate, question: str) -> str | None:
        """None where it lacks a part that the form has, or the thought that the prompt opens; a
        response does not open that again."""
        parts = {name: PARTS[name](candidate) for name in PLACES.findall(self._response)}
        if None in parts.values():
            return None
        # One pass: an answer that contains "{thought}" keeps it.
        text = PLACES.sub(lambda place: parts[place[1]], self._response)
        if not is_opened(self.prompt(question)):
            return text
        return text.lstrip().removeprefix(THINK) if END_THINK in text else None

    @cached_property
    def _chat_text(self) -> tuple[PromptText, PromptText]:
        path = self._tokenizer_path
        keys = ("sample.render.tokenizer", "sample.render.template")
        return PromptText(path, CHAT, keys), PromptText(path, "{problem}", keys)
