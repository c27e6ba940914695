"""One sampled response as text, with its rewards once it is graded, and what it is sampled from;
and the log of all graded responses: samples.jsonl of `eval` and `sample`, in order of completion.

Of two lines about the same response the later counts, so that a response whose grader failed can
be graded again. The texts stay on disk: 800 thousand prompts take about 250 MB of memory."""

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from r1_grading.reading import THINK, Part, chain_of_thought, response_part
from r1_grading.rewards import UNGRADED

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.json_lines import LineWriter, complete_lines, read_lines
from megatron_r1.config import AgentsConfig, RolloutConfig
from megatron_r1.data.chats import Message
from megatron_r1.data.prompts import Prompt

LINE_NAMES = {"text": "response", "num_tokens": "length", "is_ungraded": "ungraded"}
"""Fields of `TextResponse` that have another name in samples.jsonl."""


@dataclass(frozen=True)
class TextResponse:
    """A response and its grade.

    Attributes:
        text: the response without the `<think>` that its prompt may end with.
        num_tokens: the length in tokens; None if a server does not report it.
        truncated: whether the response was cut at the limit of tokens.
        opened: whether the prompt ended with `<think>`.
        refusal: why the policy gave no response, else "".
        index: the response's index among the question's samples.
        rewards: term → reward in [0, 1]; empty while the response is ungraded.
        reward: the weighted sum of the rewards.
        reason: the graders' reasons.
        is_ungraded: whether a grader was called and failed.
        episode: for a response of several turns, its fields in samples.jsonl (`Episode.record`)."""

    text: str
    num_tokens: int | None = None
    truncated: bool = False
    opened: bool = False
    refusal: str = ""
    index: int = 0
    rewards: Mapping[str, float] = field(default_factory=dict)
    reward: float | None = None
    reason: str = ""
    is_ungraded: bool = False
    episode: Mapping[str, Any] | None = None

    @property
    def length(self) -> int:
        """The length in tokens, or in characters where the tokens were not counted."""
        return len(self.text) if self.num_tokens is None else self.num_tokens

    @property
    def full_text(self) -> str:
        """The text with the `<think>` that its prompt may have opened."""
        return THINK + self.text if self.opened else self.text

    @property
    def thought(self) -> str | None:
        """The text between the think tags; None where the response has none."""
        return chain_of_thought(self.text, self.opened)

    def part(self, part: Part) -> str | None:
        """Return the summary (what follows the thought) or the whole response; None if empty."""
        return response_part(self.text, part, self.opened).text

    def to_line(self) -> dict[str, Any]:
        """Return the fields of a line of samples.jsonl."""
        line = {LINE_NAMES.get(name, name): value for name, value in vars(self).items()}
        return line | (line.pop("episode") or {})

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Self:
        """Return the response of a line of the response log, as `to_line` wrote it."""
        line = {**line, "ungraded": is_ungraded(line)}
        episode = {key: line[key] for key in ("status", "turns")} if "turns" in line else None
        names = (f.name for f in fields(cls) if f.name != "episode")
        return cls(**{name: line[LINE_NAMES.get(name, name)] for name in names}, episode=episode)


def is_ungraded(line: Mapping[str, Any]) -> bool:
    """Whether the grader of a line of samples.jsonl failed; older lines say so in the reason."""
    return line.get("ungraded", line["reason"].startswith(UNGRADED))


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling parameters.

    Attributes:
        temperature: 0 is greedy.
        top_p: the share of the distribution that is drawn from.
        max_tokens: the most tokens of a response.
        stop: strings that end a response, besides the model's end tokens.
        stop_token_ids: tokens that end a response, besides the model's end tokens.
        top_k: the most tokens of a draw, or None.
        min_p: the least probability of a token, as a share of the likeliest one's."""

    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    top_k: int | None = None
    min_p: float = 0.0

    @classmethod
    def from_rollout(cls, rollout: RolloutConfig) -> Self:
        """Return those of a recipe's `rollout`, as it samples for training."""
        limits = rollout.temperature, rollout.top_p, rollout.max_response_tokens
        return replace(cls.from_options(rollout, *limits), top_k=rollout.top_k, min_p=rollout.min_p)

    @classmethod
    def from_options(
        cls, rollout: RolloutConfig, temperature: float, top_p: float, max_tokens: int
    ) -> Self:
        """Return those of a recipe's `rollout` with this temperature, cut and limit.

        Args:
            rollout: the recipe's section.
            temperature: 0: greedy.
            top_p: the cut of the distribution.
            max_tokens: the most of a response.
        """
        ends = tuple(rollout.stop), tuple(rollout.stop_token_ids)
        return cls(temperature, top_p, max_tokens, *ends)


class Policy(Protocol):
    """A model that answers questions.

    Attributes:
        concurrency: the number of requests that keep it busy.
        identity: JSON values that must be the same when a run is resumed."""

    concurrency: int
    identity: dict[str, Any]

    async def start(self) -> None:
        """Make the policy ready, before the first question.

        Raises:
            RunError: the policy cannot be made ready.
        """

    async def respond(
        self, question: str, seed: int, before: Sequence[Message] = ()
    ) -> TextResponse:
        """Sample one response.

        Args:
            question: the user's last message.
            seed: the same gives the same response, as far as the engine can reproduce it.
            before: the messages before the question.
        """

    async def check(self, agents: AgentsConfig, prompts: Sequence[Prompt]) -> None:
        """Raise UserError where episodes of these prompts cannot be played."""

    async def play(self, agents: AgentsConfig, prompt: Prompt, seed: int) -> TextResponse:
        """Play one episode in the environment of `agents`, which may grade the episode.

        Args:
            agents: the environment and its limits.
            prompt: the prompt that the episode begins with.
            seed: the seed of the first turn.

        Raises:
            RunError: episodes fail again and again by no fault of the policy."""

    async def close(self) -> None:
        """Release everything. May be called twice, and without `start`."""


PromptKey = tuple[str, str]
"""(benchmark, prompt id); the benchmark is "" in lines of `sample`."""
TEXT = rb'"(?:[^"\\]|\\.)*"'
LINE_START = re.compile(rb'\{(?:"benchmark": (%s), )?"id": (%s)' % (TEXT, TEXT))


class ResponseLog:
    """Appends responses to a log: `add` returns at once; lines are written together and are
    durable when `close` returns.

    Attributes:
        digests: prompt → digest of everything that its grades depend on.
        ungraded: (prompt, index) of the responses whose grader failed."""

    def __init__(self, path: Path, command: Literal["eval", "sample"]) -> None:
        """Open the log for appending.

        Raises:
            UserError: another command wrote the file.
        """
        self.path, self._command = path, command
        self.digests: dict[PromptKey, str] = {}
        self.ungraded: set[tuple[PromptKey, int]] = set()
        self._indices: dict[PromptKey, int] = {}  # a bit for each index
        self._writer = LineWriter(path)
        for line in read_lines(path):
            self._remember(line)

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
        self._remember(line)
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
            if _key(line) not in prompts or line["index"] >= num_samples:
                yield line

    async def close(self) -> None:
        """Write the responses that are still pending."""
        await self._writer.close()

    def _remember(self, line: Mapping[str, Any]) -> None:
        try:
            prompt, index = _key(line), line["index"]
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
        (self.ungraded.add if failed else self.ungraded.discard)((prompt, index))


def _key(line: Mapping[str, Any]) -> PromptKey:
    return line.get("benchmark", ""), line["id"]


def _read_key(line: bytes) -> PromptKey:
    """Return the key of an encoded line from its first fields: decoding all of it takes longer."""
    match = LINE_START.match(line)
    assert match, f"a line of samples.jsonl begins with {line[:40]!r}"
    benchmark, prompt = match.groups()
    return json.loads(benchmark or b'""'), json.loads(prompt)
