"""Filters: reasons not to train on a response, even a right one.

A filter is a pure function `(response, prompt, **options) -> str`: why the response is dropped, ""
to keep it. One file each, one line in `REGISTRY`. DeepSeek-R1 drops chains of thought with mixed
languages, long paragraphs and code blocks (arXiv 2501.12948, section 2.3.3 of v1), and repetition
where it collects its cold start (v2, supplement B.3).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from megatron_r1.curation.decision import DUPLICATE
from megatron_r1.curation.filters.code_blocks import code_blocks
from megatron_r1.curation.filters.format import broken_format
from megatron_r1.curation.filters.language import mixed_languages
from megatron_r1.curation.filters.paragraphs import long_paragraphs
from megatron_r1.curation.filters.repetition import repetition
from megatron_r1.curation.filters.truncated import truncated
from megatron_r1.data.prompts import Prompt, make_prompt
from megatron_r1.errors import UserError, did_you_mean
from megatron_r1.evaluation.response import TextResponse

Filter = Callable[..., str]
REGISTRY: dict[str, Filter] = {
    "truncated": truncated,
    "format": broken_format,
    "language": mixed_languages,
    "paragraphs": long_paragraphs,
    "code_blocks": code_blocks,
    "repetition": repetition,
}
"""In the order in which they run; the first that objects gives the reason."""
# Duplicates are not seen in one response alone: `selection` drops them, switched on by this name.
NAMES = (*REGISTRY, DUPLICATE)
OF_OUTPUT: dict[str, tuple[str, ...]] = {
    "sft": NAMES,
    # A reward model must have seen bad form to score it low.
    "pairs": ("truncated", DUPLICATE),
    "labels": ("truncated", DUPLICATE),
    "answers": (),
}
"""The defaults of each `sample.output`."""

EXAMPLE = TextResponse("<think>Two and two.</think> It is 4.", num_tokens=9)

Filters = Mapping[str, Mapping[str, Any]]


def check_filters(given: Mapping[str, Any]) -> None:
    """Check a recipe's `sample.filters`: name → options, true or false.

    Raises UserError naming the filter and the option for an unknown one, and for an invalid value.
    """
    for name, options in given.items():
        place = f"sample.filters.{name}"
        if name not in NAMES:
            raise UserError(
                f"{place}: there is no such filter{did_you_mean(name, NAMES, '{}')} (known: "
                f"{', '.join(NAMES)})"
            )
        if isinstance(options, bool):
            continue
        if not isinstance(options, Mapping):
            raise UserError(
                f"{place}: must be true, false or a mapping of options, got {options!r}"
            )
        known = option_names(name)
        for option in options:
            if option not in known:
                raise UserError(
                    f"{place}: unknown option {option}{did_you_mean(option, known, '{}')} (it has "
                    f"{', '.join(known) or 'none'})"
                )
        if name in REGISTRY and options:
            try:
                REGISTRY[name](EXAMPLE, make_prompt("2 + 2?", "math", "4", {}), **options)
            except (ValueError, TypeError) as error:
                raise UserError(f"{place}: {error}") from None


def option_names(name: str) -> list[str]:
    """Return the keyword arguments of a filter."""
    if name not in REGISTRY:
        return []
    parameters = inspect.signature(REGISTRY[name]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def filters_of(output: str, given: Mapping[str, Mapping[str, Any] | bool]) -> Filters:
    """Return the active filters in order, with their options.

    output: `sample.output`, for its defaults. given: `sample.filters`.
    """
    chosen: dict[str, Mapping[str, Any]] = {}
    for name in NAMES:
        options = given.get(name, name in OF_OUTPUT[output])
        if options is not False:
            chosen[name] = {} if options is True else options
    return chosen


def first_objection(response: TextResponse, prompt: Prompt, filters: Filters) -> tuple[str, str]:
    """Return (filter, reason) of the first that drops the response; ("", "") if none does."""
    for name, options in filters.items():
        if name in REGISTRY and (reason := REGISTRY[name](response, prompt, **options)):
            return name, reason
    return "", ""
