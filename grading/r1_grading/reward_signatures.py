"""Calls reward functions of every signature that is accepted: this stack's, verl's and TRL's.

`adapt_signature` recognizes a function by the names of its parameters and returns one called as
`grade(response, truth, **fields) -> Grade`. A function may be `async def`."""

import asyncio
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any, NamedTuple

from r1_grading.base.errors import Cause, UserError, shorten
from r1_grading.base.user_code import find_function
from r1_grading.reading.tags_and_boxes import without_special_tokens
from r1_grading.rewards import GRADERS, SERVED_REWARDS, FiniteGrade, Grade, resolve_reward

GradeFunction = Callable[..., Grade]
OWN_SIGNATURE = "(response, truth, **entry) -> Grade"
VERL_NAMES = frozenset({"solution_str", "ground_truth"})
TRL_NAME = "completions"
FOREIGN_SIGNATURES = {
    "OpenRLHF": frozenset({"queries", "labels"}),
    "slime": frozenset({"args", "sample"}),
    "verifiers": frozenset({"completion", "answer"}),
}
"""Libraries whose reward functions are recognized in order to be refused: they get objects of
their library, or both texts in one."""
TRUTH_NAMES = ("answer", "ground_truth", "solution", "target", "truth")
"""Columns of TRL's data sets that hold the truth. Where the row has no column of the name, a
function gets the truth by it."""
NOT_COLUMNS = ("num_tokens", "thought_opened")
"""Facts about a response, which are no columns of TRL's data sets."""
FORMER_NAME = "opened"
"""What `thought_opened` was called: a function that still takes it would never get it."""
COMPLETION_FORMS = ("text", "messages")
"""The values of the option `completions` of a function of TRL's signature."""
POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
MAX_SHOWN_ENTRIES = 4
"""The most further entries of verl's mapping that a reason shows."""


def grade(kind: str, response: str, /, truth: Any = None, **fields: Any) -> Grade:
    """Return the grade of one response, computed in this process.

    `RewardPool.grade` does the same in a process that may hang, crash or run out of memory.

    Args:
        kind: a reward that needs no server, or "module:function".
        response: the text that the policy sampled.
        truth: what the reward compares with, in the form that its page describes; None for a reward
            that needs none.
        **fields: the prompt's other fields and the reward's options.

    Returns:
        The grade, with its reason.

    Raises:
        UserError: an unknown or a served kind.
        Exception: what the reward raises."""
    if kind in SERVED_REWARDS:
        raise UserError(
            f"the reward {kind!r} requests a served model: grade with a RewardPool",
            key="kind",
            cause=Cause.UNSUPPORTED,
        )
    target = resolve_reward(kind)
    return adapt_signature(find_function(target), target)(response, truth, **fields)


class MissingArguments(TypeError):
    """A function has parameters without a default that the row and the options do not give."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(f"it needs {', '.join(names)}")
        self.names = names


def adapt_signature(function: Callable[..., Any], target: str) -> GradeFunction:
    """Return `function` as one that is called as this stack's rewards are.

    - verl's (parameters `solution_str` and `ground_truth`) gets the response, the truth, the row's
      `data_source` (None without one) and `extra_info` (empty without one) by name. It returns a
      number, or a mapping with the number as "score".
    - TRL's (parameter `completions`) gets lists of one: `prompts`, `completions` and each column
      of the row. It returns a list of one number, or of None, which counts 0, as in TRL's sum.
      It gets messages instead of texts where its code reads their "content".
    - any other is called as it is.

    Args:
        function: the user's function.
        target: its "module:function", for errors.

    Raises:
        UserError: a signature in `FOREIGN_SIGNATURES`, or a parameter's former name."""
    parameters = _signature_parameters(function)
    names = parameters.keys()
    if names >= VERL_NAMES:
        return _VerlFunction(function, parameters)
    if TRL_NAME in names:
        return _TrlFunction(function, parameters)
    if FORMER_NAME in names:
        raise UserError(
            f"{target} takes {FORMER_NAME!r}, which is called 'thought_opened': rename the "
            "parameter",
            key=target,
            cause=Cause.UNSUPPORTED,
        )
    for library, parameter_names in FOREIGN_SIGNATURES.items():
        if names >= parameter_names:
            raise UserError(
                f"{target} has the signature of {library}'s reward functions "
                f"({', '.join(names)}), which is not accepted; write {OWN_SIGNATURE}, or verl's "
                "or TRL's "
                "(docs/rewards.md)",
                key=target,
                cause=Cause.UNSUPPORTED,
            )
    return _AwaitedFunction(function)


def _signature_parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C, without a signature
        return {}


class _AwaitedFunction:
    """Calls a function that may be a coroutine function; has its signature."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__wrapped__ = function  # for inspect.signature

    def __call__(self, /, *arguments: Any, **fields: Any) -> Any:
        result = self._function(*arguments, **fields)
        return _event_loop().run(_await_result(result)) if inspect.isawaitable(result) else result


class AdaptedFunction:
    """Calls a function of another library with those of the named arguments that it takes."""

    def __init__(self, function: Callable[..., Any], parameters: Mapping[str, Parameter]) -> None:
        self._call, self._function = _AwaitedFunction(function), function
        kinds = {name: parameter.kind for name, parameter in parameters.items()}
        self._takes_all = Parameter.VAR_KEYWORD in kinds.values()
        self._names = [name for name, kind in kinds.items() if kind not in VARIADIC]
        self._needed = [name for name in self._names if parameters[name].default is Parameter.empty]

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Call the function with those of `arguments` that it takes.

        Raises:
            MissingArguments: `arguments` lacks an argument without a default.
        """
        if missing_names := tuple(name for name in self._needed if name not in arguments):
            raise MissingArguments(missing_names)
        accepted_arguments = (
            arguments
            if self._takes_all
            else {n: v for n, v in arguments.items() if n in self._names}
        )
        return self._call(**accepted_arguments)


class _VerlFunction(AdaptedFunction):
    def __call__(self, response: str, truth: Any, /, **fields: Any) -> Grade:
        row = {"data_source": None, "extra_info": {}} | fields
        text = without_special_tokens(response)  # verl decodes without them
        result = self.call(row | {"solution_str": text, "ground_truth": truth})
        details: dict[str, Any] = {}
        if isinstance(result, Mapping):
            if "score" not in result:
                raise TypeError(f"it returned a mapping without 'score': {shorten(result)}")
            details = {name: value for name, value in result.items() if name != "score"}
            result = result["score"]
        descriptions = [
            f"{name} {shorten(value)}" for name, value in list(details.items())[:MAX_SHOWN_ENTRIES]
        ]
        return FiniteGrade(
            number := _to_float(result), ", ".join([f"score {number:g}", *descriptions])
        )


class _TrlFunction(AdaptedFunction):
    def __init__(self, function: Callable[..., Any], parameters: Mapping[str, Parameter]) -> None:
        super().__init__(function, parameters)
        self._reads_messages = _mentions_constant("content", function)

    def __call__(self, response: str, truth: Any, /, **fields: Any) -> Grade:
        form = fields.pop(TRL_NAME, COMPLETION_FORMS[self._reads_messages])
        if form not in COMPLETION_FORMS:
            raise ValueError(
                f"option {TRL_NAME} must be {' or '.join(COMPLETION_FORMS)}, got {form!r}"
            )
        text = without_special_tokens(response)
        texts = {"prompts": ("user", fields.get("question")), TRL_NAME: ("assistant", text)}
        row = dict.fromkeys(TRUTH_NAMES, truth) | fields
        columns = {name: [value] for name, value in row.items() if name not in NOT_COLUMNS}
        for name, (role, content) in texts.items():
            columns[name] = [content if form == "text" else [{"role": role, "content": content}]]
        try:
            result = self.call(columns)
        except (TypeError, AttributeError) as error:
            if isinstance(error, MissingArguments):
                raise
            other_form = COMPLETION_FORMS[form == COMPLETION_FORMS[0]]
            hint = f"it got completions as {form}; its option {TRL_NAME}: {other_form} changes that"
            raise TypeError(f"{error}; {hint}").with_traceback(error.__traceback__) from None
        rewards = result.tolist() if hasattr(result, "tolist") else result  # of numpy and torch
        if not isinstance(rewards, list | tuple) or len(rewards) != 1:
            raise TypeError(
                f"it must return a list with a reward for each of 1 completions, got "
                f"{shorten(repr(result))}"
            )
        if rewards[0] is None:
            return Grade(0.0, "None: it does not apply to this row")
        return FiniteGrade(number := _to_float(rewards[0]), f"reward {number:g}")


def _to_float(value: Any) -> float:
    """Return a number of Python, numpy or torch as a float."""
    if value is None or isinstance(value, str):
        raise TypeError(f"it must return a number, got {value!r}")
    return float(value)


def _mentions_constant(text: str, function: Callable[..., Any]) -> bool:
    """Return whether a function, or one of its module that it calls, has `text` as a constant."""
    start = inspect.unwrap(getattr(function, "func", function))
    if not inspect.isroutine(start):
        start = vars(type(start)).get("__call__")  # an object that is called
    codes = [getattr(start, "__code__", None)]
    names = getattr(start, "__globals__", {})
    checked_codes: set[types.CodeType] = set()
    while codes:
        code = codes.pop()
        if code is None or code in checked_codes:
            continue
        checked_codes.add(code)
        if text in code.co_consts:
            return True
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        codes += [getattr(names.get(name), "__code__", None) for name in code.co_names]
    return False


class CallFault(NamedTuple):
    """Why a reward cannot be called.

    Attributes:
        text: the argument that it lacks or refuses, and the remedy; "" for a call that fits the
            signature.
        missing: the names of the fields that it lacks."""

    text: str
    missing: tuple[str, ...] = ()


NO_FAULT = CallFault("")


def explain_failure(
    error: BaseException, function: GradeFunction, target: str, fields: Mapping[str, Any]
) -> CallFault:
    """Return what is wrong with a call function(response, truth, **fields) that raised.

    Args:
        error: what the call raised.
        function: the function that was called.
        target: its "module:function".
        fields: the keyword arguments of the call."""
    if isinstance(error, MissingArguments):
        return _missing_fields(_describe_kind(target), error.names)
    if not isinstance(error, TypeError) or isinstance(function, AdaptedFunction):
        return NO_FAULT
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C, without a signature
        return NO_FAULT
    kind = _describe_kind(target)
    signature = f"def {target.partition(':')[2]}(response, truth, *, …, **entry) -> Grade"
    kinds = {parameter.kind for parameter in parameters}
    positional = [parameter for parameter in parameters if parameter.kind in POSITIONAL]
    if len(positional) < 2 and Parameter.VAR_POSITIONAL not in kinds:
        return CallFault(
            f"reward {kind!r} must take a response and a truth: {signature}; or the "
            "parameters of verl's or TRL's (docs/rewards.md)"
        )
    keywords = [p for p in parameters if p not in positional[:2] and p.kind not in VARIADIC]
    missing_names = tuple(p.name for p in keywords if p.default is p.empty and p.name not in fields)
    if missing_names:
        return _missing_fields(kind, missing_names)
    refused_names = sorted(fields.keys() - {parameter.name for parameter in keywords})
    if refused_names and Parameter.VAR_KEYWORD not in kinds:
        return CallFault(
            f"reward {kind!r} is called with {refused_names[0]!r} and does not take it: end its "
            f"parameters with **entry, {signature}"
        )
    return NO_FAULT


def _missing_fields(kind: str, names: tuple[str, ...]) -> CallFault:
    """Return the fault of a reward that needs fields which the row does not have."""
    return CallFault(
        f"reward {kind!r} needs {', '.join(names)}: give it in the row, or for all rows as "
        f"rewards.options.{kind}.{names[0]}",
        names,
    )


def _describe_kind(target: str) -> str:
    return next((name for name, path in GRADERS.items() if path == target), target)


async def _await_result(awaitable: Any) -> Any:
    return await awaitable


@functools.cache
def _event_loop() -> asyncio.Runner:
    """Return the worker's event loop: sessions that a reward opens in it outlive one call."""
    return asyncio.Runner()
