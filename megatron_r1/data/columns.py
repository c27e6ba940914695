"""Finds the columns of a data file that are the question, its truth and the kind of reward."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1_grading.base.errors import shorten
from r1_grading.base.values import decode_literal
from r1_grading.rewards import REWARD_KINDS, WITHOUT_TRUTH, resolve_reward
from r1_grading.truths import guess_reward_kind, is_missing

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.data.chats import is_chat, read_question
from megatron_r1.data.rows import ABSENT_VALUE, as_mapping, lookup_column

QUESTION_NAMES = (
    "question",
    "problem",
    "prompt",
    "question_content",
    "problem_description",
    "query",
    "problem_statement",
    "instruction",
    "exercise",
    "quiz",
    "puzzle",
    "riddle",
    "input",
    "inputs",
    "task",
    "user_prompt",
    "user",
    "human",
    "text",
    "description",
    "content",
    "messages",
    "conversations",
)
CONTEXT_NAMES = ("context", "passage", "body", "article", "paragraph", "table")
"""Usual names of a text that a question is about: SQuAD's, DROP's, SVAMP's, TabMWP's."""
TRUTH_NAMES = (
    "truth",
    "answer",
    "ground_truth",
    "reward_model.ground_truth",
    "verification_info",
    "input_output",
    "tests",
    "test_cases",
    "test_list",
    "golden_answers",
    "final_answer",
    "expected_answer",
    "gt_answer",
    "final_ans",
    "correct_answer",
    "correct",
    "answerkey",
    "public_test_cases",
    "test",
    "solution",
    "target",
    "answers",
    "expected",
    "gold",
    "golden",
    "final_decision",
    "targets",
    "reference",
    "result",
    "label",
    "solution_text",
    "output",
)
"""Usual names, the likelier first."""
JOINED_COLUMNS = (
    ("public_tests", "private_tests", "generated_tests"),
    ("inputs", "outputs", "fn_name"),
    ("public_test_cases", "metadata"),
    ("test", "entry_point"),
)
"""Columns that are a truth together: CodeContests', APPS' tests as columns, LiveCodeBench's,
HumanEval's."""
ONE_MESSAGE = "a question is a text, or a conversation that ends with a message of the user"
MAX_NESTED_CHARS = 100_000
"""JSON text above this size is not searched for columns."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """The columns of a data file, `a.b` for the entry b of column a.

    Attributes:
        question: the column of the question.
        truth: None where the rows' own rewards need no truth.
        kind: the reward, None where the rows name it.
        reasons: why each column was chosen."""

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
    """Return the columns of `rows`, the file's first ones.

    Args:
        source: the file, for errors.
        rows: the file's first rows.
        question: the column of questions that the user names, if any.
        truth: the column of truths that the user names, if any.
        kind: the reward that the user names, if any.

    Raises:
        UserError: one is not found; the columns are named."""
    flat_rows = [_flatten_row(row) for row in rows]
    reasons = {}
    _require_columns(source, flat_rows, {"question": question, "truth": truth})
    if question is None:
        question, reasons["question"] = _find_column(
            source, QUESTION_NAMES, flat_rows, _is_question, truth
        )
    if question is None:
        raise _no_question(source, flat_rows)
    if "question" in reasons and (context := _context_column(flat_rows, question)):
        question, reasons["question"] = f"{context}+{question}", "with the text that it is about"
    kinds = _kinds_of_rows(flat_rows) if kind is None else set()
    needs_truth = not kinds or not kinds.issubset(WITHOUT_TRUTH)
    if truth is None and needs_truth:
        truth = _joined_columns(flat_rows)
        reasons["truth"] = "by their names"
    if truth is None and needs_truth:
        question_column = question.rpartition("+")[2]
        truth, reasons["truth"] = _find_column(
            source, TRUTH_NAMES, flat_rows, _is_truth, question_column
        )
    if truth is None and needs_truth:
        raise UserError(
            f"{source}: no column looks like the answer to {question!r}; name it: --truth COLUMN. "
            f"{_list_columns(flat_rows)}",
            key="--truth",
            cause=Cause.MISSING,
        )
    if kind is not None:
        resolve_reward(kind)
    elif not kinds and truth is not None:
        kind, reasons["kind"] = _guess_kind(truth, flat_rows)
    return Columns(question, truth, kind, reasons)


def _require_columns(source: str, rows: Sequence[Row], options: Mapping[str, str | None]) -> None:
    """Raise UserError for a column that the user names and the rows lack."""
    for name, column in options.items():
        if column is not None and column not in rows[0]:
            suggestion = did_you_mean(column, rows[0], "{}") or "."
            raise UserError(
                f"--{name} {column}: {source} has no such column{suggestion} {_list_columns(rows)}",
                key=f"--{name}",
                cause=Cause.NOT_FOUND,
            )


def _no_question(source: str, rows: Sequence[Row]) -> UserError:
    """Return the error for rows in which no column looks like a question."""
    chat = next((name for name, value in rows[0].items() if is_chat(decode_literal(value))), None)
    if chat:
        return UserError(
            f"{source}: {chat!r} has chats; {ONE_MESSAGE}. {_list_columns(rows)}",
            key="--question",
            cause=Cause.UNSUPPORTED,
        )
    return UserError(
        f"{source}: no column looks like the question; name it: --question COLUMN. "
        f"{_list_columns(rows)}",
        key="--question",
        cause=Cause.MISSING,
    )


def columns_by_name(
    rows: Sequence[Row], needs_truth: bool, mapped: Collection[str] = ()
) -> dict[str, str]:
    """Return our name → the file's column for a question and a truth that `rows`, the file's first
    ones, have under usual names only. What is not found is left out.

    Args:
        rows: the file's first ones.
        needs_truth: whether a truth is looked for, too.
        mapped: our names of the columns that the recipe maps.
    """
    flat_rows = [_flatten_row(row) for row in rows]
    columns: dict[str, str] = {}
    has_question = any("question" in row for row in rows)
    if not has_question and (name := _usual_column(QUESTION_NAMES, flat_rows, _is_question, None)):
        columns["question"] = name
    if needs_truth and not any("truth" in row for row in rows):
        question_column = columns.get("question", "question")
        if truth := _joined_columns(flat_rows) or _usual_column(
            TRUTH_NAMES, flat_rows, _is_truth, question_column
        ):
            columns["truth"] = truth
    question = columns.get("question", "question" if has_question else "")
    if "question" not in mapped and question and (context := _context_column(flat_rows, question)):
        columns["question"] = f"{context}+{question}"
    return columns


def _context_column(rows: Sequence[Row], question: str) -> str | None:
    """Return the column of a text that every question is about, and that is not part of it."""
    for name in dict.fromkeys(name for row in rows for name in row):
        if _normalize_name(name) in CONTEXT_NAMES and name != question and "." not in question:
            pairs = [(row.get(name), row.get(question)) for row in rows]
            if all(
                isinstance(about, str) and isinstance(text, str) and about not in text
                for about, text in pairs
            ):
                return name
    return None


def _usual_column(
    names: Sequence[str], rows: Sequence[Row], fits: Callable[[Any], bool], taken_column: str | None
) -> str | None:
    """Return the first of `names` that rows have as a column; one whose values are all none only
    where there is no other."""
    all_columns = dict.fromkeys(name for row in rows for name in row)
    empty_columns = [
        n for n in all_columns if n != taken_column and all(is_missing(row.get(n)) for row in rows)
    ]
    for columns in (
        _fitting_columns(rows, fits, taken_column),
        empty_columns if fits is _is_truth else [],
    ):
        by_name = {_normalize_name(column): column for column in reversed(columns)}
        if column_name := next((by_name[usual] for usual in names if usual in by_name), None):
            return column_name
    return None


def _fitting_columns(
    rows: Sequence[Row], fits: Callable[[Any], bool], taken_column: str | None
) -> list[str]:
    """Return the columns whose values fit, in at least one row, and are none in the others."""
    fitting_columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        present_values = [
            v for v in values if not (is_missing(v) if fits is _is_truth else v is None)
        ]
        is_system = fits is _is_question and "system" in _normalize_name(name)
        if name == taken_column or not present_values or is_system:
            continue
        if all(fits(value) and not _is_single_entry(value) for value in present_values):
            fitting_columns.append(name)
    return fitting_columns


def _joined_columns(rows: Sequence[Row]) -> str | None:
    """Return `a+b` for columns that are a truth together, if the rows have at least two of them."""
    for names in JOINED_COLUMNS:
        if (
            len(present_names := [name for name in names if any(row.get(name) for row in rows)])
            >= 2
        ):
            return "+".join(present_names)
    return None


def _flatten_row(row: Row) -> dict[str, Any]:
    """Return the row with the entries of its mappings as `column.entry`, at any depth."""
    entries: dict[str, Any] = {}
    for name, column in row.items():
        if isinstance(column, str) and len(column) > MAX_NESTED_CHARS:
            continue
        if (mapping := as_mapping(column)) is not None:
            entries |= {f"{name}.{key}": value for key, value in _flatten_row(mapping).items()}
    return {**row, **entries}


def _find_column(
    source: str,
    names: Sequence[str],
    rows: Sequence[Row],
    fits: Callable[[Any], bool],
    taken_column: str | None,
) -> tuple[str | None, str]:
    """Return (column, reason): by its name; else, of two columns, the one that is left, where
    questions are longer than truths.

    Raises:
        UserError: a column of a usual name has rows without a value."""
    fitting_columns = _fitting_columns(rows, fits, taken_column)
    for usual_name in names:
        for column in fitting_columns:
            if _normalize_name(column) == usual_name:
                return column, "by its name"
    fitting_columns = [name for name in fitting_columns if not _has_row_numbers(name, rows)]
    for usual_name in names:
        for column in fitting_columns:
            if usual_name in re.split("[_.]", _normalize_name(column)):
                return column, f"its name has {usual_name!r} in it"
    if blank_reason := _why_no_value(names, rows, fits):
        raise UserError(
            f"{source}: {blank_reason}",
            key="--question" if names is QUESTION_NAMES else "--truth",
            cause=Cause.EMPTY,
        )
    if taken_column is None and len(fitting_columns) == 2:
        longer_column = max(
            fitting_columns, key=lambda name: sum(len(str(row.get(name))) for row in rows)
        )
        return longer_column, "the longer of two columns"
    if len(fitting_columns) == 1:
        return fitting_columns[0], "the only column left that could be it"
    return None, ""


def _why_no_value(names: Sequence[str], rows: Sequence[Row], fits: Callable[[Any], bool]) -> str:
    """Return why a column with a usual name has no value: "row 6: 'answer' is 7; …", or ""."""
    for usual_name in names:
        for column in rows[0]:
            if _normalize_name(column) == usual_name:
                for number, row in enumerate(rows, start=1):
                    if not fits(value := row.get(column)):
                        shown_value = f"{column!r} is {shorten(repr(value))}"
                        remedy = ONE_MESSAGE if is_chat(value) else "give one, or remove the row"
                        return f"row {number}: {shown_value}; {remedy}"
    return ""


def _is_question(value: Any) -> bool:
    try:
        return read_question(value) is not None
    except ValueError:
        return False


def _is_single_entry(value: Any) -> bool:
    """Return whether a value is a mapping of one number or text, which is a column itself."""
    entries = list(value.values()) if isinstance(value, dict) else []
    return len(entries) == 1 and isinstance(entries[0], str | int | float)


def _is_truth(value: Any) -> bool:
    """Return whether a value may be a truth: a mapping or a list may be the tests of a program."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int | dict | list)


def _has_row_numbers(name: str, rows: Sequence[Row]) -> bool:
    """Return whether a column numbers the rows."""
    start = str(rows[0].get(name))
    if len(rows) < 3 or not start.isdigit():
        return False
    return all(str(row.get(name)) == str(int(start) + index) for index, row in enumerate(rows))


def _kinds_of_rows(rows: Sequence[Row]) -> set[str]:
    """Return the rewards that the rows' own column `kind` names; empty where it names none."""
    kinds = {row["kind"] for row in rows if isinstance(row.get("kind"), str)}
    try:
        return {kind for kind in kinds if resolve_reward(kind)}
    except UserError:
        return set()


def _guess_kind(truth: str, rows: Sequence[Row]) -> tuple[str | None, str]:
    if all(isinstance(row.get("entry"), dict) and "task" in row for row in rows):
        return "logic", "the rows are items of reasoning-gym (task, entry)"
    truths = [lookup_column({**row}, truth) for row in rows]
    kinds = {
        guess_reward_kind(value)
        for value in truths
        if value is not ABSENT_VALUE and not is_missing(value)
    }
    if len(kinds) > 1:
        return None, f"each row's own, by its {truth!r}: {', '.join(sorted(kinds))}"
    kind = next(iter(kinds), "math")
    return kind, REWARD_KINDS[kind].truth_meaning.format(truth)


def _normalize_name(name: str) -> str:
    return re.sub(r"[^\w.]+", "_", name.strip().casefold())


def _list_columns(rows: Sequence[Row]) -> str:
    """Return the columns with their first values, a line each."""
    lines = [f"  {name}: {shorten(value)}" for name, value in rows[0].items()]
    return "\n".join(["It has", *lines])
