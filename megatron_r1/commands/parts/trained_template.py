"""The prompt template that a model was trained with. That of a supervised model is guessed from its
prompts."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_r1.base.errors import UserError
from megatron_r1.commands.parts.trained_model import trained_recipe
from megatron_r1.config import Config, infer_verb
from megatron_r1.data.prompt_templates import PLACEHOLDER, TEMPLATES
from megatron_r1.data.rows import read_canonical_rows
from megatron_r1.data.tokenizer import load_tokenizer

SPEAKER = re.compile(r"\S+: ")


def guess_template(prompts: Sequence[str]) -> str | None:
    """Return the template that prompts were made with, or None where they show none.

    It is one of `TEMPLATES`, or a template of two speakers, as "User: …\\nAssistant: ": prompts
    that begin with the same speaker and end with the same line."""
    for name, text in TEMPLATES.items():
        head, _, tail = text.partition(PLACEHOLDER)
        if all(prompt.startswith(head) and prompt.endswith(tail) for prompt in prompts):
            return name
    prefix = os.path.commonprefix(list(prompts))
    suffix = os.path.commonprefix([prompt[::-1] for prompt in prompts])[::-1]
    speaker, line_start = SPEAKER.match(prefix), suffix.rfind("\n")
    if not speaker or line_start < 0 or not suffix[line_start:].strip():
        return None
    return f"{speaker[0]}{PLACEHOLDER}{suffix[line_start:]}"


TEMPLATE_ROWS = 100
"""Supervised prompts that are compared for their template."""


def template_of_model(model: Path, name: str) -> tuple[str, str]:
    """Return a model's template and the reason for it. It is that of the RL run that made the
    model, else the tokenizer's own, else the one of the supervised prompts, else plain.

    Args:
        model: the model's folder.
        name: the argument that names the model, for errors."""
    recipe = trained_recipe(model)
    if recipe is not None and infer_verb(recipe) == "rl":
        return recipe.data.template, f"as {model.parent} trained the model"
    if load_tokenizer(str(model), name).chat_template:
        return "chat", "the tokenizer has a chat template"
    if recipe is not None and (supervised_template := _supervised_template(recipe)):
        return supervised_template, f"as the supervised prompts of {model.parent} have it"
    return "plain", "the tokenizer has no chat template: User: …, Assistant:"


def _supervised_template(recipe: Config) -> str | None:
    """Return the template of the prompts that a model was supervised with, or None."""
    data = recipe.sft.data
    path = data if isinstance(data, str) else data[0].path
    try:
        rows = itertools.islice(read_canonical_rows(path), TEMPLATE_ROWS)
        return guess_template([row["prompt"] for _, row in rows])
    except (UserError, KeyError):
        return None
