"""The share of drafted tokens that engines accept, by vLLM's own counters.

Engines count drafts, drafted tokens and accepted tokens from their start. So the meter keeps the
last reading of each engine, and reports what has been added since, of all engines together."""

import asyncio
from collections import Counter
from collections.abc import Sequence

from megatron_r1.engines.fleet.engine import Engine

COUNTERS_SECONDS = 5.0
"""The time limit of reading an engine's counters; a later reply counts at the next reading."""
DRAFT_COUNTERS = {
    name: f"vllm:spec_decode_num_{name}_total"
    for name in ("drafts", "draft_tokens", "accepted_tokens")
}
"""What is counted → vLLM's counter of it."""


class AcceptanceMeter:
    """Counts drafts between two readings, of all engines. What an engine has done that does not
    answer counts at the next reading."""

    def __init__(self) -> None:
        self._before: dict[Engine, Counter[str]] = {}

    async def read(self, engines: Sequence[Engine]) -> dict[str, float]:
        """Return what happened since the last reading; nothing if nothing was drafted.

        speculative/acceptance: accepted over drafted tokens. speculative/length: mean tokens that a
        sequence with a draft gained in a pass, the one that follows without a draft included."""
        running_engines = [engine for engine in engines if engine.is_up and engine.client.url]
        counts = await asyncio.gather(*map(_draft_counts, running_engines))
        # One that is down is kept: it may come back as the same process.
        self._before = {e: self._before[e] for e in engines if e in self._before}
        increments: Counter[str] = Counter()
        for engine, draft_counts in zip(running_engines, counts, strict=True):
            if draft_counts is None:
                continue
            counts_before = self._before.get(engine, Counter())
            if any(draft_counts[name] < count for name, count in counts_before.items()):
                counts_before = Counter()  # its process is a new one
            self._before[engine] = draft_counts
            increments += draft_counts - counts_before
        if not increments["draft_tokens"]:
            return {}
        return {
            "speculative/acceptance": increments["accepted_tokens"] / increments["draft_tokens"],
            "speculative/length": 1 + increments["accepted_tokens"] / increments["drafts"],
        }


async def _draft_counts(engine: Engine) -> Counter[str] | None:
    """Return an engine's counters since its start, None where it does not answer."""
    counters = await engine.client.read_counters(DRAFT_COUNTERS.values(), COUNTERS_SECONDS)
    if counters is None:
        return None
    return Counter({name: counters[counter] for name, counter in DRAFT_COUNTERS.items()})
