"""Questions that must not be trained on, because a model is to be measured by them.

Two questions are the same when their normalized texts are, and too near when they share n words in
a row (13: GPT-3, arXiv 2005.14165, appendix C). As there, words that more than ten of the questions
have in common are a task's boilerplate, and no sign of anything.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_r1.data.prompts import Prompt, normalize
from megatron_r1.data.records import read_records, require_text
from megatron_r1.rewards.language.words import HAN

NUM_BOILERPLATE = 10
# A Chinese character is a word, and so is each sign: `4 + 9` and `4 - 9` are different questions.
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+|[^\w\s]")

Ngram = tuple[str, ...]


def load_avoided(paths: Iterable[str | Path]) -> list[str]:
    """The questions of JSONL or Parquet files; raises ValueError with file and line for a row
    without one."""
    return [
        require_text(place, row, "question") for path in paths for place, row in read_records(path)
    ]


def contaminated(prompts: Sequence[Prompt], avoided: Sequence[str], n: int) -> dict[str, str]:
    """Id of each prompt that must not be used → why. n: words in a row; 0: equality only."""
    texts = {normalize(question) for question in avoided}
    grams = {gram for text in texts for gram in ngrams(text, n)}
    shared = {prompt.id: grams & ngrams(prompt.question, n) for prompt in prompts}
    in_how_many = Counter(gram for found in shared.values() for gram in found)
    reasons = {}
    for prompt in prompts:
        telling = sorted(g for g in shared[prompt.id] if in_how_many[g] <= NUM_BOILERPLATE)
        if normalize(prompt.question) in texts:
            reasons[prompt.id] = "the same question is to be avoided"
        elif telling:
            reasons[prompt.id] = f"{n} words of a question to be avoided: {' '.join(telling[0])}"
    return reasons


def ngrams(question: str, n: int) -> set[Ngram]:
    """None for n = 0, and of a question with fewer words."""
    words = WORD.findall(normalize(question))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if n else set()
