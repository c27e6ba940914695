"""A benchmark whose grader loads in no time, where `math` brings sympy into every worker."""

from megatron_r1.evaluation.benchmarks.base import Benchmark, Question
from megatron_r1.rewards.base import Grade

NAME = "tests.unit.evaluation.light_benchmark"


def exact(response, truth, **entry):
    return Grade(float(rf"\boxed{{{truth}}}" in response), f"expected {truth}")


def questions(rows, options):
    for _, row in rows:
        yield Question(row["id"], row["problem"], f"{NAME}:exact", row["answer"])


BENCHMARK = Benchmark(questions, hubs={"me/sums": lambda options: ["*.jsonl"]})
