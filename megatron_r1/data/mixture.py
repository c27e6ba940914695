"""Files of supervised examples, mixed in every epoch, each with its count, repeats or share."""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.sft import MixturePart
from megatron_r1.data.data_report import DataReport
from megatron_r1.data.sft import ExampleSampler, SFTExample, load_examples


@dataclass(frozen=True)
class LoadedPart:
    """The examples of one file.

    Attributes:
        path: the file.
        examples: all of its examples.
        num_per_epoch: how many of them an epoch has, repeats counted.
        report: the counts of its rows."""

    path: str
    examples: list[SFTExample]
    num_per_epoch: int
    report: DataReport = field(default_factory=DataReport)


def load_mixture(parts: Sequence[MixturePart]) -> list[LoadedPart]:
    """Read every file of a mixture.

    DeepSeek-R1's last supervised stage mixes 600k examples of reasoning and 200k others, for two
    epochs (arXiv 2501.12948).

    Raises:
        UserError: a bad file, or a file too small for its share.
    """
    reports = [DataReport(part.path) for part in parts]
    examples_by_part = [
        load_examples(part.path, part.columns, part.where, report)
        for part, report in zip(parts, reports, strict=True)
    ]
    counts = epoch_counts(parts, [len(examples) for examples in examples_by_part])
    files = (part.path for part in parts)
    return [
        LoadedPart(*part) for part in zip(files, examples_by_part, counts, reports, strict=True)
    ]


def epoch_counts(parts: Sequence[MixturePart], sizes: Sequence[int]) -> list[int]:
    """Return how many examples of each part an epoch has.

    Shares are of the whole epoch. Parts with a count or repeat fix its size; if all parts have
    shares, it is the largest epoch that repeats nothing. Examples beyond a file's share come up in
    later epochs.

    Args:
        parts: the recipe's entries.
        sizes: the number of examples in each file.

    Raises:
        UserError: a share that would need repeats."""
    fixed_counts = [_fixed_count(part, size) for part, size in zip(parts, sizes, strict=True)]
    shares = [part.share or 0.0 for part in parts]
    if not any(shares):
        return [count or 0 for count in fixed_counts]
    num_fixed = sum(count or 0 for count in fixed_counts)
    if num_fixed:
        epoch_size = round(num_fixed / (1 - sum(shares)))
    else:
        # The epsilon: 600 / 0.6 must not become 999.
        epoch_size = min(
            math.floor(size / share + 1e-6) for size, share in zip(sizes, shares, strict=True)
        )
    by_share = _round_to(epoch_size - num_fixed, [share * epoch_size for share in shares])
    counts = [n if f is None else f for n, f in zip(by_share, fixed_counts, strict=True)]
    for part, size, count in zip(parts, sizes, counts, strict=True):
        if part.share is not None and count > size:
            raise UserError(
                f"sft.data: {part.path} has {size:,} examples, its share {part.share:g} of an "
                f"epoch of {epoch_size:,} are {count:,}; lower the share, or set "
                f"repeat: {count / size:.2f}",
                key="sft.data",
                cause=Cause.TOO_LARGE,
            )
    return counts


class MixtureSampler(ExampleSampler):
    """Draws epochs that have exactly `num_per_epoch` examples of every part.

    Where that is no multiple of the file's size, each epoch has the next examples of the file, so
    that all come up equally often. Order and state are as `EpochSampler`'s; a state is refused
    after a file or a count has changed.

    Args:
        parts: each with the examples of a file and their number in an epoch.
        seed: the seed of all shuffles.
        shuffled: whether the examples of an epoch are mixed.
    """

    def __init__(self, parts: Sequence[LoadedPart], seed: int, shuffled: bool = True) -> None:
        self._counts = [(len(i.examples), i.num_per_epoch) for i in parts]
        examples = [example for i in parts for example in i.examples]
        super().__init__(examples, seed, shuffled)
        content = f"{self._fingerprint}{self._counts}"
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]

    def _epoch_order(self) -> list[int]:
        order: list[int] = []
        start = 0
        for number, (size, count) in enumerate(self._counts):
            indices = list(range(start, start + size))
            num_repeats, num_more = divmod(count, size)
            order += indices * num_repeats
            random.Random(f"{self.seed}/part {number}").shuffle(indices)
            first = self.epoch * num_more
            order += sorted(indices[(first + i) % size] for i in range(num_more))
            start += size
        if self.shuffled:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order


def describe_mixture(parts: Sequence[LoadedPart]) -> list[str]:
    """Return a line about each part, with its share of an epoch."""
    total = sum(i.num_per_epoch for i in parts)
    return [
        f"{i.num_per_epoch:,} examples of {i.path} ({i.num_per_epoch / total:.1%} of an epoch; it "
        f"has {len(i.examples):,})"
        for i in parts
    ]


def _fixed_count(part: MixturePart, size: int) -> int | None:
    if part.share is not None:
        return None
    return part.count or max(1, round(size * (part.repeat or 1.0)))


def _round_to(total: int, exact: Sequence[float]) -> list[int]:
    """Round `exact` to integers whose sum is `total`: the largest remainders are rounded up."""
    counts = [math.floor(number + 1e-9) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in [i for i in by_remainder if exact[i]][: total - sum(counts)]:
        counts[i] += 1
    return counts
