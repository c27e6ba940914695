"""The groups in flight: those that are being sampled or graded, or wait for a teacher.

Hang reports and the health server read them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from megatron_r1.data.prompt import Prompt
from megatron_r1.engines.server.responses import Response

Phase = Literal["sampling", "grading", "awaiting_teacher"]


class InFlightGroup:
    """A group that is not finished, and the phase it is in.

    A teacher computes its log-probabilities while the group is graded; the group enters
    "awaiting_teacher" when it is graded, in a run with a teacher.

    Attributes:
        since: when the phase began, time.monotonic()."""

    def __init__(self, tracker: InFlightGroups, prompt: Prompt) -> None:
        self._tracker, self.prompt = tracker, prompt
        self._enter_phase("sampling")

    def await_grades(self) -> None:
        """Enter phase "grading" with responses that were sampled in an earlier process."""
        self._enter_phase("grading")

    def sampling_done(self, responses: Sequence[Response]) -> None:
        """Count the group's responses and enter phase "grading"."""
        self._enter_phase("grading")
        self._tracker.num_sampled += 1
        self._tracker.num_responses += len(responses)
        self._tracker.num_tokens += sum(len(response.token_ids) for response in responses)

    def await_teacher(self) -> None:
        """Enter phase "awaiting_teacher": only log-probabilities of a teacher are missing."""
        self._enter_phase("awaiting_teacher")

    def _enter_phase(self, phase: Phase) -> None:
        self.phase, self.since = phase, time.monotonic()


class InFlightGroups:
    """Tracks the groups in flight and counts finished work since the start of the process.

    Attributes:
        num_started: groups requested.
        num_sampled: groups that were sampled.
        num_responses: the responses of sampled groups.
        num_tokens: the tokens of those responses.
        num_finished: groups that are graded, and have the teacher's log-probabilities if there is
            one.
        num_with_teacher_logprobs: responses whose log-probabilities a teacher has computed."""

    def __init__(self) -> None:
        self.groups: set[InFlightGroup] = set()
        self.num_started = self.num_finished = self.num_with_teacher_logprobs = 0
        self.num_sampled = self.num_responses = self.num_tokens = 0

    @contextlib.contextmanager
    def group(self, prompt: Prompt) -> Iterator[InFlightGroup]:
        """Track a group from the start of the block to its end."""
        group = InFlightGroup(self, prompt)
        self.groups.add(group)
        self.num_started += 1
        try:
            yield group
            self.num_finished += 1
        finally:
            self.groups.discard(group)

    def oldest(self, phase: Phase) -> InFlightGroup | None:
        """Return the group that has been in `phase` longest, or None."""
        groups = (group for group in self.groups if group.phase == phase)
        return min(groups, key=lambda group: group.since, default=None)

    def count(self, phase: Phase) -> int:
        """Return the number of groups in a phase."""
        return sum(group.phase == phase for group in self.groups)
