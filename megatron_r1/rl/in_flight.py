"""What is being sampled, graded and scored at this moment, for whoever wants to know what a run
waits for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from megatron_r1.data.prompts import Prompt
from megatron_r1.engine.client import Response


class OpenGroup:
    """A group that is not finished. since: of what is done with it, time.monotonic()."""

    def __init__(self, flow: InFlight, prompt: Prompt) -> None:
        self._flow, self.prompt = flow, prompt
        self.doing: Literal["sampling", "grading", "scoring"] = "sampling"
        self.since = time.monotonic()

    def sampled(self, completions: Sequence[Response]) -> None:
        """Its responses are there and about to be graded."""
        self.doing, self.since = "grading", time.monotonic()
        self._flow.num_groups += 1
        self._flow.num_samples += len(completions)
        self._flow.num_tokens += sum(len(made.token_ids) for made in completions)

    def graded(self) -> None:
        """Its grades are there; a teacher may still be scoring its responses."""
        self.doing, self.since = "scoring", time.monotonic()


class InFlight:
    """num_started: groups asked for since the start; num_groups, num_samples, num_tokens: sampled;
    num_graded: groups whose grades are back; num_scored: responses that a teacher has scored."""

    def __init__(self) -> None:
        self.open: set[OpenGroup] = set()
        self.num_started = 0
        self.num_groups = self.num_samples = self.num_tokens = self.num_graded = 0
        self.num_scored = 0

    @contextlib.contextmanager
    def group(self, prompt: Prompt) -> Iterator[OpenGroup]:
        """A group is made within the block."""
        group = OpenGroup(self, prompt)
        self.open.add(group)
        self.num_started += 1
        try:
            yield group
            self.num_graded += 1
        finally:
            self.open.discard(group)

    def oldest(self, doing: str) -> OpenGroup | None:
        """Of the groups with which that is done."""
        return min((g for g in self.open if g.doing == doing), key=lambda g: g.since, default=None)

    def count(self, doing: str) -> int:
        return sum(group.doing == doing for group in self.open)
