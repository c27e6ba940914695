"""MATH-500: five hundred problems of the MATH test set, picked by Lightman et al. (2305.20050)."""

from collections.abc import Iterator

from megatron_r1.data.records import require_text
from megatron_r1.evaluation.benchmarks.base import BOXED, Benchmark, Question
from megatron_r1.evaluation.benchmarks.sources import Options, Rows, pick_columns

LAYOUT = {"id": "unique_id", "problem": "problem", "answer": "answer", "level": "level"}


def questions(rows: Rows, options: Options) -> Iterator[Question]:
    levels = {int(level) for level in options["levels"]}
    for place, row in rows:
        columns = pick_columns(place, row, [LAYOUT])
        if levels and int(columns["level"]) not in levels:
            continue
        problem = require_text(place, columns, "problem").strip()
        answer = require_text(place, columns, "answer").strip()
        yield Question(str(columns["id"]), problem, "math", answer)


BENCHMARK = Benchmark(
    questions,
    instruction=BOXED,
    hubs={"HuggingFaceH4/MATH-500": lambda options: ["test.jsonl"]},
    options={"levels": []},  # 1 (easiest) to 5; [] for all
)
