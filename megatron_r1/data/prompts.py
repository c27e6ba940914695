"""Prompts: questions with their truths, split into train and held-out.

A *prompt* is one item to respond to. Its *question* is the text that a data set has for it; a
template (`templates`) makes of it the text, and then the token ids, that the policy continues.

A question is held out or not by the hash of its text alone. So the two sides stay disjoint for any
seed, size, order and file: a base model trained on one set of questions has not seen the held-out
questions of another. Rows for an environment may differ in their fields only; there the hash is
that of text and fields."""

import hashlib
import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_r1.data.chats import Message, read_question
from megatron_r1.data.columns import columns_by_name
from megatron_r1.data.records import (
    ABSENT,
    Record,
    entry,
    missing,
    read_records,
    rename,
    require_text,
)
from megatron_r1.data.report import DataReport
from megatron_r1.data.tasks import generate_items
from megatron_r1.data.where import Conditions, RowFilter
from megatron_r1.errors import Cause, UserError
from megatron_r1.rewards import ENVIRONMENT, REGISTRY, WITHOUT_TRUTH, resolve
from megatron_r1.rewards.base import shorten
from megatron_r1.rewards.truths import (
    CHECKS,
    NO_TRUTH,
    check_truth,
    is_none,
    is_unanswered,
    kind_of,
)

RESERVED_FIELDS = ("response", "truth", "kind")
COLUMNS = "data.columns"
FIRST_ROWS = 100
"""Rows by which columns are found."""


@dataclass(frozen=True)
class Prompt:
    """A question. id: hash of the question's text, for an environment of text and fields; the same
    in all runs. kind: the reward that grades its responses, by comparison with `truth`. fields: the
    reward's other arguments, in JSON types. before: the messages of the chat before the question,
    such as the system's. location: where the question's row is, as "file:line", if it has one."""

    id: str
    question: str
    kind: str
    truth: Any
    fields: dict[str, Any] = field(default_factory=dict)
    location: str = field(default="", compare=False, repr=False)
    before: list[Message] = field(default_factory=list)


class MissingTruth(UserError):
    """A row has no truth. kind: the reward that would compare with it."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message, key="truth", cause=Cause.MISSING)
        self.kind = kind


@dataclass(frozen=True)
class PromptSplit:
    """Train and held-out prompts; no normalized question occurs twice in the two lists.
    contradictions: the prompt that is kept and a later one of the same question and another truth.
    reports: what became of the rows, one for each source that is a file."""

    train: list[Prompt]
    heldout: list[Prompt]
    contradictions: list[tuple[Prompt, Prompt]] = field(default_factory=list)
    reports: list[DataReport] = field(default_factory=list)


class _ScriptMarks(dict[int, str]):
    """A table for str.translate that puts ^ before each superscript and _ before each subscript;
    entries are computed at their first use. NFKC alone would make `2³` and `23` equal."""

    def __missing__(self, code: int) -> str:
        kind = unicodedata.decomposition(chr(code)).partition(" ")[0]
        self[code] = {"<super>": "^", "<sub>": "_"}.get(kind, "") + chr(code)
        return self[code]


SCRIPTS = _ScriptMarks()


def load_prompts(
    *,
    path: str | Path | None = None,
    heldout_path: str | Path | None = None,
    task: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
    num_train: int | None = None,
    num_heldout: int | None = None,
    heldout_fraction: float = 0.1,
    where: Conditions | None = None,
    no_truth: Collection[str] = NO_TRUTH,
    bad_rows: Literal["refuse", "leave_out"] = "refuse",
) -> PromptSplit:
    """Read prompts from a file, or generate them with a reasoning-gym task.

    path: of `records.read_records`, rows with `question`, `truth` and optionally `kind` (default:
        `kind`, else what the truth shows: `rewards.truths.kind_of`); other columns go to the
        reward. A question or truth that no row has by that name is found by its usual names
        (`columns`). A question may be a chat that ends with the user's message.
    columns: our name → the file's.
    where: rows are kept that meet these conditions (`where`).
    no_truth: truths that are none; their rows are left out.
    bad_rows: what becomes of rows whose question or truth cannot be used.
    task: a reasoning-gym dataset, generated with `parameters` and `seed`. Without `kind` (or with
        "logic") its own scorer grades; any other kind gets the item's answer as its truth.
    heldout_path: a file that is held out whole, its questions dropped from train; without it, the
        share `heldout_fraction` of all possible questions is held out.
    num_train, num_heldout: how many of each, the first ones; None: all (a task needs the numbers).
    Raises UserError for a bad row (with file and line), an unknown task, parameter or kind, and
    where questions are too few."""
    if path is None and task is None:
        raise UserError(
            "data.path is missing: give a file of questions, or data.task",
            key="data.path",
            cause=Cause.MISSING,
        )
    if path is not None and task is not None:
        raise UserError(
            f"data.path {path} and data.task {task} are both set; leave one out",
            key="data.task",
            cause=Cause.CONFLICT,
        )
    if not 0.0 <= heldout_fraction < 1.0:
        raise UserError(
            f"data.heldout_fraction={heldout_fraction} must be at least 0 and below 1",
            key="data.heldout_fraction",
            cause=Cause.OUT_OF_RANGE,
        )
    if num_heldout and not heldout_fraction and heldout_path is None:
        raise UserError(
            f"data.num_heldout={num_heldout} needs heldout_fraction > 0 or a heldout_path",
            key="data.num_heldout",
            cause=Cause.CONFLICT,
        )
    if kind is not None:
        resolve(kind)
    reading = RowReading(kind, columns or {}, where or {}, no_truth, bad_rows)
    reports = []
    heldout = []
    if heldout_path is not None:
        reports.append(DataReport(str(heldout_path)))
        heldout = list(reading.prompts(heldout_path, "data.heldout_path", reports[-1]))
    if path is not None:
        reports.append(DataReport(str(path)))
        prompts = reading.prompts(path, "data.path", reports[-1])
    else:
        assert task is not None
        if num_train is None or (num_heldout is None and heldout_path is None):
            raise UserError(
                f"data.task={task} generates any number of questions: set data.num_train and "
                "data.num_heldout",
                key="data.num_train",
                cause=Cause.MISSING,
            )
        # After this many items without enough new questions, the task is considered exhausted.
        num_attempts = 1_000 + 50 * (num_train + (num_heldout or 0))
        prompts = _from_task(task, dict(parameters or {}), seed, num_attempts, kind)
    fraction = heldout_fraction if heldout_path is None else 0.0
    split = _split(prompts, heldout, fraction, num_train, num_heldout, kind, reports)
    _require_any(split, heldout)
    _require("train", split.train, num_train, "num_train", task or path)
    _require("held-out", split.heldout, num_heldout, "num_heldout", heldout_path or task or path)
    return split


def make_prompt(question: str, kind: str, truth: Any, fields: dict[str, Any]) -> Prompt:
    """Return a prompt whose id is a hash of its normalized question."""
    return Prompt(_digest(question).hex()[:16], question, kind, truth, fields)


def normalize(question: str, fold_case: bool = True) -> str:
    """Return the text that spellings of one question share: NFKC, folded case, single spaces.
    Superscripts and subscripts are kept apart from plain characters: `2³` becomes `2^3`."""
    plain = unicodedata.normalize("NFKC", question.translate(SCRIPTS))
    return " ".join((plain.casefold() if fold_case else plain).split())


def is_heldout(question: str, fraction: float, salt: str = "") -> bool:
    """Return whether a question belongs to the held-out share, by its text alone. salt: makes the
    share independent of the shares of other salts. Without a salt of its own, a reward model whose
    pairs have a policy's questions would find all of them on one side."""
    return int.from_bytes(_digest(salt + question)[-8:], "big") < fraction * 2**64


def _split(
    prompts: Iterable[Prompt],
    heldout: list[Prompt],
    fraction: float,
    num_train: int | None,
    num_heldout: int | None,
    kind: str | None,
    reports: list[DataReport],
) -> PromptSplit:
    report = reports[-1] if reports else DataReport()
    limits = {False: num_train, True: num_heldout if fraction else 0}
    contradictions: list[tuple[Prompt, Prompt]] = []
    sides: dict[bool, dict[str, Prompt]] = {False: {}, True: {p.id: p for p in heldout}}
    given = {*sides[True]}

    def is_full(side: bool) -> bool:
        limit = limits[side]
        return limit is not None and len(sides[side]) >= limit

    for prompt in prompts:
        if is_full(False) and is_full(True):
            report.is_complete = False
            break
        known = sides[False].get(prompt.id) or sides[True].get(prompt.id)
        # Not where the other is of the held-out file: too near to be trained on.
        if known is not None and prompt.id not in given and _differ_in_case(known, prompt):
            # On the side of the other, by the same hash; but a question of its own.
            spelled = f"spelled {_spelling(prompt)}".encode("utf-8", "replace")
            prompt = replace(prompt, id=hashlib.sha256(spelled).hexdigest()[:16])
            known = sides[False].get(prompt.id) or sides[True].get(prompt.id)
        if known is not None and known.truth != prompt.truth:
            contradictions.append((known, prompt))
            report.leave_out("the question has another truth before", prompt.location, "truth")
        elif known is not None:
            report.num_duplicates += 1
        if known is not None:
            continue
        side = is_heldout(_identity(prompt, kind), fraction)
        if not is_full(side):
            sides[side][prompt.id] = prompt
    train, rest = list(sides[False].values()), list(sides[True].values())
    kinds = Counter(prompt.kind for prompt in train + rest)
    if kind is None and len(kinds) > 1:
        report.kinds = dict(kinds.most_common())
    return PromptSplit(train, rest[:num_heldout], contradictions, reports)


def _differ_in_case(one: Prompt, other: Prompt) -> bool:
    """Return whether two questions of the same hash are different texts: "find A" and "find a"."""
    return one.question != other.question and _spelling(one) != _spelling(other)


def _spelling(prompt: Prompt) -> str:
    return normalize(_asked(prompt), fold_case=False)


def _require_any(split: PromptSplit, heldout: list[Prompt]) -> None:
    """Raise UserError where every row of a file is left out, with the reasons."""
    for report in split.reports:
        count = sum(rows.count for rows in report.left_out.values())
        if count and count == report.num_read:
            reasons = "; ".join(
                f"{rows.count:,}: {reason} (first: {rows.first})"
                for reason, rows in report.left_out.items()
            )
            raise UserError(
                f"{report.source}: all {count:,} rows are left out: {reasons}. Correct data.where, "
                "or data.columns",
                key=next(iter(report.left_out.values())).key,
                cause=Cause.EMPTY,
            )


def _require(side: str, prompts: list[Prompt], count: int | None, key: str, source: object) -> None:
    if not prompts and count is None and side == "train":
        raise UserError(
            f"{source}: it holds no questions to train on; give more, or lower "
            "data.heldout_fraction",
            key="data.path",
            cause=Cause.EMPTY,
        )
    if len(prompts) < (count or 0):
        raise UserError(
            f"{source}: only {len(prompts)} distinct {side} questions, {count} wanted; lower "
            f"data.{key}, change data.heldout_fraction, or make the questions more varied "
            "(data.parameters of a task)",
            key=f"data.{key}",
            cause=Cause.TOO_LARGE,
        )


@dataclass(frozen=True)
class RowReading:
    """How rows become prompts; the fields are arguments of `load_prompts`."""

    kind: str | None
    columns: Mapping[str, str]
    where: Conditions
    no_truth: Collection[str]
    bad_rows: Literal["refuse", "leave_out"]

    def prompts(self, path: str | Path, role: str, report: DataReport) -> Iterator[Prompt]:
        """Yield the prompts of a file or data set; `report` counts its rows. Raises UserError."""
        names = ("question", "truth", "kind")
        row_filter = RowFilter(self.where, report)
        rows = read_records(path, self.columns, names, role, row_filter.keeps)
        first = list(itertools.islice(rows, FIRST_ROWS))
        needs_truth = self.kind not in WITHOUT_TRUTH
        report.columns = columns_by_name([row for _, row in first], needs_truth)
        for location, row in itertools.chain(first, rows):
            try:
                prompt = self._prompt(location, row, report)
            except UserError as error:
                # A missing column is a mistake in the recipe, not in the row.
                if self.bad_rows == "refuse" or error.cause is Cause.MISSING:
                    raise
                reason = str(error).removeprefix(f"{location}: ")
                report.leave_out(reason, location, error.key)
                continue
            if prompt is not None:
                yield prompt
        row_filter.finish()

    def _prompt(self, location: str, row: Record, report: DataReport) -> Prompt | None:
        """Return the prompt of a row, None for one that is left out for want of a truth."""
        row = self._renamed(row, report.columns)
        before, question = question_of(location, row)
        kind = row.get("kind") or self.kind or kind_of(row.get("truth"))
        if "truth" not in row and kind not in WITHOUT_TRUTH:
            fault = f"{location}: 'truth' {missing(row, 'truth', COLUMNS)}"
            raise MissingTruth(fault, kind)
        try:
            resolve(kind)
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{location}: {error}", key="kind", cause=Cause.UNKNOWN) from error
        truth = row.get("truth")
        fields = {n: v for n, v in row.items() if n not in ("question", *RESERVED_FIELDS)}
        if kind in CHECKS:
            name = {**report.columns, **self.columns}.get("truth", "truth")
            if is_none(truth, self.no_truth):
                shown = "a solution without a marked answer" if _is_solution(truth) else repr(truth)
                report.leave_out(f"{name!r} is {shown}, no truth", location, name)
                return None
            try:
                check_truth(kind, truth, fields)
            except ValueError as error:
                raise UserError(
                    f"{location}: {name!r}: {shorten(error, 300)}; correct or remove the row, or "
                    "set data.bad_rows: leave_out",
                    key=name,
                    cause=Cause.MALFORMED,
                ) from None
        prompt = Prompt("", question, kind, truth, fields, location, before)
        return replace(prompt, id=_digest(_identity(prompt, self.kind)).hex()[:16])

    def _renamed(self, row: Record, found: Mapping[str, str]) -> Record:
        """Return the row with the columns that were found by their names. A reward of the user's
        own gets them under both names."""
        values = {ours: entry(row, theirs) for ours, theirs in found.items()}
        if self.kind is None or self.kind in REGISTRY:
            present = {o: found[o] for o, value in values.items() if value is not ABSENT}
            row = rename("", row, present)
        return row | {ours: None if v is ABSENT else v for ours, v in values.items()}


def _is_solution(truth: Any) -> bool:
    return isinstance(truth, str) and is_unanswered(truth)


def question_of(location: str, row: Record) -> tuple[list[Message], str]:
    """Return the messages before the question, and the question. Raises UserError."""
    value = row.get("question")
    try:
        found = read_question(value)
    except ValueError as error:
        raise UserError(
            f"{location}: 'question': {error}", key="question", cause=Cause.MALFORMED
        ) from None
    if found is None and isinstance(value, list) and value:
        raise UserError(
            f"{location}: 'question' is a conversation that does not end with a message of the "
            "user; responses are sampled to such a message. Examples to learn from are for sft",
            key="question",
            cause=Cause.MALFORMED,
        )
    if found is None and "question" in row:
        raise UserError(
            f"{location}: 'question' must be a text that is not blank, or a chat, it is "
            f"{shorten(repr(value))}; correct or remove the row, or set data.bad_rows: leave_out",
            key="question",
            cause=Cause.MALFORMED,
        )
    return found or ([], require_text(location, row, "question", COLUMNS))


def _from_task(
    task: str, parameters: dict[str, Any], seed: int, num_items: int, kind: str | None
) -> Iterator[Prompt]:
    for item in generate_items(task, parameters, seed, num_items):
        own = {"task": task, "parameters": parameters, "entry": item}
        fields = own if kind in (None, "logic") else {}
        yield make_prompt(item["question"], kind or "logic", item["answer"], fields)


def _asked(prompt: Prompt) -> str:
    """Return the text of the question and of the turns before it, but for a system's."""
    turns = [m["content"] for m in prompt.before if m["role"] != "system"]
    return "\n".join([*turns, prompt.question])


def _identity(prompt: Prompt, kind: str | None) -> str:
    """Return the text that identifies a prompt. kind: as in `load_prompts`."""
    question = _asked(prompt)
    if kind != ENVIRONMENT or not prompt.fields:
        return question
    text = json.dumps(prompt.fields, sort_keys=True, default=str)
    # As a hash, because `normalize` would make fields equal.
    return f"{question} {hashlib.sha256(text.encode()).hexdigest()}"


def _digest(question: str) -> bytes:
    return hashlib.sha256(normalize(question).encode("utf-8", "replace")).digest()
