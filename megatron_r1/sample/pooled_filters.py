"""Filters in the reward workers, which use all cores."""

from typing import Any

from r1_grading import Grade, RewardPool

from megatron_r1.data.prompt import Prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.sample.filters import FILTERS, Filters, first_objection
from megatron_r1.sample.selection import Decision

FILTER_FACTS, ROW_FIELDS = ("num_tokens", "truncated", "thought_opened"), ("target",)
"""The parts of a response and of a prompt's fields that filters get; tests of programs are not
sent."""


class PooledFilters:
    """Runs filters in the reward workers, which use all cores and survive a filter that crashes: a
    long response takes tens of milliseconds, too long for the controller's event loop."""

    def __init__(self, pool: RewardPool, filters: Filters) -> None:
        self._pool = pool
        self._filters = {name: dict(o) for name, o in filters.items() if name in FILTERS}

    async def __call__(self, prompt: Prompt, response: TextResponse) -> Decision | None:
        """Return why the response is dropped, None to keep it.

        Raises:
            UserError: a field of the prompt is not JSON.
            RunError: no reward worker can be started, or the pool is closed.
        """
        if not self._filters:
            return None
        fields = {name: prompt.fields[name] for name in ROW_FIELDS if name in prompt.fields}
        result = await self._pool.grade(
            f"{__name__}:grade_by_filters",
            response.text,
            None,
            facts={name: getattr(response, name) for name in FILTER_FACTS},
            prompt={"question": prompt.question, "kind": prompt.kind, "fields": fields},
            filters=self._filters,
        )
        if result.reward:
            return None
        return Decision(result.verdict or "unfiltered", result.reason)


def grade_by_filters(
    response: str, truth: object, *, facts: dict[str, Any], prompt: dict[str, Any], filters: Filters
) -> Grade:
    """Return 1 for a response that all filters keep, else 0 with the name of the filter that drops
    it as the verdict.

    Args:
        response: the text that the policy sampled.
        truth: the prompt's truth.
        facts: the other fields of the `TextResponse`.
        prompt: the other fields of the `Prompt`.
        filters: the filters, in order."""
    filtered = TextResponse(response, **facts)
    name, reason = first_objection(filtered, Prompt("", truth=truth, **prompt), filters)
    return Grade(0.0, reason, verdict=name) if name else Grade(1.0, "")
