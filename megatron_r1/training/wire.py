"""What travels between the controller and the trainer ranks: msgpack, no pickles.

Imports neither torch nor Megatron, so that the controller stays light.
"""

from __future__ import annotations

from array import array
from typing import Any

import msgspec


class Sample(msgspec.Struct, frozen=True):
    """One prompt with its response, as the trainer sees it.

    token_ids: int32 bytes, prompt then response; logprobs: float32 bytes, one per response token,
    the rollout engine's (empty for SFT); advantage: the same for every response token (GRPO)."""

    token_ids: bytes
    prompt_length: int
    logprobs: bytes = b""
    advantage: float = 0.0

    @classmethod
    def pack(
        cls,
        prompt: list[int],
        response: list[int],
        logprobs: list[float] | None = None,
        advantage: float = 0.0,
    ) -> Sample:
        if not prompt:
            raise ValueError("a sample needs at least one prompt token")
        if logprobs is not None and len(logprobs) != len(response):
            raise ValueError(f"{len(response)} response tokens but {len(logprobs)} logprobs")
        ids = array("i", [*prompt, *response]).tobytes()
        floats = array("f", logprobs or []).tobytes()
        return cls(ids, len(prompt), floats, advantage)

    def __len__(self) -> int:
        return len(self.token_ids) // 4


class Microbatches(msgspec.Struct, frozen=True):
    """One optimizer step's share of one data-parallel rank."""

    samples: list[list[Sample]]


class Call(msgspec.Struct, frozen=True):
    """Controller → rank: run `operation` with `arguments`."""

    operation: str
    arguments: dict[str, Any] = {}
    minibatches: list[Microbatches] | None = None


class Reply(msgspec.Struct, frozen=True):
    """Rank → controller: the operation's result, or what ended it.

    is_mistake: the user's; `error` is then a sentence for them, and a traceback otherwise.
    """

    rank: int
    result: dict[str, Any] | None = None
    error: str | None = None
    is_mistake: bool = False
