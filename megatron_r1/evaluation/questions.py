"""The questions of an evaluation: every benchmark of the recipe, loaded and checked."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import Any

from megatron_r1.config.evaluation import BenchmarkConfig, EvalConfig
from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.benchmarks import find_benchmark
from megatron_r1.evaluation.benchmarks.base import to_prompts
from megatron_r1.evaluation.benchmarks.sources import read_rows


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one benchmark, each to be answered `num_samples` times."""

    title: str
    prompts: list[Prompt]
    num_samples: int
    digests: dict[str, str]
    """Question id → digest of all that grading depends on."""


def load_question_sets(config: EvalConfig) -> list[QuestionSet]:
    """All benchmarks of the recipe. Raises ValueError for two of one title, and what loading
    raises.
    """
    if not config.benchmarks:
        raise ValueError("eval.benchmarks must be set, for example to [gym/arithmetic]")
    titles = [entry.title for entry in config.benchmarks]
    for title in titles:
        if titles.count(title) > 1:
            raise ValueError(f"eval.benchmarks names {title} twice: give each a label of its own")
    return [_load(entry, config) for entry in config.benchmarks]


def digest(prompt: Prompt) -> str:
    """Changes with the question as it is asked, its truth and its fields."""
    content: list[Any] = [prompt.question, prompt.kind, prompt.truth, prompt.fields]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _load(entry: BenchmarkConfig, config: EvalConfig) -> QuestionSet:
    benchmark, part = find_benchmark(entry.name)
    given = dict(entry.options) | ({"suite": part} if part else {})
    options = benchmark.with_defaults(entry.name, given)
    rows = read_rows(entry.name, benchmark, options, entry.path, entry.files)
    instruction = benchmark.instruction if entry.instruction is None else entry.instruction
    prompts = to_prompts(benchmark.questions(rows, options), instruction)
    found = list(itertools.islice(prompts, entry.limit or config.limit))
    if not found:
        raise ValueError(
            f"benchmark {entry.title}: no questions are left; loosen its options ({options})"
        )
    digests = {prompt.id: digest(prompt) for prompt in found}
    return QuestionSet(entry.title, found, entry.samples or config.samples, digests)
