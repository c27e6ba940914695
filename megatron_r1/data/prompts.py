"""Prompts: questions with their truths, split into train and held-out.

A *prompt* is one item to respond to. Its *question* is the text that a data set has for it; a
template (`templates`) makes of it the text, and then the token ids, that the policy continues.

A question is held out or not by the hash of its text alone. So the two sides stay disjoint for any
seed, size, order and file: a base model trained on one set of questions has not seen the held-out
questions of another. Rows for an environment may differ in their fields only; there the hash is
that of text and fields."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from r1_grading.rewards import resolve
from r1_grading.truths import NO_TRUTH

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.prompt_rows import RowReading
from megatron_r1.data.questions import Prompt, asked, identity, is_heldout, make_prompt, normalize
from megatron_r1.data.report import DataReport
from megatron_r1.data.tasks import generate_items
from megatron_r1.data.where import Conditions


@dataclass(frozen=True)
class PromptSplit:
    """Train and held-out prompts; no normalized question occurs twice in the two lists.
    contradictions: the prompt that is kept and a later one of the same question and another truth.
    reports: what became of the rows, one for each source that is a file."""

    train: list[Prompt]
    heldout: list[Prompt]
    contradictions: list[tuple[Prompt, Prompt]] = field(default_factory=list)
    reports: list[DataReport] = field(default_factory=list)


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
        `kind`, else what the truth shows: `r1_grading.truths.kind_of`); other columns go to the
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
    _check_arguments(path, heldout_path, task, num_train, num_heldout, heldout_fraction)
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
        assert task is not None and num_train is not None
        # After this many items without enough new questions, the task is considered exhausted.
        num_attempts = 1_000 + 50 * (num_train + (num_heldout or 0))
        prompts = _from_task(task, dict(parameters or {}), seed, num_attempts, kind)
    fraction = heldout_fraction if heldout_path is None else 0.0
    split = _split(prompts, heldout, fraction, num_train, num_heldout, kind, reports)
    _require_any(split, heldout)
    _require("train", split.train, num_train, "num_train", task or path)
    _require("held-out", split.heldout, num_heldout, "num_heldout", heldout_path or task or path)
    return split


def _check_arguments(
    path: str | Path | None,
    heldout_path: str | Path | None,
    task: str | None,
    num_train: int | None,
    num_heldout: int | None,
    heldout_fraction: float,
) -> None:
    """Raise UserError for arguments of `load_prompts` that do not go together."""
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
    if task is not None and (num_train is None or (num_heldout is None and heldout_path is None)):
        raise UserError(
            f"data.task={task} generates any number of questions: set data.num_train and "
            "data.num_heldout",
            key="data.num_train",
            cause=Cause.MISSING,
        )


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
    unused: set[str] = set()

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
        side = is_heldout(identity(prompt, kind), fraction)
        if not is_full(side):
            sides[side][prompt.id] = prompt
        elif prompt.id in unused:
            report.num_duplicates += 1
        else:
            unused.add(prompt.id)
    report.num_unused = len(unused)
    train, rest = list(sides[False].values()), list(sides[True].values())
    kinds = Counter(prompt.kind for prompt in train + rest)
    if kind is None and len(kinds) > 1:
        report.kinds = dict(kinds.most_common())
    return PromptSplit(train, rest[:num_heldout], contradictions, reports)


def _differ_in_case(one: Prompt, other: Prompt) -> bool:
    """Return whether two questions of the same hash are different texts: "find A" and "find a"."""
    return one.question != other.question and _spelling(one) != _spelling(other)


def _spelling(prompt: Prompt) -> str:
    return normalize(asked(prompt), fold_case=False)


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


def _from_task(
    task: str, parameters: dict[str, Any], seed: int, num_items: int, kind: str | None
) -> Iterator[Prompt]:
    for item in generate_items(task, parameters, seed, num_items):
        own = {"task": task, "parameters": parameters, "entry": item}
        fields = own if kind in (None, "logic") else {}
        yield make_prompt(item["question"], kind or "logic", item["answer"], fields)
