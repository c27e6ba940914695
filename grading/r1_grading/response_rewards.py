"""Rewards that read the response alone: format, conciseness, language, repetition."""

import re
import unicodedata

import numpy as np

from r1_grading.reading import chain_of_thought
from r1_grading.reading.languages import INVISIBLE_CHARS, LANGUAGE_NAMES, judged_words
from r1_grading.reading.tags_and_boxes import ANSWER, END_ANSWER, END_THINK, THINK
from r1_grading.rewards import Grade

FORMAT_TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
# The text between the tags in DeepSeek-R1-Zero's template, and in papers that quote it.
PLACEHOLDER_TEXTS = frozenset({"reasoning process here", "answer here", "…", "..."})


def grade_format(
    response: str, truth: object = None, *, thought_opened: bool = False, **entry: object
) -> Grade:
    """Return 1 if the response is `<think>…</think><answer>…</answer>`, else 0.

    The four tags each occur once, in order, with only white space outside. Thought and answer may
    hold any text, or none, but not the prompt's own example.

    Args:
        response: the text that the policy sampled.
        truth: not used.
        thought_opened: the prompt ended with `<think>`, so the response starts inside the thought
            and must not open it again.
        **entry: the prompt's other fields, which are not used."""
    text = (THINK + response if thought_opened else response).strip()
    for tag in FORMAT_TAGS:
        if (num_found := text.count(tag)) != 1:
            return Grade(0.0, f"bad format: {tag} occurs {num_found} times")
    positions = [text.find(tag) for tag in FORMAT_TAGS]
    if positions != sorted(positions):
        return Grade(0.0, "bad format: the tags are out of order")
    separator = text[positions[1] + len(END_THINK) : positions[2]]
    if positions[0] != 0 or separator.strip() or not text.endswith(END_ANSWER):
        return Grade(0.0, "bad format: text outside the tags")
    thought = text[len(THINK) : positions[1]]
    answer = text[positions[2] + len(ANSWER) : positions[3]]
    if any(_is_placeholder(part) for part in (thought, answer)):
        return Grade(0.0, "bad format: the prompt's example, copied")
    return Grade(1.0, "format as asked")


def _is_placeholder(part: str) -> bool:
    if len(part) > 200:
        return False
    words = " ".join(part.casefold().split())
    return words in PLACEHOLDER_TEXTS or words.rstrip(".!… ") in PLACEHOLDER_TEXTS


LENGTH_UNITS = ("tokens", "characters")


def grade_conciseness(
    response: str,
    truth: object = None,
    *,
    free_length: int,
    max_length: int,
    unit: str = "tokens",
    num_tokens: int | None = None,
    **entry: object,
) -> Grade:
    """Return the reward of the response's whole length, its thought included.

    It is full up to a free length, and falls to 0 at the maximum length.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), which runs from 0 to -1, plus 1; a
    constant changes no advantage. With L the length, F the free length and M the maximum:

        reward = 1 for L <= F,  (M - L) / (M - F) for F < L < M,  0 for L >= M

    The length reward of Kimi k1.5 compares a response with its group's and so is no function of the
    response alone.

    An empty response has 1: combine this with accuracy.

    Args:
        response: not used where `unit` is "tokens".
        truth: not used.
        free_length: F, in `unit`.
        max_length: M, in `unit`.
        unit: what lengths are counted in.
        num_tokens: the response's length, which a run passes by itself.
        **entry: the prompt's other fields, which are not used.

    Raises:
        ValueError: not 0 <= F < M, an unknown unit, or unit "tokens" without num_tokens."""
    for name, value in (("free_length", free_length), ("max_length", max_length)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} must be a number of {unit}, got {value!r}")
    if not 0 <= free_length < max_length:
        raise ValueError(
            f"free_length must be at least 0 and below max_length, got {free_length} and "
            f"{max_length}"
        )
    length = _response_length(response, unit, num_tokens)
    fraction = (max_length - length) / (max_length - free_length)
    reward = min(1.0, max(0.0, fraction))
    limits = f"{free_length:,} are free, {max_length:,} the maximum"
    return Grade(reward, f"{length:,} {unit}: {limits}")


def _response_length(response: str, unit: str, num_tokens: object) -> int:
    if unit == "characters":
        return len(response)
    if unit != "tokens":
        raise ValueError(f"unit must be one of {', '.join(LENGTH_UNITS)}, got {unit!r}")
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 0:
        raise ValueError(
            f"num_tokens must be the response's length in tokens, got {num_tokens!r}; "
            "give it, or measure with unit: characters"
        )
    return num_tokens


def grade_language(
    response: str,
    truth: object = None,
    *,
    target: str,
    thought_opened: bool = False,
    **entry: object,
) -> Grade:
    """Return the fraction of the thought's words that are in the language `target`.

        reward = words in the target language / words      (DeepSeek-R1, arXiv 2501.12948 v2, eq. 5)

    Code, formulae, numbers, identifiers and symbols are in no language and do not count, up to a
    share of the words: a thought with more of them is written in them. The script decides, so a
    Latin word of another language counts as English. Linear in the length of the response.

    Args:
        response: the text that the policy sampled.
        truth: not used.
        target: "en" or "zh".
        thought_opened: the prompt ended with `<think>`, so the response starts inside the thought.
        **entry: the prompt's other fields, which are not used.

    Returns:
        The fraction with its reason; 0 for a response without a thought, and for a thought without
        words.

    Raises:
        ValueError: another target."""
    if not isinstance(target, str) or target not in LANGUAGE_NAMES:
        raise ValueError(f"target must be one of {', '.join(LANGUAGE_NAMES)}, got {target!r}")
    thought = chain_of_thought(response, thought_opened)
    if thought is None:
        return Grade(0.0, "no chain of thought")
    words = judged_words(thought)
    if not words.total:
        return Grade(0.0, "no words in the chain of thought")
    fraction = getattr(words, target) / words.total
    counts = f"English {words.en:.0f}, Chinese {words.zh:.0f}, other {words.other_scripts:.0f}"
    return Grade(fraction, f"{fraction:.1%} of its words are {LANGUAGE_NAMES[target]} ({counts})")


DIGIT_RUN = re.compile(r"\d+")
WHITE_SPACE = re.compile(r"\s+")
# Any odd number has an inverse modulo 2**64; this one has its bits spread (the golden ratio).
HASH_BASE = 0x9E3779B97F4A7C15
INVERSE = pow(HASH_BASE, -1, 2**64)


def grade_repetition(
    response: str,
    truth: object = None,
    *,
    window: int = 50,
    mask_numbers: bool = False,
    **entry: object,
) -> Grade:
    """Return 1 when no `window` characters of the response occur twice, near 0 when it is one loop.

        reward = different windows / windows,   a window being n consecutive characters

    The n-gram repetition penalty of "Demystifying Long Chain-of-Thought Reasoning" (arXiv
    2502.03373, appendix C), inverted so that 1 is no repetition. Characters instead of words need
    no segmentation, and with a long window (50: some eight words of English) formulae and phrases
    may occur again: only long copies count. White space, case, zero-width characters and accents
    make no difference.

    Args:
        response: the text that the policy sampled.
        truth: not used.
        window: the number of characters of a window.
        mask_numbers: whether digits make no difference either, so that a counter in a loop does not
            hide it; many cases worked through in the same words then count as repetition too.
        **entry: the prompt's other fields, which are not used.

    Returns:
        The fraction with its reason; 1 for a response shorter than a window.

    Raises:
        ValueError: a window that is not a positive integer."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be a positive number of characters, got {window!r}")
    # Once more for the accents of whole characters; millions of accents in a row, which decomposing
    # sorts in quadratic time, are gone by then.
    text = INVISIBLE_CHARS.sub("", unicodedata.normalize("NFKD", INVISIBLE_CHARS.sub("", response)))
    text = WHITE_SPACE.sub(" ", text).strip().casefold()
    if mask_numbers:
        text = DIGIT_RUN.sub("0", text)
    num_windows = len(text) - window + 1
    if num_windows < 1:
        return Grade(1.0, f"shorter than {window} characters: nothing to repeat")
    hashes = window_hashes(text, window)
    hashes.sort()  # np.unique is ten times slower here
    num_different = 1 + np.count_nonzero(hashes[1:] != hashes[:-1])
    fraction = num_different / num_windows
    return Grade(
        float(fraction), f"{1 - fraction:.1%} of its {window}-character windows came before"
    )


def window_hashes(text: str, window: int) -> np.ndarray:
    """Return a polynomial hash of the window at each i, modulo 2**64.

    It is Σ text[i + k] · HASH_BASE^k.

    uint64, (len(text) - window + 1,). Equal windows have equal hashes. Two prefix sums and a factor
    give each hash, so the cost does not depend on the window's length."""
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32)
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(
        (codes.astype(np.uint64) + np.uint64(1)) * _cumulative_powers(HASH_BASE, len(codes)),
        out=sums[1:],
    )
    windows = sums[window:] - sums[:-window]
    return windows * _cumulative_powers(INVERSE, len(windows))


def _cumulative_powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, out=powers)
