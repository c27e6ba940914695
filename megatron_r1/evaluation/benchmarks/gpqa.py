"""GPQA Diamond: 198 graduate-level questions with four choices (Rein et al., arXiv 2311.12022).

The data set has the right choice in a column of its own. The choices are shuffled once per
question, by its id and a seed, so that every sample and every run has the same order.
"""

from collections.abc import Iterator

from megatron_r1.data.records import require_text
from megatron_r1.evaluation.benchmarks.base import Benchmark, Question
from megatron_r1.evaluation.benchmarks.multiple_choice import INSTRUCTION, lettered, shuffled
from megatron_r1.evaluation.benchmarks.sources import Options, Rows, pick_columns

CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
LAYOUT = {name: name for name in ("Record ID", "Question", *CHOICES)}


def questions(rows: Rows, options: Options) -> Iterator[Question]:
    for place, row in rows:
        columns = pick_columns(place, row, [LAYOUT])
        question_id = str(columns["Record ID"])
        choices = [require_text(place, columns, name).strip() for name in CHOICES]
        order, letter = shuffled(choices, f"gpqa/{options['seed']}/{question_id}")
        problem = lettered(require_text(place, columns, "Question").strip(), order)
        yield Question(question_id, problem, "math", letter)


BENCHMARK = Benchmark(
    questions,
    INSTRUCTION,
    hubs={"Idavidrein/gpqa": lambda options: ["gpqa_diamond.csv"]},
    options={"seed": 0},
)
