"""The reward of a response: its terms, called, and their weighted sum.

DeepSeek-R1 adds its rewards up (arXiv 2501.12948 v2: accuracy, format and language consistency in
the reasoning stage; preference rewards only in the last 400 of the final stage's 1,700 steps)."""

import asyncio
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from r1_grading.base.errors import Cause, UserError, shorten
from r1_grading.rewards import (
    ENVIRONMENT,
    GRADERS,
    RESPONSE_ONLY_REWARDS,
    SERVED_REWARDS,
    Grade,
)
from r1_grading.terms.options import Options, reward_arguments
from r1_grading.terms.weights import ACCURACY, DEFAULT_WEIGHTS
from r1_grading.truths import check_truth


class RewardUnusable(UserError):
    """A reward cannot grade a prompt.

    Attributes:
        key: the first field that it lacks, else the kind or term.
        missing: the fields of the prompt that it lacks."""

    def __init__(
        self,
        message: str,
        missing: tuple[str, ...] = (),
        *,
        key: str = "kind",
        cause: Cause = Cause.FAILED,
    ) -> None:
        if missing:
            key, cause = missing[0], Cause.MISSING
        super().__init__(message, key=key, cause=cause)
        self.missing = missing


class Gradable(Protocol):
    """The parts of a prompt that grading reads (`data.prompt.Prompt`)."""

    @property
    def question(self) -> str:
        """The question as the policy was asked it, without its template."""

    @property
    def kind(self) -> str:
        """The name of the reward, or its `module:function`."""

    @property
    def truth(self) -> Any:
        """The right answer, in the form that the reward reads."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """The other fields of the row, which the reward gets as keywords."""


class Grader(Protocol):
    """The part of a `RewardPool` that the terms call."""

    async def grade(self, kind: str, response: str, truth: object, /, **fields: object) -> Grade:
        """Grade one response with the reward `kind`; see `RewardPool.grade`.

        Args:
            kind: a reward's name, or "module:function".
            response: the text that the policy sampled.
            truth: the right answer.
            **fields: the keywords of the reward."""


class RewardTerms:
    """Calls a recipe's terms in a pool; accuracy is the reward of the prompt's own kind.

    Args:
        pool: a `RewardPool`, or anything with its `grade`.
        options: reward → its options, `rewards.options`."""

    def __init__(self, pool: Grader, options: Options) -> None:
        self._pool, self._options = pool, options

    async def grade(
        self,
        terms: Sequence[str],
        prompt: Gradable,
        text: str,
        num_tokens: int | None,
        thought_opened: bool,
    ) -> dict[str, Grade]:
        """Return the grade of a response by each term.

        Args:
            terms: names of rewards; "accuracy" is the prompt's own.
            prompt: the prompt, with its question, kind, truth and fields.
            text: the response.
            num_tokens: the response's length in tokens; None if unknown.
            thought_opened: whether the prompt ended with `<think>`.

        Returns:
            term → grade.

        Raises:
            ValueError: a reward that cannot be used.
            RunError: a service that is down."""
        run_arguments: dict[str, object] = {"question": prompt.question}
        if num_tokens is not None:
            run_arguments["num_tokens"] = num_tokens
        if thought_opened:
            run_arguments["thought_opened"] = True
        grades = await asyncio.gather(
            *(self._grade_term(term, prompt, text, run_arguments) for term in terms)
        )
        return dict(zip(terms, grades, strict=True))

    async def check(
        self, terms: Collection[str], prompts: Iterable[Gradable], thought_opened: bool = False
    ) -> None:
        """Check the truth of every prompt, and that every reward can be called.

        The prompt's own reward and every term are called for one prompt of every kind, language and
        set of fields: a row without a needed column must not stop the run at the step that draws
        it. `truths.check_truth` reads the truths.

        Args:
            terms: names of rewards; "accuracy" is always checked.
            prompts: the prompts of the run.
            thought_opened: whether the prompts end with `<think>`.

        Raises:
            UserError: a reward that cannot be imported.
            RewardUnusable: a reward that cannot grade what it is called with: a truth it does not
                understand, an option, a field or a program it lacks."""
        examples = {}
        for prompt in prompts:
            language = str(prompt.fields.get("language"))
            examples[prompt.kind, language, frozenset(prompt.fields)] = prompt
            try:
                check_truth(prompt.kind, prompt.truth, prompt.fields)
            except ValueError as error:
                raise RewardUnusable(
                    f"question {shorten(prompt.question)!r}: its {prompt.kind} answer cannot be "
                    f"graded: {error}"
                ) from None
        for prompt in examples.values():
            for term in dict.fromkeys((ACCURACY, *terms)):
                kind = _kind_of_term(term, prompt)
                if kind == ENVIRONMENT:
                    continue
                trial = await self._try_term(term, prompt, thought_opened)
                if not trial.is_graded:
                    name = f"rewards.weights.{term}: it"
                    if term == ACCURACY:
                        name = f"question {shorten(prompt.question)!r}: its {kind} answer"
                    hint = (
                        f"; see rewards.options.{kind}" if kind in GRADERS | SERVED_REWARDS else ""
                    )
                    key = "kind" if term == ACCURACY else f"rewards.weights.{term}"
                    raise RewardUnusable(f"{name} {trial.reason}{hint}", trial.missing, key=key)

    async def _try_term(self, term: str, prompt: Gradable, thought_opened: bool) -> Grade:
        """Return a grade, which is ungraded if the reward cannot be used.

        A user's own reward may raise where there is no answer; one that also raises on a
        well-formed answer is broken, or called wrongly."""
        trial = (await self.grade([term], prompt, "", 0, thought_opened))[term]
        if not trial.is_graded and _kind_of_term(term, prompt) not in GRADERS | SERVED_REWARDS:
            text = f"<think>I think.</think>\n<answer>{prompt.truth}</answer>"
            trial = (await self.grade([term], prompt, text, 0, thought_opened))[term]
        return trial

    async def _grade_term(
        self, term: str, prompt: Gradable, text: str, run_arguments: Mapping[str, object]
    ) -> Grade:
        kind = _kind_of_term(term, prompt)
        truth = None if term != ACCURACY and kind in RESPONSE_ONLY_REWARDS else prompt.truth
        fields = reward_arguments(kind, self._options, prompt.fields, run_arguments)
        return await self._pool.grade(kind, text, truth, **fields)


def _kind_of_term(term: str, prompt: Gradable) -> str:
    return prompt.kind if term == ACCURACY else term


@dataclass(frozen=True)
class Reward:
    """The combined reward of one response.

    Attributes:
        total: the weighted sum, which the policy is trained on.
        terms: each term's reward, in [0, 1]; that of an environment, or of a function written for
            verl or TRL, may be any finite number.
        reason: the terms' reasons, in one line.
        ungraded: the terms whose reward function raised.
        is_graded: False if an ungraded term has a weight, so that the total does not measure the
            response."""

    total: float
    terms: dict[str, float]
    reason: str
    ungraded: tuple[str, ...] = ()
    is_graded: bool = True


def combine(grades: Mapping[str, Grade], weights: Mapping[str, float] = DEFAULT_WEIGHTS) -> Reward:
    """Return total = Σ weight[term] · reward[term] over the weighted terms.

    Args:
        grades: term → grade. A graded term without a weight is reported and does not count.
        weights: term → weight.

    Returns:
        The sum, with each term's reward and the reasons.

    Raises:
        ValueError: a weight whose term was not graded."""
    if missing_terms := sorted(weights.keys() - grades.keys()):
        raise ValueError(
            f"rewards.weights names {missing_terms[0]!r}, which was not graded; "
            f"graded: {', '.join(sorted(grades)) or 'nothing'}"
        )
    ungraded_terms = tuple(term for term, grade in grades.items() if not grade.is_graded)
    counted_terms = {ACCURACY, *weights, *ungraded_terms}
    return Reward(
        total=sum(weight * grades[term].reward for term, weight in weights.items()),
        terms={term: grade.reward for term, grade in grades.items()},
        reason="; ".join(grades[term].reason for term in grades if term in counted_terms),
        ungraded=ungraded_terms,
        is_graded=not any(weights.get(term) for term in ungraded_terms),
    )


EQUAL_RTOL = 2.0**-22
"""Of the larger of two rewards: two units in the last place of a float32, which a reward model or
a user's function may have computed in."""
EQUAL_ATOL = 1e-12
"""Where terms of opposite sign cancel, what is left of rewards of order 1."""


def rewards_equal(rewards: Sequence[float]) -> bool:
    """Return whether all of `rewards` are the same but for rounding; True for none and for one."""
    if not rewards:
        return True
    return math.isclose(min(rewards), max(rewards), rel_tol=EQUAL_RTOL, abs_tol=EQUAL_ATOL)


def compare_rewards(first: float, second: float) -> int:
    """Return -1 if `first` is smaller, 1 if it is larger, 0 if both are equal but for rounding."""
    return 0 if rewards_equal((first, second)) else -1 if first < second else 1
