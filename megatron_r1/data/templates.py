"""How a question becomes the text the policy continues."""

PLACEHOLDER = "{problem}"

# Applied by whoever holds the tokenizer: its own chat template.
CHAT = "chat"

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


def find_template(template: str) -> str:
    """The text of a template: a name of `TEMPLATES`, or the user's own text with `{problem}` in it.

    Raises ValueError for a text without the placeholder, and for "chat", which is the tokenizer's.
    """
    if template == CHAT:
        raise ValueError(
            "the chat template belongs to the tokenizer: apply_chat_template renders it"
        )
    text = TEMPLATES.get(template, template)
    if PLACEHOLDER not in text:
        raise ValueError(
            f"prompt template {template!r} is neither one of {', '.join([*TEMPLATES, CHAT])} "
            f"nor a text with {PLACEHOLDER} where the question goes"
        )
    return text


def render(template: str, question: str) -> str:
    """The prompt text. Braces in the question or elsewhere in the template stay as they are."""
    return find_template(template).replace(PLACEHOLDER, question)


def is_opened(prompt_text: str) -> bool:
    """Whether a rendered prompt ends inside the thought: rewards take it as `opened`."""
    return prompt_text.rstrip().endswith("<think>")
