"""Guesses which columns of a data file are the question, its truth and the kind of reward."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.errors import Cause, UserError, did_you_mean
from megatron_r1.rewards import WITHOUT_TRUTH, resolve
from megatron_r1.rewards.base import shorten
from megatron_r1.rewards.code.problem import parse_problem

QUESTION_NAMES = (
    *("question", "problem", "prompt", "query", "instruction", "exercise", "task", "input"),
    *("text", "content"),
)
TRUTH_NAMES = (
    *("truth", "answer", "ground_truth", "final_answer", "expected_answer", "solution", "target"),
    *("expected", "gold", "reference", "result", "label", "tests", "test_cases", "output"),
)
"""Usual names, the likelier first."""
ONE_MESSAGE = (
    "a question is a text, or a chat of one user message: write that message and the answer into "
    "columns of their own, and what a system says into data.template"
)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """The columns of a data file, `a.b` for the entry b of column a. truth: None where the rows'
    own rewards need no truth. kind: the reward, None where the rows name it. reasons: why each
    column was chosen."""

    question: str
    truth: str | None
    kind: str | None
    reasons: dict[str, str]


def guess_columns(
    source: str,
    rows: Sequence[Row],
    question: str | None = None,
    truth: str | None = None,
    kind: str | None = None,
) -> Columns:
    """Return the columns of `rows`, the file's first ones. question, truth, kind: those that the
    user names. Raises UserError naming the columns where one is not found."""
    flat = [_flat(row) for row in rows]
    reasons = {}
    for name, given in (("question", question), ("truth", truth)):
        if given is not None and given not in flat[0]:
            near = did_you_mean(given, flat[0], "{}")
            raise UserError(
                f"--{name} {given}: {source} has no such column{near}{_listed(flat)}",
                key=f"--{name}",
                cause=Cause.NOT_FOUND,
            )
    if question is None:
        question, reasons["question"] = _find(source, QUESTION_NAMES, flat, _is_question, truth)
    if question is None:
        if chat := next((name for name, value in flat[0].items() if _is_chat(value)), None):
            raise UserError(
                f"{source}: {chat!r} has chats; {ONE_MESSAGE}{_listed(flat)}",
                key="--question",
                cause=Cause.UNSUPPORTED,
            )
        raise UserError(
            f"{source}: no column looks like the question; name it: --question COLUMN"
            f"{_listed(flat)}",
            key="--question",
            cause=Cause.MISSING,
        )
    kinds = _kinds_of_rows(flat) if kind is None else set()
    needs_truth = not kinds or not kinds.issubset(WITHOUT_TRUTH)
    if truth is None and needs_truth:
        truth, reasons["truth"] = _find(source, TRUTH_NAMES, flat, _is_truth, question)
    if truth is None and needs_truth:
        raise UserError(
            f"{source}: no column looks like the answer to {question!r}; name it: --truth COLUMN"
            f"{_listed(flat)}",
            key="--truth",
            cause=Cause.MISSING,
        )
    if kind is not None:
        resolve(kind)
    elif not kinds and truth is not None:
        kind, reasons["kind"] = _guess_kind(truth, flat)
    return Columns(question, truth, kind, reasons)


def _flat(row: Row) -> dict[str, Any]:
    """Return the row with the entries of its mappings as `column.entry`, at any depth."""
    entries = {
        f"{name}.{key}": value
        for name, column in row.items()
        if isinstance(column, dict)
        for key, value in _flat(column).items()
    }
    return {**row, **entries}


def _find(
    source: str,
    names: Sequence[str],
    rows: Sequence[Row],
    fits: Callable[[Any], bool],
    other: str | None,
) -> tuple[str | None, str]:
    """Return (column, reason): by its name; else, of two columns, the one that is left, where
    questions are longer than truths. other: the column that is already taken. Raises UserError
    where one of a usual name has rows without a value."""
    fitting = [
        name
        for name in rows[0]
        if name != other
        and all(fits(row.get(name)) and not _wraps(row.get(name)) for row in rows)
        and not _counts(name, rows)
    ]
    for usual in names:
        for column in fitting:
            if _plain(column) == usual:
                return column, "by its name"
    for usual in names:
        for column in fitting:
            if usual in re.split("[_.]", _plain(column)):
                return column, f"its name has {usual!r} in it"
    if blank := _blank(names, rows, fits):
        raise UserError(
            f"{source}: {blank}",
            key="--question" if names is QUESTION_NAMES else "--truth",
            cause=Cause.EMPTY,
        )
    if other is None and len(fitting) == 2:
        longer = max(fitting, key=lambda name: sum(len(str(row.get(name))) for row in rows))
        return longer, "the longer of two columns"
    if len(fitting) == 1:
        return fitting[0], "the only column left that could be it"
    return None, ""


def _blank(names: Sequence[str], rows: Sequence[Row], fits: Callable[[Any], bool]) -> str:
    """Return why a column with a usual name is none: "row 6: 'answer' is None; …", or ""."""
    for usual in names:
        for column in rows[0]:
            if _plain(column) == usual:
                for number, row in enumerate(rows, start=1):
                    if not fits(value := row.get(column)):
                        what = f"{column!r} is {shorten(repr(value))}"
                        remedy = ONE_MESSAGE if _is_chat(value) else "give one, or remove the row"
                        return f"row {number}: {what}; {remedy}"
    return ""


def _is_question(value: Any) -> bool:
    match value:
        case str():
            return bool(value.strip())
        case [{"role": "user", "content": str()}]:
            return True
    return False


def _is_chat(value: Any) -> bool:
    """Return whether a value is a list of messages."""
    return isinstance(value, list) and any(isinstance(m, dict) and "role" in m for m in value)


def _wraps(value: Any) -> bool:
    """Return whether a value is a mapping of one number or text, which is a column itself."""
    entries = list(value.values()) if isinstance(value, dict) else []
    return len(entries) == 1 and isinstance(entries[0], str | int | float)


def _is_truth(value: Any) -> bool:
    """Return whether a value may be a truth: a mapping or a list may be the tests of a program."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int | dict | list) and not isinstance(value, bool)


def _counts(name: str, rows: Sequence[Row]) -> bool:
    """Return whether a column numbers the rows."""
    start = str(rows[0].get(name))
    if len(rows) < 3 or not start.isdigit():
        return False
    return all(str(row.get(name)) == str(int(start) + at) for at, row in enumerate(rows))


def _kinds_of_rows(rows: Sequence[Row]) -> set[str]:
    """Return the rewards that the rows' own column `kind` names; empty where it names none."""
    kinds = {row["kind"] for row in rows if isinstance(row.get("kind"), str)}
    try:
        return {kind for kind in kinds if resolve(kind)}
    except UserError:
        return set()


def _guess_kind(truth: str, rows: Sequence[Row]) -> tuple[str, str]:
    if all(isinstance(row.get("entry"), dict) and "task" in row for row in rows):
        return "logic", "the rows are items of reasoning-gym (task, entry)"
    try:
        for row in rows:
            parse_problem(row[truth], "python")
    except (ValueError, TypeError, AttributeError, KeyError):
        return "math", f"{truth!r} is compared as a number, a formula or words"
    return "code", f"{truth!r} holds tests of a program"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.]+", "_", name.strip().casefold())


def _listed(rows: Sequence[Row]) -> str:
    """Return the columns with their first values, a line each."""
    lines = [f"  {name}: {shorten(value)}" for name, value in rows[0].items()]
    return "\n".join([". It has", *lines])
