"""The terms of a recipe's reward: read from it, called for a response, and added up.

The reward of a response is the weighted sum of its terms, each weighted from step to step. In this
file's order: weights (`read_weights`, `weights_at`), options (`read_options`, `reward_arguments`),
calls (`RewardTerms`), the sum (`combine`), and when two sums are equal (`rewards_equal`).
DeepSeek-R1 adds its rewards up (arXiv 2501.12948 v2: accuracy, format and language consistency in
the reasoning stage; preference rewards only in the last 400 of the final stage's 1,700 steps)."""

import asyncio
import functools
import inspect
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from r1_grading.base.errors import Cause, UserError, did_you_mean, shorten
from r1_grading.base.user_code import find_function
from r1_grading.base.values import read_scalar
from r1_grading.rewards import (
    ENVIRONMENT,
    GRADERS,
    RESPONSE_ONLY_REWARDS,
    SERVED_REWARDS,
    Grade,
    resolve_reward,
)
from r1_grading.truths import check_truth

ACCURACY = "accuracy"
"""The term that each prompt's own kind of reward grades."""
DEFAULT_WEIGHTS: Mapping[str, float] = {ACCURACY: 1.0, "format": 0.1}
"""The terms that DeepSeek-R1-Zero is trained on, accuracy and format."""


@dataclass(frozen=True)
class ScheduledWeight:
    """A weight that counts from step `from_step` to `to_step`, both included.

    Attributes:
        weight: the number by which the term's reward is multiplied.
        from_step: the first rollout at which it counts, from 1.
        to_step: the last one; None: until the end of the run."""

    weight: float
    from_step: int = 1
    to_step: int | None = None

    def counts_at(self, step: int) -> bool:
        """Return whether the weight counts at `step`; both ends are included."""
        return self.from_step <= step and (self.to_step is None or step <= self.to_step)


Weights = Mapping[str, float | ScheduledWeight]


def read_weights(weights: Mapping[str, Any]) -> dict[str, float | ScheduledWeight]:
    """Parse a recipe's `rewards.weights`.

    Args:
        weights: term → number or {weight, from_step, to_step}.

    Returns:
        The same, checked.

    Raises:
        UserError: a term that is no reward, an unknown key, a value of the wrong type, a schedule
            that never counts, or no weight above 0; it names the term and the
            key."""
    parsed_weights = {
        name: _read_weight(f"rewards.weights.{name}", name, w) for name, w in weights.items()
    }
    numbers = {
        name: w.weight if isinstance(w, ScheduledWeight) else w
        for name, w in parsed_weights.items()
    }
    if not any(number > 0 for number in numbers.values()):
        raise UserError(
            f"rewards.weights: no weight is above 0 (got {numbers}), so no response would be "
            f"rewarded; give one, such as {ACCURACY}: 1.0",
            key="rewards.weights",
            cause=Cause.EMPTY,
        )
    return parsed_weights


def _read_weight(path: str, name: str, value: Any) -> float | ScheduledWeight:
    if name != ACCURACY:
        try:
            resolve_reward(name)
        except UserError as error:
            explanation = f"{ACCURACY!r} is the prompt's own kind"
            suggestion = did_you_mean(name, [ACCURACY]) or ";"
            message = f"{path}: {error}{suggestion} {explanation}"
            raise UserError(message, key=path, cause=error.cause) from None
    if isinstance(value, ScheduledWeight):
        value = vars(value)
    if not isinstance(value, Mapping):
        return _read_finite(path, value)
    keys = [field.name for field in fields(ScheduledWeight)]
    for key in value:
        if key not in keys:
            names = ", ".join(keys)
            raise UserError(
                f"{path}: unknown key {key}{did_you_mean(key, keys, '{}')} ({names})",
                key=f"{path}.{key}",
                cause=Cause.UNKNOWN,
            )
    if "weight" not in value:
        raise UserError(
            f"{path}: a schedule needs its weight: {{weight: 0.1, from_step: 100}}",
            key=f"{path}.weight",
            cause=Cause.MISSING,
        )
    last_step = value.get("to_step")
    weight = ScheduledWeight(
        _read_finite(f"{path}.weight", value["weight"]),
        _read_step(f"{path}.from_step", value.get("from_step", 1)),
        None if last_step is None else _read_step(f"{path}.to_step", last_step),
    )
    if weight.to_step is not None and weight.to_step < weight.from_step:
        raise UserError(
            f"{path}: to_step {weight.to_step} is before from_step {weight.from_step}, so it "
            "would never count",
            key=f"{path}.to_step",
            cause=Cause.CONFLICT,
        )
    return weight


def _read_step(path: str, value: Any) -> int:
    try:
        step = read_scalar(value, [int])
        if step < 1:
            raise ValueError(f"got {value!r}")
    except ValueError as error:
        raise UserError(
            f"{path}: must be a step, 1 or later: {error}", key=path, cause=Cause.OUT_OF_RANGE
        ) from None
    return step


def _read_finite(path: str, value: Any) -> float:
    try:
        number = read_scalar(value, [float])
        if not math.isfinite(number):
            raise ValueError(f"must be finite, got {value}")
    except ValueError as error:
        raise UserError(
            f"{path}: {error}; or a schedule: {{weight: 0.1, from_step: 100, to_step: 400}}",
            key=path,
            cause=Cause.MALFORMED,
        ) from None
    return float(number)


def weights_at(weights: Weights, step: int) -> dict[str, float]:
    """Return the terms that count at `step` with their weights; a weight of 0 is graded too."""
    scheduled_weights = {
        name: w if isinstance(w, ScheduledWeight) else ScheduledWeight(w)
        for name, w in weights.items()
    }
    return {name: w.weight for name, w in scheduled_weights.items() if w.counts_at(step)}


Options = Mapping[str, Mapping[str, Any]]
"""`rewards.options`."""
RUN_ARGUMENTS = ("num_tokens", "thought_opened", "question")
"""Arguments that a run gives for each sample; neither an option nor a prompt's field overrides
them."""


def read_options(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Check a recipe's `rewards.options`, reward → {name: value}, and return it.

    Options of a user's own reward are not checked: its module runs in worker processes only.

    Raises:
        UserError: an unknown reward, a value that is not a mapping, or an option that a registered
            reward does not have; it names the reward and the key.
    """
    for kind, values in options.items():
        path = f"rewards.options.{kind}"
        try:
            resolve_reward(kind)
        except UserError as error:
            raise UserError(f"{path}: {error}", key=path, cause=error.cause) from None
        if not isinstance(values, Mapping):
            raise UserError(
                f"{path}: must be a mapping of options, got {values!r}",
                key=path,
                cause=Cause.MALFORMED,
            )
        if kind in SERVED_REWARDS:
            from r1_grading.remote.remote_rewards import check_options

            check_options(kind, values)
        elif kind in GRADERS and (
            unknown_options := [v for v in values if v not in option_names(kind)]
        ):
            names = sorted(option_names(kind))
            hint = did_you_mean(unknown_options[0], names, "{}")
            hint = hint or f"; it has {', '.join(names) or 'none'}"
            raise UserError(
                f"{path}: unknown option {unknown_options[0]}{hint}",
                key=f"{path}.{unknown_options[0]}",
                cause=Cause.UNKNOWN,
            )
    return {kind: _read_numbers(kind, values) for kind, values in options.items()}


def _read_numbers(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a reward with numbers and truth values read.

    Only a registered reward's are read, whose defaults have these types."""
    parsed_options = dict(values)
    defaults = _default_options(kind) if kind in GRADERS else {}
    for name, value in values.items():
        number_type = type(defaults.get(name))
        if number_type in (bool, int, float):
            try:
                parsed_options[name] = read_scalar(value, [number_type])
            except ValueError as error:
                key = f"rewards.options.{kind}.{name}"
                raise UserError(f"{key}: {error}", key=key, cause=Cause.MALFORMED) from None
    return parsed_options


@functools.cache
def option_names(kind: str) -> frozenset[str]:
    """Return the keyword arguments of a registered reward that a recipe may set.

    This imports the reward; `math` and `logic` import large libraries (1 to 2 s)."""
    return frozenset(_default_options(kind))


@functools.cache
def _default_options(kind: str) -> dict[str, Any]:
    parameters = inspect.signature(find_function(GRADERS[kind])).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in RUN_ARGUMENTS
    }


def reward_arguments(
    kind: str,
    options: Mapping[str, Mapping[str, Any]],
    fields: Mapping[str, Any],
    run_arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the keyword arguments of reward `kind`.

    For rewards in worker processes the prompt's own `fields` override the options. For served
    rewards only the recipe selects the service and the key: a data set with a column "model"
    changes nothing, nor does one with a column "url", which could collect keys. Only if there are
    no options (`megatron-r1 score`) do the settings of a line count, except api_key_env.

    Args:
        kind: the reward's name.
        options: kind → the recipe's options.
        fields: the prompt's other columns.
        run_arguments: those of `RUN_ARGUMENTS` for the response; they override options and
            fields."""
    reward_options = options.get(kind, {})
    if kind in SERVED_REWARDS:
        from r1_grading.remote.remote_rewards import settings_names

        refused_names = settings_names(kind) if reward_options else {"api_key_env"}
        fields = {name: value for name, value in fields.items() if name not in refused_names}
        return {**fields, **reward_options, **run_arguments}
    if kind in RESPONSE_ONLY_REWARDS:
        names = option_names(kind)
        fields = {name: value for name, value in fields.items() if name in names}
    return {**reward_options, **fields, **run_arguments}


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
