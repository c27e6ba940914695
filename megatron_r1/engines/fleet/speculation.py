"""Measures the share of drafted tokens that the engines accept, by vLLM's own counters."""

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Sequence

from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.server.errors import EngineError

ANSWER_SECONDS = 5.0
"""The time limit of reading an engine's counters; a later reply counts at the next reading."""
COUNTER = re.compile(
    r"^vllm:spec_decode_num_(drafts|draft_tokens|accepted_tokens)_total(?:\{.*\})? (\S+)$",
    re.MULTILINE,
)


class AcceptanceMeter:
    """Counts drafts between two readings, of all engines."""

    def __init__(self) -> None:
        self._before: dict[Engine, Counter[str]] = {}

    async def read(self, engines: Sequence[Engine]) -> dict[str, float]:
        """Return what happened since the last reading; nothing if nothing was drafted.

        speculative/acceptance: accepted over drafted tokens. speculative/length: mean tokens that a
        sequence with a draft gained in a pass, the one that follows without a draft included."""
        up = [engine for engine in engines if engine.is_up and engine.client.url]
        counts = await asyncio.gather(*map(_counts, up))
        before, self._before = self._before, {}
        since: Counter[str] = Counter()
        for engine, now in zip(up, counts, strict=True):
            known = before.get(engine, Counter())
            self._before[engine] = known if now is None else now
            since += self._before[engine] - known
        if not since["draft_tokens"]:
            return {}
        return {
            "speculative/acceptance": since["accepted_tokens"] / since["draft_tokens"],
            "speculative/length": 1 + since["accepted_tokens"] / since["drafts"],
        }


async def _counts(engine: Engine) -> Counter[str] | None:
    """Return an engine's counters since its start, None where it does not answer."""
    with contextlib.suppress(EngineError, TimeoutError):
        async with asyncio.timeout(ANSWER_SECONDS):
            body = await engine.client.request("GET", "/metrics")
        found: Counter[str] = Counter()
        for name, value in COUNTER.findall(body.decode()):  # a line for each copy (data)
            found[name] += int(float(value))
        return found
    return None
