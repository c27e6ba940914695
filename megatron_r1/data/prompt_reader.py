"""Rows of a data file, read as prompts: the question with what identifies it (its text, or its text
and its fields), its choices where they are columns of their own, and its truth."""

import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from r1_grading.base.errors import shorten
from r1_grading.base.values import decode_literal
from r1_grading.rewards import ENVIRONMENT, REGISTRY, WITHOUT_TRUTH, resolve
from r1_grading.truths import (
    CHECKS,
    COMPARED,
    check_truth,
    guess_reward_kind,
    is_missing,
    states_no_answer,
)

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.chats import Message, read_question, read_system_prompt
from megatron_r1.data.columns import columns_by_name
from megatron_r1.data.data_report import DataReport
from megatron_r1.data.row_filter import Conditions, RowFilter
from megatron_r1.data.rows import (
    ABSENT,
    CanonicalRow,
    describe_missing,
    lookup,
    read_canonical_rows,
    rename_columns,
    require_text,
)


@dataclass(frozen=True)
class Prompt:
    """A question.

    Attributes:
        id: hash of the question's text, for an environment of text and fields; the same in all
            runs.
        question: the text of the question, as the row has it.
        kind: the reward that grades its responses, by comparison with `truth`.
        truth: what the reward compares a response with, in JSON types; None where it needs none.
        fields: the reward's other arguments, in JSON types.
        location: where the question's row is, as "file:line", if it has one.
        messages_before: the messages of the chat before the question, such as the system's.
    """

    id: str
    question: str
    kind: str
    truth: Any
    fields: dict[str, Any] = field(default_factory=dict)
    location: str = field(default="", compare=False, repr=False)
    messages_before: list[Message] = field(default_factory=list)

    @property
    def data_source(self) -> str:
        """What the row says of its data source, or ""."""
        return data_source(self.fields)


SOURCE_FIELDS = ("data_source", "source", "dataset")
"""Fields of a row that name its data source, the first that is there."""


def data_source(fields: Mapping[str, Any]) -> str:
    """Return the data source that a row's fields name, or ""."""
    sources = (fields[name] for name in SOURCE_FIELDS if isinstance(fields.get(name), str))
    return next(sources, "")


class _ScriptMarks(dict[int, str]):
    """A table for str.translate that puts ^ before each superscript and _ before each subscript;
    entries are computed at their first use. NFKC alone would make `2³` and `23` equal."""

    def __missing__(self, code: int) -> str:
        kind = unicodedata.decomposition(chr(code)).partition(" ")[0]
        self[code] = {"<super>": "^", "<sub>": "_"}.get(kind, "") + chr(code)
        return self[code]


SCRIPTS = _ScriptMarks()


def make_prompt(question: str, kind: str, truth: Any, fields: dict[str, Any]) -> Prompt:
    """Return a prompt whose id is a hash of its normalized question.

    Args:
        question: the question's text.
        kind: the reward that grades it.
        truth: what the reward compares with.
        fields: the row's other columns."""
    return Prompt(question_digest(question).hex()[:16], question, kind, truth, fields)


def normalize_question(question: str, fold_case: bool = True) -> str:
    """Return the text that spellings of one question share: NFKC, folded case, single spaces.
    Superscripts and subscripts are kept apart from plain characters: `2³` becomes `2^3`."""
    normalized = unicodedata.normalize("NFKC", question.translate(SCRIPTS))
    return " ".join((normalized.casefold() if fold_case else normalized).split())


def is_heldout(question: str, fraction: float, salt: str = "") -> bool:
    """Return whether a question belongs to the held-out share, by its text alone.

    Args:
        question: the question's text.
        fraction: the share that is held out.
        salt: makes the share independent of the shares of other salts. Without a salt of its own, a
            reward model whose pairs have a policy's questions would find all of them on one side.
    """
    return int.from_bytes(question_digest(salt + question)[-8:], "big") < fraction * 2**64


def conversation_text(prompt: Prompt) -> str:
    """Return the text of the question and of the turns before it, but for a system's."""
    turns = [m["content"] for m in prompt.messages_before if m["role"] != "system"]
    return "\n".join([*turns, prompt.question])


def prompt_identity(prompt: Prompt, kind: str | None) -> str:
    """Return the text that identifies a prompt.

    Args:
        prompt: the question, with the turns before it and the fields of its row.
        kind: as in `load_prompts`."""
    question = conversation_text(prompt)
    if kind != ENVIRONMENT or not prompt.fields:
        return question
    text = json.dumps(prompt.fields, sort_keys=True, default=str)
    # As a hash, because `normalize_question` would make fields equal.
    return f"{question} {hashlib.sha256(text.encode()).hexdigest()}"


def question_digest(question: str) -> bytes:
    """Return the hash of the normalized question."""
    return hashlib.sha256(normalize_question(question).encode("utf-8", "replace")).digest()


CHOICE_NAMES = ("choices", "options", "endings")
CHOICE_COLUMNS = (
    ("A", "B", "C", "D", "E"),
    ("a", "b", "c", "d", "e"),
    ("opa", "opb", "opc", "opd"),
)
"""Choices that have a column each: CMMLU's, MedMCQA's."""
LETTERED_CHOICES = re.compile(r"(?:^|[\s,;|])\(?[A-Ea-e]\s{0,2}[).:]\s*")
"""What stands before each of the choices in a text: `a ) 400 , b ) 300`."""


def _require_shown(kind: str, question: str, truth: Any, fields: Mapping[str, Any]) -> None:
    """Raise ValueError where a truth is the number or letter of a choice (MMLU, ARC) that the
    question does not have: no response could name it for a reason.

    Args:
        kind: the reward's name.
        question: the question's text.
        truth: its truth.
        fields: the row's other columns."""
    for name, choices in _choices(fields) if kind in COMPARED else ():
        if not isinstance(choices, list) or len(choices) < 2 or not _is_place(truth, len(choices)):
            continue
        question_letters = _letters(question)
        if not all(_letters(str(choice)) in question_letters for choice in choices):
            raise ValueError(
                f"{truth!r} is one of the {len(choices)} choices in {name!r}, which the question "
                "does not have; write them into the question, or give the text of the right one"
            )


def _choices(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, choices) of what may be choices: a list of them, or another value."""
    for name in CHOICE_NAMES:
        choices = decode_literal(fields.get(name))
        if isinstance(choices, Mapping):  # ARC's, or letter → text
            choices = choices["text"] if "text" in choices else list(choices.values())
        elif isinstance(choices, str):
            choices = [part.strip(" ,;|") for part in LETTERED_CHOICES.split(choices)[1:]]
        yield name, choices
    for columns in CHOICE_COLUMNS:
        texts = [fields[name] for name in columns if fields.get(name) not in (None, "")]
        yield ", ".join(columns), texts


def _is_place(truth: Any, count: int) -> bool:
    """Return whether a truth is the number or the letter of one of `count` choices."""
    if isinstance(truth, int) and not isinstance(truth, bool):
        return 0 <= truth < count
    if not isinstance(truth, str) or len(mark := truth.strip(" ().").upper()) != 1:
        return False
    return mark.isdigit() or 0 <= ord(mark) - ord("A") < count


def _letters(text: str) -> str:
    return "".join(text.casefold().split())


RESERVED_FIELDS = ("response", "truth", "kind")
COLUMNS = "data.columns"
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
        no_truth: truths that are none.
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
        mapped = self.columns if self.kind is None or self.kind in REGISTRY else ("question",)
        report.columns = columns_by_name([row for _, row in first], needs_truth, mapped)
        for location, row in itertools.chain(first, rows):
            try:
                prompt = self._prompt(location, row, report)
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

    def _prompt(self, location: str, row: CanonicalRow, report: DataReport) -> Prompt | None:
        """Return the prompt of a row, None for one that is left out for want of a truth."""
        row = self._renamed(row, report.columns)
        before, question = parse_question(location, row)
        kind = row.get("kind") or self.kind or guess_reward_kind(row.get("truth"))
        if "truth" not in row and kind not in WITHOUT_TRUTH:
            fault = f"{location}: 'truth' {describe_missing(row, 'truth', COLUMNS)}"
            raise MissingTruth(fault, kind)
        try:
            resolve(kind)
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
                _require_shown(kind, question, truth, fields)
            except ValueError as error:
                raise UserError(
                    f"{location}: {name!r}: {shorten(error, 300)}; correct or remove the row, or "
                    "set data.bad_rows: leave_out",
                    key=name,
                    cause=Cause.MALFORMED,
                ) from None
        prompt = Prompt("", question, kind, truth, fields, location, before)
        return replace(prompt, id=question_digest(prompt_identity(prompt, self.kind)).hex()[:16])

    def _renamed(self, row: CanonicalRow, column_names: Mapping[str, str]) -> CanonicalRow:
        """Return the row with the columns that were found by their names. A reward of the user's
        own gets them under both names."""
        values = {ours: lookup(row, theirs) for ours, theirs in column_names.items()}
        if self.kind is None or self.kind in REGISTRY:
            present = {o: column_names[o] for o, value in values.items() if value is not ABSENT}
            row = rename_columns("", row, present)
        return row | {ours: None if v is ABSENT else v for ours, v in values.items()}


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
    before, question = chat or ([], require_text(location, row, "question", COLUMNS))
    if not before and (system := read_system_prompt(row)):
        before = [{"role": "system", "content": system}]
    return before, question
