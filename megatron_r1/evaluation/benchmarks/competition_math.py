"""Benchmarks of competition mathematics, whose answers are numbers or expressions.

They are AIME 2024 (thirty problems whose answers are integers from 0 to 999) and MATH-500 (five
hundred problems of the MATH test set, picked by Lightman et al., 2305.20050)."""

from collections.abc import Iterator

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.rows import require_text
from megatron_r1.evaluation.benchmarks.base import Benchmark, Options, Question, Rows, pick_columns

BOXED_TEMPLATE = (
    "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
)
"""The instruction that DeepSeek-R1's authors recommend for mathematics (the model's page)."""
AIME_LAYOUTS = (
    {"id": "id", "question": "problem", "answer": "answer"},  # HuggingFaceH4/aime_2024
    {"id": "ID", "question": "Problem", "answer": "Answer"},  # Maxwell-Jia/AIME_2024
)
MATH_LAYOUT = {"id": "unique_id", "question": "problem", "answer": "answer", "level": "level"}


def _aime_questions(rows: Rows, options: Options) -> Iterator[Question]:
    """Yield the problems of AIME.

    Raises:
        UserError: an answer is not an integer from 0 to 999.
    """
    for location, row in rows:
        columns = pick_columns(location, row, AIME_LAYOUTS)
        question = require_text(location, columns, "question").strip()
        # One layout has text ("025"), the other an integer.
        try:
            answer = int(str(columns["answer"]))
        except ValueError:
            raise UserError(
                f"{location}: an AIME answer is an integer from 0 to 999, got "
                f"{columns['answer']!r}",
                key="answer",
                cause=Cause.MALFORMED,
            ) from None
        if not 0 <= answer <= 999:
            raise UserError(
                f"{location}: an AIME answer is between 0 and 999, got {answer}",
                key="answer",
                cause=Cause.OUT_OF_RANGE,
            )
        yield Question(str(columns["id"]), question, "math", str(answer))


def _math_500_questions(rows: Rows, options: Options) -> Iterator[Question]:
    """Yield the questions of the levels in `options`."""
    levels = {int(level) for level in options["levels"]}
    for location, row in rows:
        columns = pick_columns(location, row, [MATH_LAYOUT])
        if not levels or int(columns["level"]) in levels:
            question = require_text(location, columns, "question").strip()
            answer = require_text(location, columns, "answer").strip()
            yield Question(str(columns["id"]), question, "math", answer)


AIME_2024 = Benchmark(
    _aime_questions,
    BOXED_TEMPLATE,
    hubs={
        "HuggingFaceH4/aime_2024": lambda options: ["data/train-*.parquet"],
        "Maxwell-Jia/AIME_2024": lambda options: ["aime_2024_problems.parquet"],
    },
)
MATH_500 = Benchmark(
    _math_500_questions,
    BOXED_TEMPLATE,
    hubs={"HuggingFaceH4/MATH-500": lambda options: ["test.jsonl"]},
    options={"levels": []},  # 1 (easiest) to 5; [] for all
)
