"""Benchmarks: one file each, one line each in `REGISTRY`.

A benchmark maps the rows of its public data set to prompts (see `base.Benchmark`); what grades the
answers are the rewards, the same as in training.
"""

import importlib

from megatron_r1.errors import did_you_mean
from megatron_r1.evaluation.benchmarks.base import Benchmark

PACKAGE = "megatron_r1.evaluation.benchmarks"
REGISTRY: dict[str, str] = {
    "aime_2024": f"{PACKAGE}.aime:BENCHMARK",
    "codeforces": f"{PACKAGE}.codeforces:BENCHMARK",
    "gpqa_diamond": f"{PACKAGE}.gpqa:BENCHMARK",
    "gym": f"{PACKAGE}.gym:BENCHMARK",
    "livecodebench": f"{PACKAGE}.livecodebench:BENCHMARK",
    "math_500": f"{PACKAGE}.math500:BENCHMARK",
    "mmlu": f"{PACKAGE}.mmlu:BENCHMARK",
}


def find_benchmark(name: str) -> tuple[Benchmark, str]:
    """The benchmark of a name and what stands behind its slash: "gym/logic" is gym's "logic".

    name: of `REGISTRY`, or "package.module:NAME" of your own. Raises ValueError naming those
    there are.
    """
    base, _, part = name.partition("/")
    target = REGISTRY.get(base, base)
    module, _, attribute = target.partition(":")
    if not attribute:
        raise ValueError(
            f"unknown benchmark {name!r}{did_you_mean(base, REGISTRY)} (known: "
            f"{', '.join(sorted(REGISTRY))}; your own is written 'package.module:NAME')"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"benchmark {name!r} cannot be imported: {error}") from error
    if not isinstance(found, Benchmark):
        raise ValueError(f"benchmark {name!r} is a {type(found).__name__}, not a Benchmark")
    return found, part


__all__ = ["REGISTRY", "Benchmark", "find_benchmark"]
