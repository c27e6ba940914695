"""Rejection sampling: which of a question's responses are kept, and why the others are not.

The first of these that applies: the model gave no response; the grader failed; the response is
empty; the whole question is too easy or too hard; the response is wrong, or its reward too low; a
filter drops it; it duplicates an earlier one. `keep.per_prompt` of the others are chosen. A
decision is a code with its reason."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from typing import Any

from r1_grading.terms import ACCURACY, compare_rewards

from megatron_r1.config.sample import KeepConfig
from megatron_r1.data.prompt import Prompt, normalize_question
from megatron_r1.evaluation.response import TextResponse

KEPT, NOT_CHOSEN = "kept", "not_chosen"
CHOSEN, REJECTED = "chosen", "rejected"
SAFE, UNSAFE = "safe", "unsafe"
UNGRADED_CODE = "ungraded"
DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Decision:
    """Whether a response is kept, and why.

    Attributes:
        code: the field `decision` in samples.jsonl.
        why: the reason, for a person who reads the line."""

    code: str
    why: str = ""

    @property
    def is_kept(self) -> bool:
        """Whether the response is in the file that is trained on."""
        return self.code in (KEPT, CHOSEN, REJECTED, SAFE, UNSAFE)


class DecisionCounts:
    """Counts for sample.json and for the terminal."""

    def __init__(self) -> None:
        self.decisions: Counter[str] = Counter()
        self.num_kept = self._num_kept_tokens = self._num_graded = 0
        self._accuracy = 0.0
        self._kinds: dict[str, Counter[str]] = {}  # kind → number of "responses" and of "kept"
        self._questions: dict[str, bool] = {}  # id → whether a response is kept

    def add(self, line: Mapping[str, Any], decision: Decision) -> None:
        """Count the decision about the response of a line."""
        self.decisions[decision.code] += 1
        kind_counts = self._kinds.setdefault(line["kind"], Counter(responses=0, kept=0))
        kind_counts.update(responses=1, kept=decision.is_kept)
        self._questions[line["id"]] = decision.is_kept or self._questions.get(line["id"], False)
        if ACCURACY in line["rewards"]:
            self._accuracy += line["rewards"][ACCURACY]
            self._num_graded += 1
        if decision.is_kept:
            self.num_kept += 1
            self._num_kept_tokens += line["length"] or 0

    def as_json(self) -> dict[str, Any]:
        """Return the content of sample.json.

        Returns:
            accuracy: the mean over graded responses; None without graded responses.
            kept_tokens: the sampled tokens, before rewriting.
            The other values are counts."""
        return {
            "questions": len(self._questions),
            "questions_with_kept": sum(self._questions.values()),
            "responses": self.decisions.total(),
            "kept": self.num_kept,
            "kept_tokens": self._num_kept_tokens,
            "accuracy": self._accuracy / self._num_graded if self._num_graded else None,
            "decisions": dict(self.decisions.most_common()),
            "kinds": {kind: dict(counts) for kind, counts in sorted(self._kinds.items())},
        }

    def table(self) -> str:
        """Return a line per decision, the most frequent first."""
        total = self.decisions.total()
        width = max((len(code) for code in self.decisions), default=0)
        lines = [
            f"  {code:<{width}}  {count:>9,}  {count / total:>6.1%}"
            for code, count in self.decisions.most_common()
        ]
        head = (
            f"{total:,} responses to {len(self._questions):,} questions, {self.num_kept:,} kept, "
            f"of {sum(self._questions.values()):,} questions"
        )
        return "\n".join([head, *lines])


RunFilters = Callable[[Prompt, TextResponse], Awaitable[Decision | None]]
"""Why the filters drop a response, None to keep it (`filters.PooledFilters`)."""


class Selection:
    """Chooses the responses that a `sample` recipe keeps.

    Args:
        keep: the recipe's section.
        filters: says why the filters drop a response.
        drops_duplicates: whether a response equal to an earlier one is dropped.
        seed: the seed of `keep.choose: random`."""

    def __init__(
        self, keep: KeepConfig, filters: RunFilters, drops_duplicates: bool, seed: int = 0
    ) -> None:
        self.keep, self._filters = keep, filters
        self._drops_duplicates, self._seed = drops_duplicates, seed

    async def drop_reasons(
        self, prompt: Prompt, responses: Sequence[TextResponse]
    ) -> dict[int, Decision]:
        """Return index → reason of each response that is dropped."""
        question_drop = self._question_drop(responses)
        reasons = await asyncio.gather(
            *(self.drop_reason(prompt, r, question_drop) for r in responses)
        )
        drops: dict[int, Decision] = {}
        index_by_text: dict[str, int] = {}
        for response, reason in zip(responses, reasons, strict=True):
            if reason is None and self._drops_duplicates:
                first_index = index_by_text.setdefault(
                    normalize_question(response.text), response.index
                )
                if first_index != response.index:
                    reason = Decision(DUPLICATE, f"the same as response {first_index}")
            if reason is not None:
                drops[response.index] = reason
        return drops

    async def drop_reason(
        self, prompt: Prompt, response: TextResponse, question_drop: Decision | None = None
    ) -> Decision | None:
        """Return why a response by itself is dropped, None to keep it.

        Args:
            prompt: the question, for the filters.
            response: one response to it.
            question_drop: why all graded responses to this question are dropped."""
        if response.refusal:
            return Decision("no_response", response.refusal)
        if response.is_ungraded:
            return Decision(UNGRADED_CODE, response.reason)
        if not response.text.strip():
            return Decision("empty", "there is nothing to learn")
        if question_drop is not None:
            return question_drop
        keep = self.keep
        if keep.min_accuracy is not None:
            if response.rewards[ACCURACY] < keep.min_accuracy:
                return Decision("wrong", response.reason)
            if (
                keep.min_reward is not None
                and compare_rewards(_graded_reward(response), keep.min_reward) < 0
            ):
                return Decision("low_reward", f"reward {response.reward:.3g}: {response.reason}")
        return await self._filters(prompt, response)

    def in_order(self, prompt: Prompt, responses: Sequence[TextResponse]) -> list[TextResponse]:
        """Return the responses in the order in which they are chosen. Ties go to the earlier
        response; a random order depends on (seed, question) alone."""
        ordered = list(responses)
        match self.keep.choose:
            case "random":
                random.Random(f"{self._seed}/{prompt.id}").shuffle(ordered)
            case "shortest":
                ordered.sort(key=lambda response: response.length)
            case "best":
                ordered.sort(
                    key=cmp_to_key(
                        lambda a, b: compare_rewards(_graded_reward(b), _graded_reward(a))
                    )
                )
        return ordered

    def _question_drop(self, responses: Sequence[TextResponse]) -> Decision | None:
        keep = self.keep
        if keep.min_accuracy is None or (rate := _pass_rate(responses, keep.min_accuracy)) is None:
            return None
        reason = f"{rate:.0%} of its responses are right"
        if keep.max_pass_rate is not None and rate > keep.max_pass_rate:
            return Decision("too_easy", reason)
        if keep.min_pass_rate is not None and rate < keep.min_pass_rate:
            return Decision("too_hard", reason)
        return None


def _pass_rate(responses: Sequence[TextResponse], min_accuracy: float) -> float | None:
    """Return the share of the graded responses that are right; None if no response is graded."""
    graded = [r for r in responses if r.rewards and not r.is_ungraded]
    if not graded:
        return None
    return sum(r.rewards[ACCURACY] >= min_accuracy for r in graded) / len(graded)


def _graded_reward(response: TextResponse) -> float:
    assert response.reward is not None, f"response {response.index} is not graded"
    return response.reward
