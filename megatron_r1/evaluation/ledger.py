"""Every graded sample of an evaluation, on disk as it finishes; what is there is not sampled again.

`samples.jsonl` is append-only. Of two lines about the same sample the later counts: a sample that
could not be graded (a missing sandbox, say) is graded again when the evaluation continues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.evaluation.voting import Vote, read_vote
from megatron_r1.files.jsonl import read_lines
from megatron_r1.files.line_writer import LineWriter
from megatron_r1.rewards.base import UNGRADED

Key = tuple[str, str, int]
"""(benchmark, question id, sample index)"""


@dataclass(frozen=True)
class Graded:
    """What the metrics need of a sample; its text stays on disk."""

    digest: str
    reward: float
    length: int | None
    truncated: bool
    ungraded: bool
    vote: Vote | None


class Ledger:
    """`samples`: what is known. `add` returns at once; lines are written together, and are durable
    when `close` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples: dict[Key, Graded] = {}
        self._writer = LineWriter(path)
        for line in read_lines(path):
            self._remember(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """line: benchmark, id, index, seed, digest, response, opened, reward, reason, length,
        truncated, and whatever else helps to audit it. Raises what stopped the writing."""
        self._remember(line)
        self._writer.add(line)

    def responses(self, keys: Sequence[Key]) -> dict[Key, dict[str, Any]]:
        """The lines of some samples, from the file."""
        wanted = set(keys)
        lines = read_lines(self.path)
        return {key: line for line in lines if wanted and (key := key_of(line)) in wanted}

    async def close(self) -> None:
        await self._writer.close()

    def _remember(self, line: Mapping[str, Any]) -> None:
        self.samples[key_of(line)] = Graded(
            str(line["digest"]),
            float(line["reward"]),
            line["length"],
            bool(line["truncated"]),
            str(line["reason"]).startswith(UNGRADED),
            read_vote(str(line["response"]), bool(line["opened"])),
        )


def key_of(line: Mapping[str, Any]) -> Key:
    """Raises ValueError for a line that is no sample of an evaluation."""
    try:
        return str(line["benchmark"]), str(line["id"]), int(line["index"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"samples.jsonl has a line that no evaluation wrote ({', '.join(line)}): "
            "run.folder must be a folder of its own"
        ) from None
