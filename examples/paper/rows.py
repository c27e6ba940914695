"""Training data of single stages of paper.yaml, derived from the output of others."""

from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.json_lines import read_lines, write_lines


def first(folder: str, examples: str, count: int) -> None:
    """Write sft.jsonl: the first `count` of `examples`.

    Raises:
        UserError: there are fewer examples.
    """
    rows = list(read_lines(Path(examples)))
    if len(rows) < count:
        raise UserError(
            f"{examples}: {count} examples are needed, but it has {len(rows)}",
            key="examples",
            cause=Cause.TOO_LARGE,
        )
    write_lines(Path(folder) / "sft.jsonl", rows[:count])


def of_kind(folder: str, questions: str, kind: str) -> None:
    """Write questions.jsonl: the questions that the reward `kind` grades."""
    rows = [row for row in read_lines(Path(questions)) if row["kind"] == kind]
    write_lines(Path(folder) / "questions.jsonl", rows)


def right_and_wrong(folder: str, samples: str) -> None:
    """Write pairs.jsonl for `reward-model`: each question's right responses, each with a wrong one,
    so that the first of a pair is the better one."""
    rows = sorted(read_lines(Path(samples)), key=lambda row: (row["id"], row["index"]))
    write_lines(Path(folder) / "pairs.jsonl", _preference_pairs(rows))


def _preference_pairs(rows: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, str]]:
    for _, answers in groupby(rows, key=lambda row: row["id"]):
        sides: dict[bool, list[Mapping[str, Any]]] = {True: [], False: []}
        for answer in answers:
            if answer["rewards"] and answer["response"].strip():  # others cannot be compared
                sides[answer["rewards"]["accuracy"] == 1.0].append(answer)
        for correct, incorrect in zip(sides[True], sides[False], strict=False):
            texts = {"chosen": correct["response"], "rejected": incorrect["response"]}
            yield {"question": correct["question"], **texts}
