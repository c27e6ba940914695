"""Calls the rewards that the terms of `rewards.weights` name, for one response at a time."""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from megatron_r1.errors import Cause, UserError
from megatron_r1.rewards import ENVIRONMENT, FORM_REWARDS, REGISTRY, REMOTE
from megatron_r1.rewards.base import Grade, shorten
from megatron_r1.rewards.combine import ACCURACY
from megatron_r1.rewards.options import call_fields
from megatron_r1.rewards.runtime.pool import RewardPool
from megatron_r1.rewards.truths import check_truth

Options = Mapping[str, Mapping[str, Any]]
"""`rewards.options`."""


class RewardUnusable(UserError):
    """A reward cannot grade a prompt. key: the first field that it lacks, else the kind or term.
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
    """The parts of a prompt that grading reads (`data.prompts.Prompt`)."""

    @property
    def question(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def truth(self) -> Any: ...
    @property
    def fields(self) -> Mapping[str, Any]: ...


class RewardTerms:
    """Calls terms of `rewards.weights`; accuracy is the reward of the prompt's own kind."""

    def __init__(self, pool: RewardPool, options: Options) -> None:
        self._pool, self._options = pool, options

    async def grade(
        self,
        terms: Sequence[str],
        prompt: Gradable,
        text: str,
        num_tokens: int | None,
        opened: bool,
    ) -> dict[str, Grade]:
        """Return term → grade. num_tokens: the response's length; None if unknown. opened: whether
        the prompt ended with `<think>`. Raises ValueError for a reward that cannot be used,
        RunError for a service that is down."""
        facts: dict[str, object] = {"question": prompt.question}
        if num_tokens is not None:
            facts["num_tokens"] = num_tokens
        if opened:
            facts["opened"] = True
        grades = await asyncio.gather(*(self._call(term, prompt, text, facts) for term in terms))
        return dict(zip(terms, grades, strict=True))

    async def check(
        self, terms: Collection[str], prompts: Iterable[Gradable], opened: bool = False
    ) -> None:
        """Check the truth of every prompt (`truths.check_truth`), and call its own reward and every
        term for one prompt of every kind, language and set of fields: a row without a needed column
        must not stop the run at the step that draws it.

        Raises UserError for a reward that cannot be imported, RewardUnusable for one that cannot
        grade what it is called with: a truth it does not understand, an option, a field or a
        program it lacks."""
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
                kind = _kind(term, prompt)
                if kind == ENVIRONMENT:
                    continue
                trial = await self._try(term, prompt, opened)
                if not trial.is_graded:
                    name = f"rewards.weights.{term}: it"
                    if term == ACCURACY:
                        name = f"question {shorten(prompt.question)!r}: its {kind} answer"
                    hint = f"; see rewards.options.{kind}" if kind in REGISTRY | REMOTE else ""
                    key = "kind" if term == ACCURACY else f"rewards.weights.{term}"
                    raise RewardUnusable(f"{name} {trial.reason}{hint}", trial.missing, key=key)

    async def _try(self, term: str, prompt: Gradable, opened: bool) -> Grade:
        """Return a grade, which is ungraded if the reward cannot be used. A user's own reward may
        raise where there is no answer; one that also raises on a well-formed answer is broken, or
        called wrongly."""
        trial = (await self.grade([term], prompt, "", 0, opened))[term]
        if not trial.is_graded and _kind(term, prompt) not in REGISTRY | REMOTE:
            text = f"<think>I think.</think>\n<answer>{prompt.truth}</answer>"
            trial = (await self.grade([term], prompt, text, 0, opened))[term]
        return trial

    async def _call(
        self, term: str, prompt: Gradable, text: str, facts: Mapping[str, object]
    ) -> Grade:
        kind = _kind(term, prompt)
        truth = None if term != ACCURACY and kind in FORM_REWARDS else prompt.truth
        fields = call_fields(kind, self._options, prompt.fields, facts)
        return await self._pool.grade(kind, text, truth, **fields)


def _kind(term: str, prompt: Gradable) -> str:
    return prompt.kind if term == ACCURACY else term
