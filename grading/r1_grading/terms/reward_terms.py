"""Calls the terms of a response's reward in a pool, and checks before the run that each can be."""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
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
from r1_grading.terms.weights import ACCURACY
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
