"""Prompt templates: how a question becomes the text that the policy continues."""

import re

from megatron_r1.base.errors import Cause, UserError

PLACEHOLDER = "{problem}"
SYSTEM = "{system}"
"""Where a text template has the system's message of a question, if it has a place for it."""

PLACES = re.compile(r"\{problem\}|\{system\}")
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")

CHAT = "chat"
"""Stands for the tokenizer's own chat template (`text.PromptText`)."""

TEMPLATES: dict[str, str] = {
    # DeepSeek-R1 (arXiv 2501.12948), the template of R1-Zero.
    "r1_zero": (
        "A conversation between User and Assistant. The User asks a question and the Assistant "
        "solves it. The Assistant first thinks about the reasoning process and then provides the "
        "answer, enclosed within <think> </think> and <answer> </answer> tags.\n"
        "User: {problem}\n"
        "Assistant:"
    ),
    # For models too small to read instructions.
    "plain": "User: {problem}\nAssistant:",
}


def find_template(template: str, key: str = "data.template") -> str:
    """Return the text of a template: a name in `TEMPLATES`, or a text with `{problem}` in it.
    key: of the recipe, for errors. Raises UserError for a text without the placeholder, ValueError
    for "chat"."""
    if template == CHAT:
        raise ValueError("the chat template belongs to the tokenizer: use apply_chat_template")
    text = TEMPLATES.get(template, template)
    if PLACEHOLDER not in text:
        raise UserError(
            f"prompt template {template!r} is neither one of {', '.join([*TEMPLATES, CHAT])} "
            f"nor a text with {PLACEHOLDER} where the question goes",
            key=key,
            cause=Cause.UNKNOWN,
        )
    return text


def render(template: str, question: str, system: str = "") -> str:
    """Return the prompt text. Braces in the question or elsewhere in the template stay. system: the
    text for `{system}`; without such a place it stands before the question, with a blank line."""
    text = find_template(template)
    if system and SYSTEM not in text:
        question = f"{system}\n\n{question}"
    given = {PLACEHOLDER: question, SYSTEM: system}
    # One pass: a question that contains "{system}" keeps it.
    return PLACES.sub(lambda match: given[match[0]], text)


def closed_thought(prompt_text: str) -> str:
    """Return the empty thought with which a rendered prompt ends, as templates write it that
    switch thinking off; "" without one."""
    found = EMPTY_THOUGHT.search(prompt_text)
    return found[0] if found else ""


def is_opened(prompt_text: str) -> bool:
    """Whether a rendered prompt ends inside the thought, which rewards call `opened`."""
    return prompt_text.rstrip().endswith("<think>")
