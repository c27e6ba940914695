"""Filters: reasons not to learn an answer, right as it may be.

A filter is a pure function `(candidate, prompt, **options) -> str`: why the answer is dropped, ""
to keep it. One file each, one line in `REGISTRY`. DeepSeek-R1 drops chains of thought with mixed
languages, long paragraphs and code blocks (arXiv 2501.12948, section 2.3.3 of v1), and repetition
where it collects its cold start (v2, supplement B.3).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from megatron_r1.curation.candidate import Candidate
from megatron_r1.curation.filters.code_blocks import code_blocks
from megatron_r1.curation.filters.format import broken_format
from megatron_r1.curation.filters.language import mixed_languages
from megatron_r1.curation.filters.paragraphs import long_paragraphs
from megatron_r1.curation.filters.repetition import repetition
from megatron_r1.curation.filters.truncated import truncated
from megatron_r1.data.prompts import Prompt, make_prompt
from megatron_r1.errors import did_you_mean

Filter = Callable[..., str]
REGISTRY: dict[str, Filter] = {
    "truncated": truncated,
    "format": broken_format,
    "language": mixed_languages,
    "paragraphs": long_paragraphs,
    "code_blocks": code_blocks,
    "repetition": repetition,
}
"""In the order in which they are asked; the first that objects gives the reason."""

DUPLICATE = "duplicate"
"""Not of one answer alone, so no function of `REGISTRY` (see `selection`); switched like them."""

NAMES = (*REGISTRY, DUPLICATE)
OF_OUTPUT: dict[str, tuple[str, ...]] = {
    "sft": NAMES,
    # What a reward model is to tell apart must be in its data, bad form too.
    "pairs": ("truncated", DUPLICATE),
    "labels": ("truncated", DUPLICATE),
    "answers": (),
}
"""Switched on for each output, unless a recipe says otherwise."""

EXAMPLE = Candidate(0, "<think>Two and two.</think> It is 4.", num_tokens=9)

Filters = Mapping[str, Mapping[str, Any]]


def check_filters(given: Mapping[str, Any]) -> None:
    """Check a recipe's `sample.filters`: name → options, true or false.

    Raises ValueError naming the filter and the option for an unknown one, and for an option's value
    that the filter does not take.
    """
    for name, options in given.items():
        place = f"sample.filters.{name}"
        if name not in NAMES:
            raise ValueError(
                f"{place}: there is no such filter{did_you_mean(name, NAMES, '{}')} (known: "
                f"{', '.join(NAMES)})"
            )
        if isinstance(options, bool):
            continue
        if not isinstance(options, Mapping):
            raise ValueError(
                f"{place}: must be true, false or a mapping of options, got {options!r}"
            )
        known = option_names(name)
        for option in options:
            if option not in known:
                raise ValueError(
                    f"{place}: unknown option {option}{did_you_mean(option, known, '{}')} (it has "
                    f"{', '.join(known) or 'none'})"
                )
        if name in REGISTRY and options:
            try:
                REGISTRY[name](EXAMPLE, make_prompt("2 + 2?", "math", "4", {}), **options)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{place}: {error}") from None


def option_names(name: str) -> list[str]:
    """The keyword arguments of a filter."""
    if name not in REGISTRY:
        return []
    parameters = inspect.signature(REGISTRY[name]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def filters_of(output: str, given: Mapping[str, Mapping[str, Any] | bool]) -> Filters:
    """Those that are on, in order, with their options: the output's own and what a recipe says."""
    chosen: dict[str, Mapping[str, Any]] = {}
    for name in NAMES:
        options = given.get(name, name in OF_OUTPUT[output])
        if options is not False:
            chosen[name] = {} if options is True else options
    return chosen


def first_objection(candidate: Candidate, prompt: Prompt, filters: Filters) -> tuple[str, str]:
    """(filter, reason) of the first that drops the answer; ("", "") where none does."""
    for name, options in filters.items():
        if name in REGISTRY and (reason := REGISTRY[name](candidate, prompt, **options)):
            return name, reason
    return "", ""
