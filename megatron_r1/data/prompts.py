"""Prompts: questions with their truths, split into train and held-out.

A *prompt* is one item to respond to. Its *question* is the text that a data set has for it; a
template (`templates`) makes of it the text, and then the token ids, that the policy continues.

A question is held out or not by the hash of its text alone. So the two sides stay disjoint for any
seed, size, order and file: a base model trained on one set of questions has not seen the held-out
questions of another. Rows for an environment may differ in their fields only; there the hash is
that of text and fields."""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.data.records import missing, read_records, require_text
from megatron_r1.data.tasks import generate_items
from megatron_r1.errors import Cause, UserError
from megatron_r1.rewards import ENVIRONMENT, WITHOUT_TRUTH, resolve
from megatron_r1.rewards.base import find_non_finite

RESERVED_FIELDS = ("response", "truth", "kind")
COLUMNS = "data.columns"


@dataclass(frozen=True)
class Prompt:
    """A question. id: hash of the question's text, for an environment of text and fields; the same
    in all runs. kind: the reward that grades its responses, by comparison with `truth`. fields: the
    reward's other arguments, in JSON types. location: where the question's row is, as "file:line",
    if it has one."""

    id: str
    question: str
    kind: str
    truth: Any
    fields: dict[str, Any] = field(default_factory=dict)
    location: str = field(default="", compare=False, repr=False)


class MissingTruth(UserError):
    """A row has no truth. kind: the reward that would compare with it."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message, key="truth", cause=Cause.MISSING)
        self.kind = kind


@dataclass(frozen=True)
class PromptSplit:
    """Train and held-out prompts; no normalized question occurs twice in the two lists.
    contradictions: the prompt that is kept and a later one of the same question and another truth.
    """

    train: list[Prompt]
    heldout: list[Prompt]
    contradictions: list[tuple[Prompt, Prompt]] = field(default_factory=list)


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
) -> PromptSplit:
    """Read prompts from a file, or generate them with a reasoning-gym task.

    path: of `records.read_records`, rows with `question`, `truth` and optionally `kind` (default:
        `kind`, else math); other columns go to the reward.
    columns: our name → the file's.
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
    heldout = (
        []
        if heldout_path is None
        else list(_from_file(heldout_path, kind, columns, "data.heldout_path"))
    )
    if path is not None:
        prompts = _from_file(path, kind, columns, "data.path")
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
    split = _split(prompts, heldout, fraction, num_train, num_heldout, kind)
    _require("train", split.train, num_train, "num_train", task or path)
    _require("held-out", split.heldout, num_heldout, "num_heldout", heldout_path or task or path)
    return split


def _check_truth(location: str, truth: Any, column: str) -> None:
    """Raise UserError for a truth that nothing can be compared with: found when graded, it would
    cost rollouts. column: its name in the file."""
    if truth is None or (isinstance(truth, str) and not truth.strip()):
        raise UserError(
            f"{location}: {column!r} is {truth!r}; give one, or remove the row",
            key=column,
            cause=Cause.EMPTY,
        )
    if fault := find_non_finite(truth, column):
        raise UserError(
            f"{location}: {fault}; give another, or remove the row",
            key=column,
            cause=Cause.OUT_OF_RANGE,
        )


def make_prompt(question: str, kind: str, truth: Any, fields: dict[str, Any]) -> Prompt:
    """Return a prompt whose id is a hash of its normalized question."""
    return Prompt(_digest(question).hex()[:16], question, kind, truth, fields)


def normalize(question: str) -> str:
    """Return the text that spellings of one question share: NFKC, folded case, single spaces.
    Superscripts and subscripts are kept apart from plain characters: `2³` becomes `2^3`."""
    plain = unicodedata.normalize("NFKC", question.translate(SCRIPTS))
    return " ".join(plain.casefold().split())


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
) -> PromptSplit:
    limits = {False: num_train, True: num_heldout if fraction else 0}
    contradictions: list[tuple[Prompt, Prompt]] = []
    sides: dict[bool, dict[str, Prompt]] = {False: {}, True: {p.id: p for p in heldout}}

    def is_full(side: bool) -> bool:
        limit = limits[side]
        return limit is not None and len(sides[side]) >= limit

    for prompt in prompts:
        if is_full(False) and is_full(True):
            break
        known = sides[False].get(prompt.id) or sides[True].get(prompt.id)
        if known is not None and known.truth != prompt.truth:
            contradictions.append((known, prompt))
        side = is_heldout(_identity(prompt.question, prompt.fields, kind), fraction)
        if prompt.id not in sides[False] and prompt.id not in sides[True] and not is_full(side):
            sides[side][prompt.id] = prompt
    train, rest = list(sides[False].values()), list(sides[True].values())
    return PromptSplit(train, rest[:num_heldout], contradictions)


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


def _from_file(
    path: str | Path, kind: str | None, columns: Mapping[str, str] | None, role: str
) -> Iterator[Prompt]:
    for location, row in read_records(path, columns, ("question", "truth", "kind"), role):
        question = require_text(location, without_roles(row), "question", COLUMNS)
        row_kind = row.get("kind") or kind or "math"
        if "truth" not in row and row_kind not in WITHOUT_TRUTH:
            fault = f"{location}: 'truth' {missing(row, 'truth', COLUMNS)}"
            raise MissingTruth(fault, row_kind)
        try:
            resolve(row_kind)
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{location}: {error}", key="kind", cause=Cause.UNKNOWN) from error
        if row_kind in ("math", "code"):
            _check_truth(location, row["truth"], (columns or {}).get("truth", "truth"))
        fields = {n: v for n, v in row.items() if n not in ("question", *RESERVED_FIELDS)}
        identity = _digest(_identity(question, fields, kind)).hex()[:16]
        yield Prompt(identity, question, row_kind, row.get("truth"), fields, location)


def without_roles(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with the text of its question, where that is a chat of one user message, as
    data sets for chat models have it."""
    match row.get("question"):
        case [{"role": "user", "content": str(text)}]:
            return row | {"question": text}
    return row


def _from_task(
    task: str, parameters: dict[str, Any], seed: int, num_items: int, kind: str | None
) -> Iterator[Prompt]:
    for item in generate_items(task, parameters, seed, num_items):
        own = {"task": task, "parameters": parameters, "entry": item}
        fields = own if kind in (None, "logic") else {}
        yield make_prompt(item["question"], kind or "logic", item["answer"], fields)


def _identity(question: str, fields: dict[str, Any], kind: str | None) -> str:
    """Return the text that identifies a prompt. kind: as in `load_prompts`."""
    if kind != ENVIRONMENT or not fields:
        return question
    text = json.dumps(fields, sort_keys=True, default=str)
    # As a hash, because `normalize` would make fields equal.
    return f"{question} {hashlib.sha256(text.encode()).hexdigest()}"


def _digest(question: str) -> bytes:
    return hashlib.sha256(normalize(question).encode("utf-8", "replace")).digest()
