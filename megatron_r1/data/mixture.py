"""Several files of examples in one epoch, each with its share.

DeepSeek-R1's last supervised stage has 600k examples of reasoning and 200k of all else, for two
epochs (arXiv 2501.12948).
"""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.config.mixture import MixturePart
from megatron_r1.data.sampler import EpochSampler
from megatron_r1.data.sft import Example, load_examples


@dataclass(frozen=True)
class Ingredient:
    """examples: all of a file's. num_per_epoch: how many of them an epoch has, repeats counted."""

    path: str
    examples: list[Example]
    num_per_epoch: int


def load_mixture(parts: Sequence[MixturePart]) -> list[Ingredient]:
    """Every part with its examples. Raises ValueError for a bad file, and for a share that its file
    is too small for."""
    loaded = [load_examples(part.path, part.columns) for part in parts]
    counts = epoch_counts(parts, [len(examples) for examples in loaded])
    return [Ingredient(p.path, e, n) for p, e, n in zip(parts, loaded, counts, strict=True)]


def epoch_counts(parts: Sequence[MixturePart], sizes: Sequence[int]) -> list[int]:
    """How many examples of each part an epoch has; sizes: of their files.

    Shares are of the whole epoch. Where parts have a count or repeat, these fix its size; where all
    have shares, it is the largest epoch that repeats nothing. What a file has beyond its share
    takes its turn in later epochs. Raises ValueError for a share that would have to repeat.
    """
    fixed = [_fixed_count(part, size) for part, size in zip(parts, sizes, strict=True)]
    shares = [part.share or 0.0 for part in parts]
    if not any(shares):
        return [count or 0 for count in fixed]
    num_fixed = sum(count or 0 for count in fixed)
    if num_fixed:
        total = round(num_fixed / (1 - sum(shares)))
    else:
        # The epsilon: 600 / 0.6 must not become 999.
        total = min(
            math.floor(size / share + 1e-6) for size, share in zip(sizes, shares, strict=True)
        )
    wanted = _round_to(total - num_fixed, [share * total for share in shares])
    counts = [n if f is None else f for n, f in zip(wanted, fixed, strict=True)]
    for part, size, count in zip(parts, sizes, counts, strict=True):
        if part.share is not None and count > size:
            raise ValueError(
                f"sft.data: {part.path} has {size:,} examples, its share {part.share:g} of an "
                f"epoch of {total:,} are {count:,}; lower the share, or say how often with "
                f"repeat: {count / size:.2f}"
            )
    return counts


class MixtureSampler(EpochSampler[Example]):
    """Draws epochs that have exactly `num_per_epoch` of every ingredient; of those that are not
    whole multiples of their file each epoch has the next ones, so that all come up equally often.
    State and order as `EpochSampler`'s; a state is refused where a file or a count has changed."""

    def __init__(self, ingredients: Sequence[Ingredient], seed: int, shuffled: bool = True) -> None:
        self._counts = [(len(i.examples), i.num_per_epoch) for i in ingredients]
        examples = [example for i in ingredients for example in i.examples]
        super().__init__(examples, seed, lambda e: f"{e.prompt}\0{e.response}", shuffled)
        whole = f"{self._fingerprint}{self._counts}"
        self._fingerprint = hashlib.sha256(whole.encode()).hexdigest()[:16]

    def _shuffle(self) -> list[int]:
        order: list[int] = []
        start = 0
        for number, (size, count) in enumerate(self._counts):
            turns = list(range(start, start + size))
            times, rest = divmod(count, size)
            order += turns * times
            random.Random(f"{self.seed}/part {number}").shuffle(turns)
            first = self.epoch * rest
            order += sorted(turns[(first + i) % size] for i in range(rest))
            start += size
        if self.shuffled:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order


def describe(ingredients: Sequence[Ingredient]) -> list[str]:
    """A line for each, with its share of an epoch."""
    total = sum(i.num_per_epoch for i in ingredients)
    return [
        f"{i.num_per_epoch:,} examples of {i.path} ({i.num_per_epoch / total:.1%} of an epoch; it "
        f"has {len(i.examples):,})"
        for i in ingredients
    ]


def _fixed_count(part: MixturePart, size: int) -> int | None:
    """None for a share."""
    if part.share is not None:
        return None
    return part.count or max(1, round(size * (part.repeat or 1.0)))


def _round_to(total: int, wanted: Sequence[float]) -> list[int]:
    """Whole numbers near `wanted` with the sum `total`: largest remainders are rounded up."""
    counts = [math.floor(number + 1e-9) for number in wanted]
    by_remainder = sorted(range(len(wanted)), key=lambda i: counts[i] - wanted[i])
    for i in [i for i in by_remainder if wanted[i]][: total - sum(counts)]:
        counts[i] += 1
    return counts
