"""AIME 2024 (thirty competition problems whose answers are integers from 0 to 999) and MATH-500
(five hundred problems of the MATH test set, picked by Lightman et al., 2305.20050)."""

from collections.abc import Iterator

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.records import require_text
from megatron_r1.evaluation.benchmarks.base import Benchmark, Question
from megatron_r1.evaluation.benchmarks.sources import Options, Rows, pick_columns

BOXED = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
"""The instruction that DeepSeek-R1's authors recommend for mathematics (the model's page)."""
AIME_LAYOUTS = (
    {"id": "id", "problem": "problem", "answer": "answer"},  # HuggingFaceH4/aime_2024
    {"id": "ID", "problem": "Problem", "answer": "Answer"},  # Maxwell-Jia/AIME_2024
)
MATH_LAYOUT = {"id": "unique_id", "problem": "problem", "answer": "answer", "level": "level"}


def aime_questions(rows: Rows, options: Options) -> Iterator[Question]:
    """Yield the problems of AIME. Raises UserError for an answer that is no integer from 0 to
    999."""
    for place, row in rows:
        columns = pick_columns(place, row, AIME_LAYOUTS)
        problem = require_text(place, columns, "problem").strip()
        # One layout has text ("025"), the other an integer.
        try:
            answer = int(str(columns["answer"]))
        except ValueError:
            raise UserError(
                f"{place}: an AIME answer is an integer from 0 to 999, got {columns['answer']!r}",
                key="answer",
                cause=Cause.MALFORMED,
            ) from None
        if not 0 <= answer <= 999:
            raise UserError(
                f"{place}: an AIME answer is between 0 and 999, got {answer}",
                key="answer",
                cause=Cause.OUT_OF_RANGE,
            )
        yield Question(str(columns["id"]), problem, "math", str(answer))


def math_500_questions(rows: Rows, options: Options) -> Iterator[Question]:
    """Yield the questions of the levels in `options`."""
    levels = {int(level) for level in options["levels"]}
    for place, row in rows:
        columns = pick_columns(place, row, [MATH_LAYOUT])
        if not levels or int(columns["level"]) in levels:
            problem = require_text(place, columns, "problem").strip()
            answer = require_text(place, columns, "answer").strip()
            yield Question(str(columns["id"]), problem, "math", answer)


AIME_2024 = Benchmark(
    aime_questions,
    BOXED,
    hubs={
        "HuggingFaceH4/aime_2024": lambda options: ["data/train-*.parquet"],
        "Maxwell-Jia/AIME_2024": lambda options: ["aime_2024_problems.parquet"],
    },
)
MATH_500 = Benchmark(
    math_500_questions,
    BOXED,
    hubs={"HuggingFaceH4/MATH-500": lambda options: ["test.jsonl"]},
    options={"levels": []},  # 1 (easiest) to 5; [] for all
)
