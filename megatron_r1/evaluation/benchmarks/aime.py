"""AIME 2024: thirty competition problems whose answers are integers from 0 to 999."""

from collections.abc import Iterator

from megatron_r1.data.records import require_text
from megatron_r1.errors import UserError
from megatron_r1.evaluation.benchmarks.base import BOXED, Benchmark, Question
from megatron_r1.evaluation.benchmarks.sources import Options, Rows, pick_columns

LAYOUTS = (
    {"id": "id", "problem": "problem", "answer": "answer"},  # HuggingFaceH4/aime_2024
    {"id": "ID", "problem": "Problem", "answer": "Answer"},  # Maxwell-Jia/AIME_2024
)


def questions(rows: Rows, options: Options) -> Iterator[Question]:
    for place, row in rows:
        columns = pick_columns(place, row, LAYOUTS)
        problem = require_text(place, columns, "problem").strip()
        # One layout has text ("025"), the other an integer.
        try:
            answer = int(str(columns["answer"]))
        except ValueError:
            raise UserError(
                f"{place}: an AIME answer is an integer from 0 to 999, got {columns['answer']!r}"
            ) from None
        if not 0 <= answer <= 999:
            raise UserError(f"{place}: an AIME answer is between 0 and 999, got {answer}")
        yield Question(str(columns["id"]), problem, "math", str(answer))


BENCHMARK = Benchmark(
    questions,
    instruction=BOXED,
    hubs={
        "HuggingFaceH4/aime_2024": lambda options: ["data/train-*.parquet"],
        "Maxwell-Jia/AIME_2024": lambda options: ["aime_2024_problems.parquet"],
    },
)
