"""The settings of `sample.filters`: which filters run with which options, and what is refused."""

import inspect
from collections.abc import Mapping
from typing import Any

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.data.prompt import make_prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.sample.filters import FILTERS, Filters
from megatron_r1.sample.selection import DUPLICATE

FILTER_NAMES = (*FILTERS, DUPLICATE)
"""The filters and `duplicate`, which no response shows alone: where that name is switched on,
`selection` drops duplicates."""
DEFAULT_FILTERS: dict[str, tuple[str, ...]] = {
    "sft": FILTER_NAMES,
    # A reward model must have seen bad form to score it low.
    "pairs": ("truncated", DUPLICATE),
    "labels": ("truncated", DUPLICATE),
    "responses": (),
}
"""The defaults of each `sample.output`."""

EXAMPLE = TextResponse("<think>Two and two.</think> It is 4.", num_tokens=9)


def check_filters(settings: Mapping[str, Any]) -> None:
    """Check a recipe's `sample.filters`: name → options, true or false.

    Raises:
        UserError: an unknown filter or option, or an invalid value; it names the filter and the
            option.
    """
    for name, options in settings.items():
        place = f"sample.filters.{name}"
        if name not in FILTER_NAMES:
            raise UserError(
                f"{place}: there is no such filter{did_you_mean(name, FILTER_NAMES, '{}')} (known: "
                f"{', '.join(FILTER_NAMES)})",
                key=place,
                cause=Cause.UNKNOWN,
            )
        if isinstance(options, bool):
            continue
        if not isinstance(options, Mapping):
            message = f"must be true, false or a mapping of options, got {options!r}"
            raise UserError(f"{place}: {message}", key=place, cause=Cause.MALFORMED)
        run = FILTERS.get(name)
        parameters = list(inspect.signature(run).parameters)[2:] if run else []
        for option in options:
            if option not in parameters:
                raise UserError(
                    f"{place}: unknown option {option}{did_you_mean(option, parameters, '{}')} (it "
                    f"has {', '.join(parameters) or 'none'})",
                    key=f"{place}.{option}",
                    cause=Cause.UNKNOWN,
                )
        if run and options:
            try:
                run(EXAMPLE, make_prompt("2 + 2?", "math", "4", {}), **options)
            except (ValueError, TypeError) as error:
                raise UserError(f"{place}: {error}", key=place, cause=Cause.MALFORMED) from None


def active_filters(output: str, settings: Mapping[str, Mapping[str, Any] | bool]) -> Filters:
    """Return the active filters in order, with their options.

    Args:
        output: `sample.output`, for its defaults.
        settings: `sample.filters`."""
    filters: dict[str, Mapping[str, Any]] = {}
    for name in FILTER_NAMES:
        options = settings.get(name, name in DEFAULT_FILTERS[output])
        if options is not False:
            filters[name] = {} if options is True else options
    return filters
