"""Benchmarks, one line each in `BENCHMARKS`.

A benchmark maps the rows of its public data set to prompts (`base.Benchmark`); the same rewards as
in training grade the responses."""

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.base.user_code import find_value
from megatron_r1.evaluation.benchmarks.base import Benchmark

PACKAGE = "megatron_r1.evaluation.benchmarks"
BENCHMARKS: dict[str, str] = {
    "aime_2024": f"{PACKAGE}.competition_math:AIME_2024",
    "alpaca_eval_2": f"{PACKAGE}.alpaca_eval:ALPACA_EVAL_2",
    "codeforces": f"{PACKAGE}.codeforces:BENCHMARK",
    "gpqa_diamond": f"{PACKAGE}.multiple_choice:GPQA_DIAMOND",
    "gym": f"{PACKAGE}.gym:BENCHMARK",
    "livecodebench": f"{PACKAGE}.livecodebench:BENCHMARK",
    "math_500": f"{PACKAGE}.competition_math:MATH_500",
    "mmlu": f"{PACKAGE}.multiple_choice:MMLU",
}


def find_benchmark(name: str) -> tuple[Benchmark, str]:
    """Return the benchmark and what follows its slash: "gym/logic" gives gym and "logic".

    Args:
        name: a name of `BENCHMARKS`, or "package.module:NAME" of a user's.

    Raises:
        UserError: an unknown name."""
    base, _, part = name.partition("/")
    module, _, attribute = BENCHMARKS.get(base, base).partition(":")
    if not attribute:
        raise UserError(
            f"unknown benchmark {name!r}{did_you_mean(base, BENCHMARKS)} (known: "
            f"{', '.join(sorted(BENCHMARKS))}; your own questions: "
            f"{{name: questions, path: FILE}}; "
            "your own layout is written 'package.module:NAME')",
            key="eval.benchmarks",
            cause=Cause.UNKNOWN,
        )
    try:
        return find_value(
            f"{module}:{attribute}", "Benchmark", lambda o: isinstance(o, Benchmark)
        ), part
    except (ImportError, UserError) as error:
        raise UserError(
            f"benchmark {name!r} cannot be imported: {error}",
            key="eval.benchmarks",
            cause=Cause.NOT_FOUND,
        ) from error
