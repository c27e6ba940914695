"""Filters: reasons not to train on a response, even a right one.

A filter is a pure function `(response, prompt, **options) -> str`: why the response is dropped, ""
to keep it. One function each in `rules`, one line in `REGISTRY`. DeepSeek-R1 drops chains of
thought with mixed languages, long paragraphs and code blocks (arXiv 2501.12948, section 2.3.3 of
v1), and repetition where it collects its cold start (v2, supplement B.3)."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from r1_grading import Grade, RewardPool

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.data.prompts import Prompt, make_prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.sample.decision import DUPLICATE, Decision
from megatron_r1.sample.filters.rules import (
    broken_format,
    code_blocks,
    long_paragraphs,
    mixed_languages,
    repetition,
    truncated,
)

Filter = Callable[..., str]
REGISTRY: dict[str, Filter] = {
    "truncated": truncated,
    "format": broken_format,
    "language": mixed_languages,
    "paragraphs": long_paragraphs,
    "code_blocks": code_blocks,
    "repetition": repetition,
}
"""The filters, in the order in which they run; the first that objects gives the reason."""
NAMES = (*REGISTRY, DUPLICATE)
"""The filters and `duplicate`, which no response shows alone: where that name is switched on,
`selection` drops duplicates."""
OF_OUTPUT: dict[str, tuple[str, ...]] = {
    "sft": NAMES,
    # A reward model must have seen bad form to score it low.
    "pairs": ("truncated", DUPLICATE),
    "labels": ("truncated", DUPLICATE),
    "answers": (),
}
"""The defaults of each `sample.output`."""

FACTS, FIELDS = ("num_tokens", "truncated", "opened"), ("target",)
"""The parts of a response and of a prompt's fields that filters get; tests of programs are not
sent."""
EXAMPLE = TextResponse("<think>Two and two.</think> It is 4.", num_tokens=9)

Filters = Mapping[str, Mapping[str, Any]]


def check_filters(given: Mapping[str, Any]) -> None:
    """Check a recipe's `sample.filters`: name → options, true or false. Raises UserError naming the
    filter and the option for an unknown one, and for an invalid value."""
    for name, options in given.items():
        place = f"sample.filters.{name}"
        if name not in NAMES:
            raise UserError(
                f"{place}: there is no such filter{did_you_mean(name, NAMES, '{}')} (known: "
                f"{', '.join(NAMES)})",
                key=place,
                cause=Cause.UNKNOWN,
            )
        if isinstance(options, bool):
            continue
        if not isinstance(options, Mapping):
            message = f"must be true, false or a mapping of options, got {options!r}"
            raise UserError(f"{place}: {message}", key=place, cause=Cause.MALFORMED)
        run = REGISTRY.get(name)
        known = list(inspect.signature(run).parameters)[2:] if run else []
        for option in options:
            if option not in known:
                raise UserError(
                    f"{place}: unknown option {option}{did_you_mean(option, known, '{}')} (it has "
                    f"{', '.join(known) or 'none'})",
                    key=f"{place}.{option}",
                    cause=Cause.UNKNOWN,
                )
        if run and options:
            try:
                run(EXAMPLE, make_prompt("2 + 2?", "math", "4", {}), **options)
            except (ValueError, TypeError) as error:
                raise UserError(f"{place}: {error}", key=place, cause=Cause.MALFORMED) from None


def filters_of(output: str, given: Mapping[str, Mapping[str, Any] | bool]) -> Filters:
    """Return the active filters in order, with their options. output: `sample.output`, for its
    defaults. given: `sample.filters`."""
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


class PooledFilters:
    """Runs filters in the reward workers, which use all cores and survive a filter that crashes: a
    long response takes tens of milliseconds, too long for the controller's event loop."""

    def __init__(self, pool: RewardPool, filters: Filters) -> None:
        self._pool = pool
        self._filters = {name: dict(o) for name, o in filters.items() if name in REGISTRY}

    async def __call__(self, prompt: Prompt, response: TextResponse) -> Decision | None:
        """Return why the response is dropped, None to keep it. Raises as `RewardPool.grade`."""
        if not self._filters:
            return None
        fields = {name: prompt.fields[name] for name in FIELDS if name in prompt.fields}
        result = await self._pool.grade(
            f"{__name__}:grade",
            response.text,
            None,
            facts={name: getattr(response, name) for name in FACTS},
            prompt={"question": prompt.question, "kind": prompt.kind, "fields": fields},
            filters=self._filters,
        )
        if result.reward:
            return None
        return Decision(result.verdict or "unfiltered", result.reason)


def grade(
    response: str, truth: object, *, facts: dict[str, Any], prompt: dict[str, Any], filters: Filters
) -> Grade:
    """Return 1 for a response that all filters keep, else 0 with the name of the filter that drops
    it as the verdict."""
    filtered = TextResponse(response, **facts)
    name, why = first_objection(filtered, Prompt("", truth=truth, **prompt), filters)
    return Grade(0.0, why, verdict=name) if name else Grade(1.0, "")
