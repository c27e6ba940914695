"""Rows of a data file, read as prompts: the question and its truth."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from r1_grading.base.errors import shorten
from r1_grading.rewards import GRADERS, WITHOUT_TRUTH, resolve_reward
from r1_grading.truths import (
    CHECKS,
    check_choice,
    check_truth,
    guess_reward_kind,
    is_missing,
    states_no_answer,
)

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.chats import Message, read_question, read_system_prompt
from megatron_r1.data.columns import columns_by_name
from megatron_r1.data.data_report import DataReport
from megatron_r1.data.prompt import Prompt, prompt_identity, question_digest
from megatron_r1.data.row_filter import Conditions, RowFilter
from megatron_r1.data.rows import (
    ABSENT_VALUE,
    CanonicalRow,
    describe_missing,
    lookup_column,
    read_canonical_rows,
    rename_columns,
    require_text,
)

RESERVED_FIELDS = ("response", "truth", "kind")
COLUMNS_KEY = "data.columns"
FIRST_ROWS = 100
"""Rows by which columns are found."""


class MissingTruth(UserError):
    """A row has no truth.

    Attributes:
        kind: the reward that would compare with it."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message, key="truth", cause=Cause.MISSING)
        self.kind = kind


@dataclass(frozen=True)
class RowReader:
    """How rows become prompts; the fields are arguments of `load_prompts`.

    Attributes:
        kind: the default reward.
        columns: our name → the file's.
        where: the conditions that rows must meet.
        no_truth: texts that stand for no truth.
        bad_rows: what becomes of rows whose question or truth cannot be used."""

    kind: str | None
    columns: Mapping[str, str]
    where: Conditions
    no_truth: Collection[str]
    bad_rows: Literal["refuse", "leave_out"]

    def prompts(self, path: str | Path, key: str, report: DataReport) -> Iterator[Prompt]:
        """Yield the prompts of a file or data set; `report` counts its rows.

        Args:
            path: the file or data set.
            key: the key of errors.
            report: counts the rows.

        Raises:
            UserError: a column is missing, or a row is malformed and `bad_rows` is refuse."""
        names = ("question", "truth", "kind")
        row_filter = RowFilter(self.where, report)
        rows = read_canonical_rows(path, self.columns, names, key, row_filter.keeps)
        first = list(itertools.islice(rows, FIRST_ROWS))
        needs_truth = self.kind not in WITHOUT_TRUTH
        mapped_names = self.columns if self.kind is None or self.kind in GRADERS else ("question",)
        report.columns = columns_by_name([row for _, row in first], needs_truth, mapped_names)
        for location, row in itertools.chain(first, rows):
            try:
                prompt = self._prompt_of_row(location, row, report)
            except UserError as error:
                # A missing column is a mistake in the recipe, not in the row.
                if self.bad_rows == "refuse" or error.cause is Cause.MISSING:
                    raise
                reason = str(error).removeprefix(f"{location}: ")
                report.skip_row(reason, location, error.key)
                continue
            if prompt is not None:
                yield prompt
        row_filter.finish()

    def _prompt_of_row(self, location: str, row: CanonicalRow, report: DataReport) -> Prompt | None:
        """Return the prompt of a row, None for one that is left out for want of a truth."""
        row = self._renamed_row(row, report.columns)
        messages_before, question = parse_question(location, row)
        kind = row.get("kind") or self.kind or guess_reward_kind(row.get("truth"))
        if "truth" not in row and kind not in WITHOUT_TRUTH:
            fault = f"{location}: 'truth' {describe_missing(row, 'truth', COLUMNS_KEY)}"
            raise MissingTruth(fault, kind)
        try:
            resolve_reward(kind)
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{location}: {error}", key="kind", cause=Cause.UNKNOWN) from error
        truth = row.get("truth")
        fields = {n: v for n, v in row.items() if n not in ("question", *RESERVED_FIELDS)}
        if kind in CHECKS:
            name = {**report.columns, **self.columns}.get("truth", "truth")
            if is_missing(truth, self.no_truth):
                words = "a solution without a marked answer" if _is_solution(truth) else repr(truth)
                report.skip_row(f"{name!r} is {words}, no truth", location, name)
                return None
            try:
                check_truth(kind, truth, fields)
                check_choice(kind, question, truth, fields)
            except ValueError as error:
                raise UserError(
                    f"{location}: {name!r}: {shorten(error, 300)}; correct or remove the row, or "
                    "set data.bad_rows: leave_out",
                    key=name,
                    cause=Cause.MALFORMED,
                ) from None
        prompt = Prompt("", question, kind, truth, fields, location, messages_before)
        return replace(prompt, id=question_digest(prompt_identity(prompt, self.kind)).hex()[:16])

    def _renamed_row(self, row: CanonicalRow, column_names: Mapping[str, str]) -> CanonicalRow:
        """Return the row with the columns that were found by their names. A reward of the user's
        own gets them under both names."""
        values = {name: lookup_column(row, column) for name, column in column_names.items()}
        if self.kind is None or self.kind in GRADERS:
            present_columns = {
                name: column_names[name]
                for name, value in values.items()
                if value is not ABSENT_VALUE
            }
            row = rename_columns("", row, present_columns)
        return row | {
            name: None if value is ABSENT_VALUE else value for name, value in values.items()
        }


def _is_solution(truth: Any) -> bool:
    return isinstance(truth, str) and states_no_answer(truth)


def parse_question(location: str, row: CanonicalRow) -> tuple[list[Message], str]:
    """Return the messages before the question, and the question.

    Args:
        location: "file:line", for errors.
        row: a row of the file.

    Raises:
        UserError: the question is missing, blank, or not a text or conversation that ends with a
            user's message.
    """
    value = row.get("question")
    if isinstance(value, dict) and all(isinstance(part, str) for part in value.values()):
        value = "\n\n".join(value.values())  # columns that are a question together
    try:
        chat = read_question(value)
    except ValueError as error:
        raise UserError(
            f"{location}: 'question': {error}", key="question", cause=Cause.MALFORMED
        ) from None
    if chat is None and isinstance(value, list) and value:
        raise UserError(
            f"{location}: 'question' is a conversation that does not end with a message of the "
            "user; responses are sampled to such a message. Examples to learn from are for sft",
            key="question",
            cause=Cause.MALFORMED,
        )
    if chat is None and "question" in row:
        raise UserError(
            f"{location}: 'question' must be a text that is not blank, or a chat, it is "
            f"{shorten(repr(value))}; correct or remove the row, or set data.bad_rows: leave_out",
            key="question",
            cause=Cause.MALFORMED,
        )
    messages_before, question = chat or ([], require_text(location, row, "question", COLUMNS_KEY))
    if not messages_before and (system := read_system_prompt(row)):
        messages_before = [{"role": "system", "content": system}]
    return messages_before, question
