"""The interface of a model that is evaluated or sampled."""

from dataclasses import dataclass
from typing import Any, Protocol

from megatron_r1.evaluation.response import TextResponse


@dataclass(frozen=True)
class Decoding:
    """Sampling parameters. max_tokens: of the response."""

    temperature: float
    top_p: float
    max_tokens: int


class Policy(Protocol):
    """A model that answers questions. concurrency: the number of requests that keep it busy.
    identity: JSON values that must be the same when a run is resumed."""

    concurrency: int
    identity: dict[str, Any]

    async def start(self) -> None:
        """Make it ready, before the first question. Raises RunError if that fails."""

    async def respond(self, question: str, seed: int) -> TextResponse:
        """Sample one response. The same seed gives the same response, as far as the engine can
        reproduce it."""

    async def close(self) -> None:
        """Release everything. May be called twice, and without `start`."""
