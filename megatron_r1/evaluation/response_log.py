"""The log of all graded responses: samples.jsonl of `eval` and `sample`, in order of completion.

Of two lines about the same response the later counts, so that a response whose grader failed can
be graded again. The texts stay on disk: 800 thousand prompts take about 250 MB of memory."""

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.json_lines import complete_lines, read_lines
from megatron_r1.base.files.line_writer import LineWriter
from megatron_r1.evaluation.response import is_ungraded

PromptKey = tuple[str, str]
"""(benchmark, prompt id); the benchmark is "" in lines of `sample`."""
TEXT = rb'"(?:[^"\\]|\\.)*"'
LINE_START = re.compile(rb'\{(?:"benchmark": (%s), )?"id": (%s)' % (TEXT, TEXT))


class ResponseLog:
    """Appends responses to a log: `add` returns at once; lines are written together and are
    durable when `close` returns.

    Attributes:
        digests: prompt → digest of everything that its grades depend on.
        ungraded_responses: (prompt, index) of the responses whose grader failed."""

    def __init__(self, path: Path, command: Literal["eval", "sample"]) -> None:
        """Open the log for appending.

        Raises:
            UserError: another command wrote the file.
        """
        self.path, self._command = path, command
        self.digests: dict[PromptKey, str] = {}
        self.ungraded_responses: set[tuple[PromptKey, int]] = set()
        self._indices: dict[PromptKey, int] = {}  # a bit for each index
        self._writer = LineWriter(path)
        for line in read_lines(path):
            self._remember_line(line)

    def __contains__(self, response: tuple[PromptKey, int]) -> bool:
        prompt, index = response
        return bool(self._indices.get(prompt, 0) >> index & 1)

    def count(self, prompts: Iterable[PromptKey], num_samples: int) -> int:
        """Return how many of the prompts' first `num_samples` responses are logged.

        Args:
            prompts: their keys.
            num_samples: the number of responses to each prompt.
        """
        mask = (1 << num_samples) - 1
        return sum((self._indices.get(prompt, 0) & mask).bit_count() for prompt in prompts)

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line, which begins with the keys benchmark (of `eval`) and id and has those of
        `TextResponse.to_line`, digest and seed.

        Raises:
            Exception: what stopped the writing of earlier lines.
        """
        self._remember_line(line)
        self._writer.add(line)

    def read(
        self, prompts: Iterable[PromptKey], num_samples: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield, for each prompt in turn, the lines of its first `num_samples` responses by index.
        One prompt's lines are in memory at a time.

        Args:
            prompts: their keys, in the order of the result.
            num_samples: the number of responses to each prompt.
        """
        if not self.path.exists():
            yield from ([] for _ in prompts)
            return
        offsets: dict[PromptKey, array[int]] = {}
        with self.path.open("rb") as file:
            for offset, raw in complete_lines(file):
                offsets.setdefault(_read_key(raw), array("q")).append(offset)
            for prompt in prompts:
                lines: dict[int, dict[str, Any]] = {}
                for offset in offsets.get(prompt, ()):
                    file.seek(offset)
                    line = json.loads(file.readline())
                    lines[line["index"]] = line
                yield [lines[index] for index in sorted(lines) if index < num_samples]

    def read_others(
        self, prompts: AbstractSet[PromptKey], num_samples: int
    ) -> Iterator[dict[str, Any]]:
        """Yield the lines that `read` leaves out; a later recipe may use them again."""
        num_logged = sum(indices.bit_count() for indices in self._indices.values())
        if self.count(prompts, num_samples) == num_logged:
            return  # the usual case: the file need not be read again
        for line in read_lines(self.path):
            if _prompt_key(line) not in prompts or line["index"] >= num_samples:
                yield line

    async def close(self) -> None:
        """Write the responses that are still pending."""
        await self._writer.close()

    def _remember_line(self, line: Mapping[str, Any]) -> None:
        try:
            prompt, index = _prompt_key(line), line["index"]
            self._indices[prompt] = self._indices.get(prompt, 0) | 1 << index
            self.digests[prompt] = line["digest"]
            failed = is_ungraded(line)
            is_ours = ("benchmark" in line) == (self._command == "eval")
        except (KeyError, TypeError, AttributeError):
            is_ours = False
        if not is_ours:
            raise UserError(
                f"{self.path} has a line that `{self._command}` did not write "
                f"({', '.join(line)}): run.folder must be a folder of its own",
                key="run.folder",
                cause=Cause.CONFLICT,
            )
        (self.ungraded_responses.add if failed else self.ungraded_responses.discard)(
            (prompt, index)
        )


def _prompt_key(line: Mapping[str, Any]) -> PromptKey:
    return line.get("benchmark", ""), line["id"]


def _read_key(line: bytes) -> PromptKey:
    """Return the key of an encoded line from its first fields: decoding all of it takes longer."""
    match = LINE_START.match(line)
    assert match, f"a line of samples.jsonl begins with {line[:40]!r}"
    benchmark, prompt = match.groups()
    return json.loads(benchmark or b'""'), json.loads(prompt)
