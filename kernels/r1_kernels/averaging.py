"""What each token's loss weighs: token-level or sequence-level averages over packed sequences."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from r1_kernels.arguments import check_cu_seqlens

AVERAGES = ("token", "sequence")
RATIO_LEVELS = ("token", "sequence")


class Sequences:
    """S sequences laid end to end in T tokens; sums over them, and values spread back over them.

    With a group, each of its ranks holds some tokens of every sequence; sums are the whole
    sequences', on every rank."""

    def __init__(
        self,
        cu_seqlens: Tensor,
        tokens: int,
        primitives: ModuleType,
        group: ProcessGroup | None = None,
    ):
        """cu_seqlens: (S + 1,) integers from 0 to T. Raises ValueError for anything else."""
        check_cu_seqlens(cu_seqlens, tokens)
        self.cu_seqlens, self.tokens, self.primitives = cu_seqlens, tokens, primitives
        self.group = group

    def sums(self, values: Tensor) -> Tensor:
        """(T,) → (S,)."""
        sums = self.primitives.segment_sums(values, self.cu_seqlens)
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        return sums

    def spread(self, values: Tensor) -> Tensor:
        """(S,) → (T,): each token its sequence's value."""
        lengths = self.cu_seqlens.diff()
        return values.repeat_interleave(lengths, output_size=self.tokens)

    def means(self, values: Tensor, seen: Tensor) -> Tensor:
        """(T,) → (T,): each token the mean of `values` over the seen tokens of its sequence."""
        total = self.sums(torch.where(seen, values, 0.0))
        count = self.sums(seen.to(total.dtype))
        return self.spread(total / count.clamp(min=1))


def find_sequences(
    cu_seqlens: Tensor | None,
    tokens: int,
    average: str,
    ratio_level: str,
    primitives: ModuleType,
    group: ProcessGroup | None = None,
) -> Sequences | None:
    """The batch's sequences, if `average` or `ratio_level` needs them. Raises ValueError for names
    that do not exist and for borders that are missing or wrong."""
    if average not in AVERAGES:
        raise ValueError(f"average is {average!r}: use token or sequence")
    if ratio_level not in RATIO_LEVELS:
        raise ValueError(f"ratio_level is {ratio_level!r}: use token or sequence")
    if "sequence" not in (average, ratio_level):
        return None
    if cu_seqlens is None:
        what = "average" if average == "sequence" else "ratio_level"
        raise ValueError(f'{what}="sequence" needs cu_seqlens, the borders of the sequences')
    return Sequences(cu_seqlens, tokens, primitives, group)


def sequence_group_of(
    group: ProcessGroup | None, denominator: float | Tensor | None
) -> ProcessGroup | None:
    """`group`, or None where it is one rank. Raises ValueError for a group without a denominator:
    a rank cannot count the other ranks' tokens."""
    if group is None or dist.get_world_size(group) == 1:
        return None
    if denominator is None:
        raise ValueError(
            "sequence_group needs a denominator: give the number over all ranks, or 1 for the sum"
        )
    return group


def token_weights(
    mask: Tensor,
    average: str,
    denominator: float | Tensor | None,
    sequences: Sequences | None,
    dtype: torch.dtype,
) -> Tensor:
    """Weights (T,) of `dtype` that make Σ weight · loss the average.

    average "token": mask / denominator, the denominator by default Σ mask; "sequence": the weights
    of one sequence add up to 1 / denominator, by default the number of sequences with anything
    seen (GRPO). A batch with nothing seen has weights 0. Raises ValueError for a number that is not
    positive; a tensor's value is not looked at."""
    if isinstance(denominator, int | float) and not denominator > 0:
        raise ValueError(f"denominator is {denominator}: it must be positive")
    mask = mask.to(dtype)
    weights = torch.where(mask <= 0, 0.0, mask)
    if average == "sequence":
        totals = sequences.sums(weights)
        weights = weights / sequences.spread(torch.where(totals == 0, 1.0, totals))
        count = (totals != 0).sum()
    else:
        count = weights.sum()
    if denominator is None:
        denominator = torch.where(count == 0, 1.0, count.to(weights.dtype))
    return weights / denominator
