"""Splits prompts into train and held-out ones, each question once.

A question is held out or not by the hash of its text alone. So the two sides stay disjoint for any
seed, size, order and file: a base model trained on one set of questions has not seen the held-out
questions of another. Rows for an environment may differ in their fields only; there the hash is
that of text and fields."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from megatron_r1.data.data_report import DataReport
from megatron_r1.data.prompt import (
    Prompt,
    conversation_text,
    is_heldout,
    normalize_question,
    prompt_identity,
)


@dataclass(frozen=True)
class PromptSplit:
    """Train and held-out prompts; no normalized question occurs twice in the two lists.

    Attributes:
        train: the prompts that are sampled for training.
        heldout: those for evaluation, never trained on.
        contradictions: the prompt that is kept and a later one of the same question and another
            truth.
        reports: what became of the rows, one for each source that is a file.
    """

    train: list[Prompt]
    heldout: list[Prompt]
    contradictions: list[tuple[Prompt, Prompt]] = field(default_factory=list)
    reports: list[DataReport] = field(default_factory=list)


def split_prompts(
    prompts: Iterable[Prompt],
    heldout: list[Prompt],
    fraction: float,
    num_train: int | None,
    num_heldout: int | None,
    kind: str | None,
    reports: list[DataReport],
) -> PromptSplit:
    """Return the train and the held-out prompts.

    Args:
        prompts: what is split.
        heldout: prompts that are held out whatever their hash.
        fraction: the part of all possible questions that is held out; 0: `heldout` alone.
        num_train: the most prompts to train on; None: all.
        num_heldout: the most held-out prompts; None: all.
        kind: the default reward, None where the rows name theirs.
        reports: the reports of the sources; the last one counts what is left out here."""
    report = reports[-1] if reports else DataReport()
    splitter = _Splitter(
        # Without a fraction, only the prompts of the held-out file are held out.
        train=_Half(num_train),
        heldout=_Half(num_heldout if fraction else 0, {p.id: p for p in heldout}),
        fraction=fraction,
        kind=kind,
        report=report,
    )
    splitter.add_all(prompts)
    train = list(splitter.train.prompts.values())
    heldout_prompts = list(splitter.heldout.prompts.values())
    kinds = Counter(prompt.kind for prompt in train + heldout_prompts)
    if kind is None and len(kinds) > 1:
        report.kinds = dict(kinds.most_common())
    return PromptSplit(train, heldout_prompts[:num_heldout], splitter.contradictions, reports)


@dataclass
class _Half:
    """The train or the held-out prompts of a split, by id; `limit`: the most, None for no limit."""

    limit: int | None
    prompts: dict[str, Prompt] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        return self.limit is not None and len(self.prompts) >= self.limit


class _Splitter:
    """Adds prompts to two halves, each question once, and counts in `report` what is left out."""

    def __init__(
        self, *, train: _Half, heldout: _Half, fraction: float, kind: str | None, report: DataReport
    ) -> None:
        self.train = train
        self.heldout = heldout
        self.contradictions: list[tuple[Prompt, Prompt]] = []
        self._fraction = fraction
        self._kind = kind
        self._report = report
        self._heldout_file_ids = {*heldout.prompts}
        self._unused_ids: set[str] = set()

    def add_all(self, prompts: Iterable[Prompt]) -> None:
        """Add prompts until both halves are full."""
        for prompt in prompts:
            if self.train.is_full and self.heldout.is_full:
                self._report.is_complete = False
                break
            self._add_prompt(self._with_distinct_id(prompt))
        self._report.num_unused = len(self._unused_ids)

    def _add_prompt(self, prompt: Prompt) -> None:
        earlier_prompt = self._earlier_prompt(prompt)
        if earlier_prompt is not None and earlier_prompt.truth != prompt.truth:
            self.contradictions.append((earlier_prompt, prompt))
            reason = "the question has another truth before"
            self._report.skip_row(reason, prompt.location, "truth")
            return
        if earlier_prompt is not None:
            self._report.num_duplicates += 1
            return
        is_held_out = is_heldout(prompt_identity(prompt, self._kind), self._fraction)
        side = self.heldout if is_held_out else self.train
        if not side.is_full:
            side.prompts[prompt.id] = prompt
        elif prompt.id in self._unused_ids:
            self._report.num_duplicates += 1
        else:
            self._unused_ids.add(prompt.id)

    def _with_distinct_id(self, prompt: Prompt) -> Prompt:
        """Return a prompt with an id of its own where one that differs in case has the same."""
        earlier_prompt = self._earlier_prompt(prompt)
        # Not where the other is of the held-out file: too near to be trained on.
        if (
            earlier_prompt is None
            or prompt.id in self._heldout_file_ids
            or not _differ_in_case(earlier_prompt, prompt)
        ):
            return prompt
        # On the side of the other, by the same hash; but a question of its own.
        spelling = f"spelled {_normalized_question(prompt)}".encode("utf-8", "replace")
        return replace(prompt, id=hashlib.sha256(spelling).hexdigest()[:16])

    def _earlier_prompt(self, prompt: Prompt) -> Prompt | None:
        return self.train.prompts.get(prompt.id) or self.heldout.prompts.get(prompt.id)


def _differ_in_case(first: Prompt, second: Prompt) -> bool:
    """Return whether two questions of the same hash are different texts: "find A" and "find a"."""
    return first.question != second.question and _normalized_question(
        first
    ) != _normalized_question(second)


def _normalized_question(prompt: Prompt) -> str:
    return normalize_question(conversation_text(prompt), fold_case=False)
