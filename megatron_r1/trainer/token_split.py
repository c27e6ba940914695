"""The positions of a packed micro-batch, and the ranks that share its tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_r1.models.context_parallel import positions_of_rank
from megatron_r1.models.shared_prefixes import SharedPrefixes
from megatron_r1.trainer.prefix_matching import PrefixMatcher
from megatron_r1.trainer.training_sample import Sample


@dataclass(frozen=True)
class TokenSplit:
    """The split of a micro-batch's tokens between the ranks that share it.

    Attributes:
        tensor_size: size of the sequence-parallel group, which divides what a context rank holds.
        tensor_rank: this rank's index in that group.
        context_size: size of the context-parallel group.
        context_rank: this rank's index in that group.
        token_multiple: the tokens of each rank are a multiple of it, as FP8 products need."""

    tensor_size: int = 1
    tensor_rank: int = 0
    context_size: int = 1
    context_rank: int = 0
    token_multiple: int = 1

    @property
    def context_rank_and_size(self) -> tuple[int, int]:
        """The rank in the context-parallel group, and the group's size."""
        return self.context_rank, self.context_size

    @property
    def sample_multiple(self) -> int:
        """Every sample is padded to a multiple of this."""
        return 2 * self.context_size if self.context_size > 1 else 1

    @property
    def batch_multiple(self) -> int:
        """The whole micro-batch is padded to a multiple of this."""
        return math.lcm(
            self.sample_multiple, self.tensor_size * self.context_size * self.token_multiple
        )


class PackedLayout(NamedTuple):
    """The positions of a micro-batch's tokens: samples, then padding.

    Attributes:
        cu_seqlens: (samples + padding + 1,) int64, from 0 to T.
        starts: the position where token 0 of each sample is, or would be if its `skipped` first
            tokens were not shared; its own token i is at starts + i.
        skipped: for each sample the number of its first tokens that an earlier sample has for it.
        continued: the earlier samples that these continue; None where none does.
    """

    cu_seqlens: Tensor
    starts: list[int]
    skipped: list[int]
    continued: SharedPrefixes | None


def packed_layout(
    samples: Sequence[Sample], split: TokenSplit, share_prompts: bool = False
) -> PackedLayout:
    """Return where the tokens of a packed micro-batch are, the same on all ranks that share it.

    Args:
        samples: the micro-batch, possibly none.
        split: how its tokens are divided, which decides the padding.
        share_prompts: leave out tokens that an earlier sample has."""
    matcher = PrefixMatcher()
    if share_prompts:
        own_lengths = [matcher.add(sample) for sample in samples]
    else:
        own_lengths = [len(sample) for sample in samples]
    skipped = matcher.prefix_lengths or [0] * len(samples)
    padded_lengths = [length + -length % split.sample_multiple for length in own_lengths]
    filler = -sum(padded_lengths) % split.batch_multiple if padded_lengths else split.batch_multiple
    cu_seqlens = torch.tensor([0, *padded_lengths, *([filler] if filler else [])]).cumsum(0)
    own_starts = cu_seqlens.tolist()[: len(samples)]
    starts = [start - skip for start, skip in zip(own_starts, skipped, strict=True)]
    shared_prefixes = None
    if any(skipped):
        parents, firsts = [*matcher.parents, *[-1] * bool(filler)], [*skipped, *[0] * bool(filler)]
        shared_prefixes = SharedPrefixes(torch.tensor(parents), torch.tensor(firsts))
    return PackedLayout(cu_seqlens, starts, skipped, shared_prefixes)


def routed_positions(cu_seqlens: Tensor, split: TokenSplit) -> Tensor:
    """Return the positions (int64) that this rank's routers process: the tensor rank's share of its
    context rank's tokens.

    Args:
        cu_seqlens: (segments + 1,), the micro-batch's, as in its `PackedLayout`.
        split: the rank's."""
    local_positions = positions_of_rank(cu_seqlens, *split.context_rank_and_size)
    return local_positions.view(split.tensor_size, -1)[split.tensor_rank]
