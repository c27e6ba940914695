"""samples.jsonl of `eval` and `sample`: a line per graded response, in the order of completion.

Of two lines about the same response the later counts, so that a response whose grader failed can be
graded again. The texts stay on disk: 800 thousand questions take about 250 MB of memory.
"""

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, Literal

from megatron_r1.errors import UserError
from megatron_r1.files.jsonl import read_lines, whole_lines
from megatron_r1.files.line_writer import LineWriter
from megatron_r1.rewards.base import UNGRADED

QuestionKey = tuple[str, str]
"""(benchmark, question id); the benchmark is "" in lines of `sample`."""
TEXT = rb'"(?:[^"\\]|\\.)*"'
LINE_START = re.compile(rb'\{(?:"benchmark": (%s), )?"id": (%s)' % (TEXT, TEXT))


class ResponseLog:
    """`add` returns at once; lines are written together and are durable when `close` returns.
    digests: question → digest of everything that its grades depend on. ungraded: (question, index)
    of the responses whose grader failed."""

    def __init__(self, path: Path, command: Literal["eval", "sample"]) -> None:
        """Raises UserError for a file that another command wrote."""
        self.path, self._command = path, command
        self.digests: dict[QuestionKey, str] = {}
        self.ungraded: set[tuple[QuestionKey, int]] = set()
        self._indices: dict[QuestionKey, int] = {}  # a bit for each index
        self._writer = LineWriter(path)
        for line in read_lines(path):
            self._remember(line)

    def __contains__(self, response: tuple[QuestionKey, int]) -> bool:
        question, index = response
        return bool(self._indices.get(question, 0) >> index & 1)

    def count(self, questions: Iterable[QuestionKey], num_samples: int) -> int:
        """Return how many of the questions' first `num_samples` responses are logged."""
        mask = (1 << num_samples) - 1
        return sum((self._indices.get(question, 0) & mask).bit_count() for question in questions)

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line, which begins with the keys benchmark (of `eval`) and id and has those of
        `TextResponse.to_line`, digest and seed. Raises what stopped the writing of earlier lines.
        """
        self._remember(line)
        self._writer.add(line)

    def read(
        self, questions: Iterable[QuestionKey], num_samples: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield, for each question in turn, the lines of its first `num_samples` responses by
        index. One question's lines are in memory at a time."""
        if not self.path.exists():
            yield from ([] for _ in questions)
            return
        offsets: dict[QuestionKey, array[int]] = {}
        with self.path.open("rb") as file:
            for offset, raw in whole_lines(file):
                offsets.setdefault(_key_of(raw), array("q")).append(offset)
            for question in questions:
                lines: dict[int, dict[str, Any]] = {}
                for offset in offsets.get(question, ()):
                    file.seek(offset)
                    line = json.loads(file.readline())
                    lines[line["index"]] = line
                yield [lines[index] for index in sorted(lines) if index < num_samples]

    def read_others(
        self, questions: Set[QuestionKey], num_samples: int
    ) -> Iterator[dict[str, Any]]:
        """Yield the lines that `read` leaves out; a later recipe may use them again."""
        num_logged = sum(indices.bit_count() for indices in self._indices.values())
        if self.count(questions, num_samples) == num_logged:
            return  # the usual case: the file need not be read again
        for line in read_lines(self.path):
            if _key(line) not in questions or line["index"] >= num_samples:
                yield line

    async def close(self) -> None:
        await self._writer.close()

    def _remember(self, line: Mapping[str, Any]) -> None:
        try:
            question, index = _key(line), line["index"]
            self._indices[question] = self._indices.get(question, 0) | 1 << index
            self.digests[question] = line["digest"]
            is_ungraded = line["reason"].startswith(UNGRADED)
            is_ours = ("benchmark" in line) == (self._command == "eval")
        except (KeyError, TypeError, AttributeError):
            is_ours = False
        if not is_ours:
            raise UserError(
                f"{self.path} has a line that `{self._command}` did not write "
                f"({', '.join(line)}): run.folder must be a folder of its own"
            )
        (self.ungraded.add if is_ungraded else self.ungraded.discard)((question, index))


def _key(line: Mapping[str, Any]) -> QuestionKey:
    return line.get("benchmark", ""), line["id"]


def _key_of(line: bytes) -> QuestionKey:
    """Return the key of an encoded line from its first fields: decoding all of it takes longer."""
    match = LINE_START.match(line)
    assert match, f"a line of samples.jsonl begins with {line[:40]!r}"
    benchmark, question = match.groups()
    return json.loads(benchmark or b'""'), json.loads(question)
