"""Guesses the prompt template that a model was supervised with."""

import os
import re
from collections.abc import Sequence

from megatron_r1.data.templates import PLACEHOLDER, TEMPLATES

SPEAKER = re.compile(r"\S+: ")


def template_of(prompts: Sequence[str]) -> str | None:
    """Return the template of prompts: one of `TEMPLATES`, or that of prompts which begin with the
    same speaker and end with the same line, "User: …\\nAssistant: "; None for others."""
    for name, text in TEMPLATES.items():
        head, _, tail = text.partition(PLACEHOLDER)
        if all(prompt.startswith(head) and prompt.endswith(tail) for prompt in prompts):
            return name
    begin = os.path.commonprefix(list(prompts))
    end = os.path.commonprefix([prompt[::-1] for prompt in prompts])[::-1]
    speaker, line = SPEAKER.match(begin), end.rfind("\n")
    if not speaker or line < 0 or not end[line:].strip():
        return None
    return f"{speaker[0]}{PLACEHOLDER}{end[line:]}"
