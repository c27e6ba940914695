"""A benchmark whose grader loads in no time, where `math` brings sympy into every worker."""

from r1_grading import Grade

from megatron_r1.evaluation.benchmarks.base import Benchmark, Question

NAME = "tests.unit.evaluation.light_benchmark"


def exact(response, truth, **entry):
    return Grade(float(rf"\boxed{{{truth}}}" in response), f"expected {truth}")


def questions(rows, options):
    for _, row in rows:
        yield Question(row["id"], row["problem"], f"{NAME}:exact", row["answer"])


BENCHMARK = Benchmark(questions, hubs={"me/sums": lambda options: ["*.jsonl"]})
