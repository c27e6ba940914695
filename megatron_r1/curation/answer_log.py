"""Every answer on disk as soon as it is graded; what is there is not sampled again.

`samples.jsonl` has a line per answer, in the order in which they were finished; of two lines about
the same answer the later counts. Only which answers there are is in memory, not what they say: 800
thousand questions take about 100 MB.
"""

from __future__ import annotations

import contextlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from megatron_r1.files.jsonl import read_lines
from megatron_r1.files.line_writer import LineWriter
from megatron_r1.rewards.base import UNGRADED


class AnswerLog:
    """`add` returns at once; lines are written together, and are durable when `close` returns.

    digests: question id → digest of all that its grades depend on. ungraded: answers, as (question
    id, index), that no grader could grade.
    """

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a file that another command wrote."""
        self.path = path
        self.digests: dict[str, str] = {}
        self.ungraded: set[tuple[str, int]] = set()
        self._known: dict[str, int] = {}  # question id → a bit for each index
        self._writer = LineWriter(path)
        for line in read_lines(path):
            self._remember(line)

    def __contains__(self, answer: tuple[str, int]) -> bool:
        question, index = answer
        return bool(self._known.get(question, 0) >> index & 1)

    def add(self, line: Mapping[str, Any]) -> None:
        """line: id, index, digest, seed, kind, question and `candidate.to_line`. Raises what
        stopped the writing."""
        self._remember(line)
        self._writer.add(line)

    def groups(self, questions: Iterable[str], num_samples: int) -> Iterator[list[dict[str, Any]]]:
        """For each question, in the order given, the lines of its first `num_samples` answers. One
        question's are in memory at a time."""
        places: dict[str, array[int]] = {}
        with contextlib.ExitStack() as stack:
            if not self.path.exists():
                yield from ([] for _ in questions)
                return
            file = stack.enter_context(self.path.open("rb"))
            place = 0
            for line in file:
                if line.endswith(b"\n"):
                    # Lines begin with their id; to decode them all twice would take twice as long.
                    question = _id_of(line)
                    places.setdefault(question, array("q")).append(place)
                place += len(line)
            for question in questions:
                found: dict[int, dict[str, Any]] = {}
                for place in places.get(question, ()):
                    file.seek(place)
                    answer = json.loads(file.readline())
                    found[answer["index"]] = answer
                yield [found[index] for index in sorted(found) if index < num_samples]

    def others(self, questions: Set[str], num_samples: int) -> Iterator[dict[str, Any]]:
        """The lines that `groups` leaves out, which may be asked for again one day."""
        asked = sum((self._known.get(q, 0) & (1 << num_samples) - 1).bit_count() for q in questions)
        if asked == sum(indices.bit_count() for indices in self._known.values()):
            return  # as a rule: the file need not be read again
        for line in read_lines(self.path):
            if line["id"] not in questions or line["index"] >= num_samples:
                yield line

    async def close(self) -> None:
        await self._writer.close()

    def _remember(self, line: Mapping[str, Any]) -> None:
        try:
            question, index = line["id"], line["index"]
            self._known[question] = self._known.get(question, 0) | 1 << index
            self.digests[question] = line["digest"]
            is_ungraded = line["reason"].startswith(UNGRADED)
        except (KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{self.path} has a line that `sample` did not write ({', '.join(line)}): "
                "run.folder must be a folder of its own"
            ) from None
        (self.ungraded.add if is_ungraded else self.ungraded.discard)((question, index))


def _id_of(line: bytes) -> str:
    """The id of a line whose first key it is."""
    start = line.find(b'"id": "') + len(b'"id": "')
    return line[start : line.index(b'"', start)].decode()
