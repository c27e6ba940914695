"""MMLU: 14,042 questions with four choices from 57 subjects (Hendrycks et al., 2009.03300)."""

from collections.abc import Iterator
from typing import Any

from megatron_r1.data.records import require_text
from megatron_r1.errors import UserError
from megatron_r1.evaluation.benchmarks.base import Benchmark, Question
from megatron_r1.evaluation.benchmarks.multiple_choice import INSTRUCTION, LETTERS, lettered
from megatron_r1.evaluation.benchmarks.sources import Options, Rows, pick_columns

LAYOUT = {name: name for name in ("question", "subject", "choices", "answer")}


def questions(rows: Rows, options: Options) -> Iterator[Question]:
    subjects = set(options["subjects"])
    seen = set()
    for place, row in rows:
        columns = pick_columns(place, row, [LAYOUT])
        seen.add(columns["subject"])
        if subjects and columns["subject"] not in subjects:
            continue
        choices = columns["choices"]
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise UserError(f"{place}: 'choices' must be a list of texts, got {choices!r}")
        problem = require_text(place, columns, "question").strip()
        letter = _letter(place, columns["answer"], len(choices))
        yield Question("", lettered(problem, choices), "math", letter)
    if unknown := sorted(subjects - seen):
        raise UserError(f"mmlu has no subject {unknown[0]!r}; it has {', '.join(sorted(seen))}")


def _letter(place: str, answer: Any, num_choices: int) -> str:
    """Return the letter of an answer: the data set has 0 to 3, exports of it the letter."""
    letters = list(LETTERS[:num_choices])
    if isinstance(answer, str) and answer.strip().upper() in letters:
        return answer.strip().upper()
    if isinstance(answer, int) and 0 <= answer < num_choices:
        return letters[answer]
    raise UserError(f"{place}: 'answer' must be 0 to {num_choices - 1} or a letter, got {answer!r}")


BENCHMARK = Benchmark(
    questions,
    INSTRUCTION,
    hubs={"cais/mmlu": lambda options: ["all/test-*.parquet"]},
    options={"subjects": []},  # such as [abstract_algebra]; [] for all
)
