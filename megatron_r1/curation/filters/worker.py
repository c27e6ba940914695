"""Filters in the reward workers, which use all cores and survive a filter that crashes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1.curation.decision import Decision
from megatron_r1.curation.filters import REGISTRY, Filters, first_objection
from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.rewards.base import Grade
from megatron_r1.rewards.runtime.pool import RewardPool

TARGET = f"{__name__}:grade"
FIELDS = ("target",)
"""The fields of a prompt that filters use; the tests of a programming task are not sent."""


class PooledFilters:
    """Runs filters in the pool: a long response takes tens of milliseconds, too long for the
    controller's event loop."""

    def __init__(self, pool: RewardPool, filters: Filters) -> None:
        self._pool = pool
        self._filters = {name: dict(o) for name, o in filters.items() if name in REGISTRY}

    async def __call__(self, prompt: Prompt, response: TextResponse) -> Decision | None:
        """Return why the response is dropped, None to keep it. Raises as `RewardPool.grade`."""
        if not self._filters:
            return None
        fields = {name: prompt.fields[name] for name in FIELDS if name in prompt.fields}
        verdict = await self._pool.grade(
            TARGET,
            response.text,
            None,
            facts={
                "num_tokens": response.num_tokens,
                "truncated": response.truncated,
                "opened": response.opened,
            },
            prompt={"question": prompt.question, "kind": prompt.kind, "fields": fields},
            filters=self._filters,
        )
        if verdict.reward:
            return None
        name, _, why = verdict.reason.partition(": ")
        return Decision(name, why) if name in REGISTRY else Decision("unfiltered", verdict.reason)


def grade(
    response: str,
    truth: object,
    *,
    facts: Mapping[str, Any],
    prompt: Mapping[str, Any],
    filters: Filters,
) -> Grade:
    """Return 1 for a response that all filters keep, else 0 with the reason "filter: why"."""
    filtered = TextResponse(response, **facts)
    of = Prompt("", prompt["question"], prompt["kind"], None, prompt["fields"])
    name, why = first_objection(filtered, of, filters)
    return Grade(0.0, f"{name}: {why}") if name else Grade(1.0, "")
