"""tools/bench fp8: its language's entropy, and curves compared by hand."""

import math
import random
from collections import Counter

import pytest

from megatron_r1.config import parse_recipe
from tools.bench.fp8.losses import (
    ENTROPY,
    LENGTH,
    VARIANTS,
    Language,
    exponential_average,
    relative_error_summary,
    relative_errors,
    variant_settings,
)


def test_sentences_have_the_stated_entropy_and_depend_on_their_names_alone():
    language = Language(64, seed=1)
    counts, pairs = Counter(), Counter()
    for tokens in language.batch("a", 4000):
        assert len(tokens) == LENGTH
        for i in range(2, LENGTH):
            context = (tokens[i - 2] % 4, tokens[i - 1])
            counts[context, tokens[i]] += 1
            pairs[context] += 1
    total = sum(counts.values())
    entropy = -sum(n * math.log(n / pairs[context]) for (context, _), n in counts.items()) / total
    # The plug-in estimate is low by about (choices - 1) / (2 samples) of each of 256 contexts.
    assert entropy == pytest.approx(ENTROPY, abs=0.01)
    again = Language(64, seed=1)
    random.seed(5)
    assert again.batch("a", 3) == language.batch("a", 3) != language.batch("b", 3)
    assert again.batch("a", 3) != Language(64, seed=2).batch("a", 3)


def test_curves_are_smoothed_before_they_are_compared():
    assert exponential_average([2.0, 1.0, 1.0]) == pytest.approx([2.0, 1.9, 1.81])
    errors = relative_errors([2.2, 1.1], [2.0, 1.0])
    assert errors == pytest.approx([0.1, 0.1])
    late = relative_error_summary([1.0, 1.0, 1.01, 0.99], [1.0] * 4)
    # 1 + 0.1 * 0.01 = 1.001, then 0.9 * 1.001 + 0.1 * 0.99 = 0.9999
    assert late == pytest.approx({"mean": 0.00045, "mean_magnitude": 0.00055, "largest": 0.001})


def test_every_variant_is_a_recipe():
    for name in VARIANTS:
        config = parse_recipe(variant_settings(name, "somewhere", seed=0, threads=1))
        assert config.model.dtype == ("float32" if name == "fp32" else "bfloat16")
        assert (config.fp8.recipe == "none") == (name in ("fp32", "bf16"))
