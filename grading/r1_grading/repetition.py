"""Repetition: the share of the response's text that has not occurred in it before.

    reward = different windows / windows,   a window being n consecutive characters

The n-gram repetition penalty of "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373,
appendix C), inverted so that 1 is no repetition. Characters instead of words need no segmentation,
and with a long window (50: some eight words of English) formulae and phrases may occur again: only
long copies count."""

import re
import unicodedata

import numpy as np

from r1_grading.reading.languages import INVISIBLE
from r1_grading.rewards import Grade

NUMBER = re.compile(r"\d+")
WHITE_SPACE = re.compile(r"\s+")
# Any odd number has an inverse modulo 2**64; this one has its bits spread (the golden ratio).
BASE = 0x9E3779B97F4A7C15
INVERSE = pow(BASE, -1, 2**64)


def grade(
    response: str,
    truth: object = None,
    *,
    window: int = 50,
    mask_numbers: bool = False,
    **entry: object,
) -> Grade:
    """Return 1 when no `window` characters of the response occur twice, near 0 when it is one loop.

    White space, case, zero-width characters and accents make no difference. mask_numbers: neither
    do digits, so that a counter in a loop does not hide it; many cases worked through in the same
    words then count as repetition too. A response shorter than a window has 1. Raises ValueError
    for a window that is not a positive integer."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be a positive number of characters, got {window!r}")
    # Once more for the accents of whole characters; millions of accents in a row, which decomposing
    # sorts in quadratic time, are gone by then.
    text = INVISIBLE.sub("", unicodedata.normalize("NFKD", INVISIBLE.sub("", response)))
    text = WHITE_SPACE.sub(" ", text).strip().casefold()
    if mask_numbers:
        text = NUMBER.sub("0", text)
    num_windows = len(text) - window + 1
    if num_windows < 1:
        return Grade(1.0, f"shorter than {window} characters: nothing to repeat")
    hashes = window_hashes(text, window)
    hashes.sort()  # np.unique is ten times slower here
    num_different = 1 + np.count_nonzero(hashes[1:] != hashes[:-1])
    share = num_different / num_windows
    return Grade(float(share), f"{1 - share:.1%} of its {window}-character windows came before")


def window_hashes(text: str, window: int) -> np.ndarray:
    """Return, for each i, the polynomial Σ text[i + k] · BASE^k modulo 2**64 over the window at i.

    uint64, (len(text) - window + 1,). Equal windows have equal hashes. Two prefix sums and a factor
    give each hash, so the cost does not depend on the window's length."""
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32)
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * _powers(BASE, len(codes)), out=sums[1:])
    windows = sums[window:] - sums[:-window]
    return windows * _powers(INVERSE, len(windows))


def _powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, out=powers)
