"""Prompt templates: how a question becomes the text that the policy continues."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.chats import Message

PLACEHOLDER = "{question}"
SYSTEM = "{system}"
"""Where a text template has the system's message of a question, if it has a place for it."""
TEMPLATE_PLACEHOLDERS = re.compile(r"\{question\}|\{system\}")
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")
CHAT_TEMPLATE_NAME = "chat"
"""Stands for the tokenizer's own chat template (`prompt_tokenizer.PromptTokenizer`)."""
TEMPLATES: dict[str, str] = {
    # DeepSeek-R1 (arXiv 2501.12948), the template of R1-Zero.
    "r1_zero": (
        "A conversation between User and Assistant. The User asks a question and the Assistant "
        "solves it. The Assistant first thinks about the reasoning process and then provides the "
        "answer, enclosed within <think> </think> and <answer> </answer> tags.\n"
        "User: {question}\n"
        "Assistant:"
    ),
    # For models too small to read instructions.
    "plain": "User: {question}\nAssistant:",
}


def find_template(template: str, key: str = "data.template") -> str:
    """Return the text of a template: a name in `TEMPLATES`, or a text with `{question}` in it.

    Args:
        template: the recipe's value.
        key: the recipe's key, for errors.

    Raises:
        UserError: a text without the placeholder.
        ValueError: "chat"."""
    if template == CHAT_TEMPLATE_NAME:
        raise ValueError("the chat template belongs to the tokenizer: use apply_chat_template")
    text = TEMPLATES.get(template, template)
    if PLACEHOLDER not in text:
        former_hint = "; {problem} is {question} now" if "{problem}" in text else ""
        raise UserError(
            f"prompt template {template!r} is neither one of "
            f"{', '.join([*TEMPLATES, CHAT_TEMPLATE_NAME])} "
            f"nor a text with {PLACEHOLDER} where the question goes{former_hint}",
            key=key,
            cause=Cause.UNKNOWN,
        )
    return text


def render_template(template: str, question: str, system: str = "") -> str:
    """Return the prompt text. Braces in the question or elsewhere in the template stay.

    Args:
        template: text with `{question}`.
        question: what stands in its place.
        system: the text for `{system}`; without such a place it stands before the question, with a
            blank line.
    """
    text = find_template(template)
    if system and SYSTEM not in text:
        question = f"{system}\n\n{question}"
    texts = {PLACEHOLDER: question, SYSTEM: system}
    # One pass: a question that contains "{system}" keeps it.
    return TEMPLATE_PLACEHOLDERS.sub(lambda match: texts[match[0]], text)


def empty_thought_in(prompt_text: str) -> str:
    """Return the empty thought with which a rendered prompt ends, as templates write it that
    switch thinking off; "" without one."""
    match = EMPTY_THOUGHT.search(prompt_text)
    return match[0] if match else ""


def opens_thought(prompt_text: str) -> bool:
    """Whether a rendered prompt ends inside the thought, which rewards call `thought_opened`."""
    return prompt_text.rstrip().endswith("<think>")


def system_text(before: Sequence[Message], key: str) -> str:
    """Return the text of the system messages before a question, for a template with a place for one
    question.

    Args:
        before: the messages before the question.
        key: the template's setting.

    Raises:
        UserError: for any other turn.
    """
    if misplaced_message := next((m for m in before if m["role"] != "system"), None):
        raise UserError(
            f"{key}: a text has a place for one question, and a question of the data has turns "
            f"before it ({misplaced_message['role']}: {misplaced_message['content'][:40]!r}); "
            "use chat",
            key=key,
            cause=Cause.CONFLICT,
        )
    return "\n\n".join(message["content"] for message in before)
