"""The form in which kept responses are trained on: prompt template and parts of the response.

R1-Zero writes `<think>…</think> <answer>…</answer>` after a prompt that describes these tags; R1 is
trained on a chat whose assistant thinks, then writes a summary."""

import re
from collections.abc import Callable, Sequence
from functools import cached_property

from r1_grading.reading import ANSWER, END_ANSWER, END_THINK, THINK, extract

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.sample import RenderConfig
from megatron_r1.data.chats import Message
from megatron_r1.data.templates import CHAT, find_template, is_opened, render
from megatron_r1.data.text import PromptText, system_text
from megatron_r1.evaluation.response import TextResponse


def _summary(response: TextResponse) -> str | None:
    """Return what follows the thought, without R1-Zero's tags around the answer."""
    summary = response.part("summary") or ""
    return summary.replace(ANSWER, "").replace(END_ANSWER, "").strip() or None


PARTS: dict[str, Callable[[TextResponse], str | None]] = {
    "thought": lambda response: response.thought,
    "summary": _summary,
    "answer": lambda r: extract(r.text, opened=r.opened, plain_line=True).text,
    "response": lambda response: response.whole,
}
PLACEHOLDERS = re.compile(r"\{(" + "|".join(PARTS) + r")\}")


class Rendering:
    """The prompts and responses of sft.jsonl."""

    def __init__(self, settings: RenderConfig, template: str, model_path: str) -> None:
        """template: the template of the prompts that responses were sampled from. model_path: the
        folder with the tokenizer whose chat template is used, unless the settings name another
        tokenizer. Raises ValueError for an invalid template, and for a chat without a tokenizer."""
        self._response = settings.response
        self._template = settings.template or template
        self._tokenizer_path = settings.tokenizer or model_path
        if self._template != CHAT:
            find_template(self._template, "sample.render.template")
        elif not self._tokenizer_path:
            raise UserError(
                "sample.render.template: chat needs a tokenizer; set sample.render.tokenizer to "
                "the folder of the model that is to be trained, or give a text with {problem}",
                key="sample.render.tokenizer",
                cause=Cause.MISSING,
            )
        else:
            self._chat_text  # noqa: B018 - report a folder without a chat template now

    def prompt(self, question: str, before: Sequence[Message] = ()) -> str:
        """Return the prompt without the tokens that the tokenizer puts in front by itself. `sft`
        adds them when it encodes the prompt; a chat template that writes them too would otherwise
        have them twice."""
        if self._template != CHAT:
            return render(self._template, question, system_text(before, "data.template"))
        text, plain = self._chat_text
        return text.render(question, before).removeprefix(plain.decode(plain.encode("")))

    def response(
        self, response: TextResponse, question: str, before: Sequence[Message] = ()
    ) -> str | None:
        """Return the response in its new form; a thought that the prompt opens is not opened again.
        None if a part that the form has is missing, or the thought that the prompt opens."""
        parts: dict[str, str] = {}
        for name in PLACEHOLDERS.findall(self._response):
            part = PARTS[name](response)
            if part is None:
                return None
            parts[name] = part
        # One pass: a response that contains "{thought}" keeps it.
        text = PLACEHOLDERS.sub(lambda match: parts[match[1]], self._response)
        if not is_opened(self.prompt(question, before)):
            return text
        return text.lstrip().removeprefix(THINK) if END_THINK in text else None

    @cached_property
    def _chat_text(self) -> tuple[PromptText, PromptText]:
        path = self._tokenizer_path
        keys = ("sample.render.tokenizer", "sample.render.template")
        return PromptText(path, CHAT, keys), PromptText(path, "{problem}", keys)
