"""AlpacaEval 2: 805 instructions, each with GPT-4 Turbo's response (Dubois et al., 2404.04475).

A judge compares the model's response with that one. The results are win rates
(`evaluation.win_rates`)."""

from collections.abc import Iterator

from megatron_r1.data.rows import require_text
from megatron_r1.evaluation.benchmarks.base import Benchmark, Options, Question, Rows, pick_columns

ALPACA_EVAL_LAYOUT = {"instruction": "instruction", "output": "output"}


def _alpaca_eval_questions(rows: Rows, options: Options) -> Iterator[Question]:
    """Yield the instructions; the truth of each is the response to beat."""
    for location, row in rows:
        columns = pick_columns(location, row, [ALPACA_EVAL_LAYOUT])
        question, reference = (require_text(location, columns, name) for name in ALPACA_EVAL_LAYOUT)
        yield Question("", question.strip(), "judge", reference.strip())


ALPACA_EVAL_2 = Benchmark(
    _alpaca_eval_questions,
    hubs={"tatsu-lab/alpaca_eval": lambda options: ["alpaca_eval_gpt4_baseline.json"]},
    is_pairwise=True,
)
