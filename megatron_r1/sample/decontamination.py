"""Decontamination: which questions are those of benchmarks, on which must not be trained.

Two questions are the same if their normalized texts are, and too near if they share n words in a
row (13: GPT-3, arXiv 2005.14165, appendix C). As there, an n-gram that more than ten of the
questions have in common is a task's boilerplate, and is ignored."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from r1_grading.reading import HAN_RANGES

from megatron_r1.data.prompt import Prompt, normalize_question
from megatron_r1.data.rows import read_canonical_rows, require_text

NUM_BOILERPLATE = 10
# Each Chinese character and each sign is a word: `4 + 9` and `4 - 9` are different questions.
NGRAM_WORD = re.compile(rf"[{HAN_RANGES}]|[^\W{HAN_RANGES}]+|[^\w\s]")

Ngram = tuple[str, ...]


def load_avoided(paths: Iterable[str | Path]) -> list[str]:
    """Return the questions of JSONL or Parquet files.

    Args:
        paths: the files.

    Raises:
        ValueError: a row without a question; with file and line."""
    return [
        require_text(place, row, "question")
        for path in paths
        for place, row in read_canonical_rows(path, key="sample.decontaminate")
    ]


def find_contaminated(
    prompts: Sequence[Prompt], avoided_questions: Sequence[str], n: int
) -> dict[str, str]:
    """Return id → reason of the prompts that must not be used.

    Args:
        prompts: the prompts to check.
        avoided_questions: the questions of benchmarks.
        n: the number of words in a row that make a question too near; 0: equality only."""
    texts = {normalize_question(question) for question in avoided_questions}
    grams = {gram for text in texts for gram in word_ngrams(text, n)}
    shared = {prompt.id: grams & word_ngrams(prompt.question, n) for prompt in prompts}
    num_prompts = Counter(itertools.chain.from_iterable(shared.values()))
    reasons = {}
    for prompt in prompts:
        rare = sorted(g for g in shared[prompt.id] if num_prompts[g] <= NUM_BOILERPLATE)
        if normalize_question(prompt.question) in texts:
            reasons[prompt.id] = "the same question is to be avoided"
        elif rare:
            reasons[prompt.id] = f"{n} words of a question to be avoided: {' '.join(rare[0])}"
    return reasons


def word_ngrams(question: str, n: int) -> set[Ngram]:
    """Return the n-grams of words; no n-grams for n = 0."""
    words = NGRAM_WORD.findall(normalize_question(question))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if n else set()
