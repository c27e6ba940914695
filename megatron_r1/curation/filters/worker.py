"""Filters in the reward workers, which spread them over cores and survive whatever they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1.curation.candidate import Candidate
from megatron_r1.curation.filters import REGISTRY, Filters, first_objection
from megatron_r1.curation.selection import Decision
from megatron_r1.data.prompts import Prompt
from megatron_r1.rewards.base import Grade
from megatron_r1.rewards.runtime.pool import RewardPool

TARGET = f"{__name__}:grade"
FIELDS = ("target",)
"""Of a prompt, that filters look at; the tests of a programming task stay here."""


class PooledFilters:
    """A long answer takes its filters tens of milliseconds: too long for the controller's loop."""

    def __init__(self, pool: RewardPool, filters: Filters) -> None:
        self._pool = pool
        self._filters = {name: dict(o) for name, o in filters.items() if name in REGISTRY}

    async def __call__(self, prompt: Prompt, candidate: Candidate) -> Decision | None:
        """Why the answer is dropped; None to keep it. Raises as `RewardPool.grade`."""
        if not self._filters:
            return None
        known = {name: prompt.fields[name] for name in FIELDS if name in prompt.fields}
        verdict = await self._pool.grade(
            TARGET,
            candidate.text,
            None,
            answer={
                "num_tokens": candidate.num_tokens,
                "truncated": candidate.truncated,
                "opened": candidate.opened,
            },
            prompt={"question": prompt.question, "kind": prompt.kind, "fields": known},
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
    answer: Mapping[str, Any],
    prompt: Mapping[str, Any],
    filters: Filters,
) -> Grade:
    """1 for an answer that all filters keep; 0 with "filter: reason"."""
    asked = Prompt("", prompt["question"], prompt["kind"], None, prompt["fields"])
    name, why = first_objection(Candidate(0, response, **answer), asked, filters)
    return Grade(0.0, f"{name}: {why}") if name else Grade(1.0, "")
