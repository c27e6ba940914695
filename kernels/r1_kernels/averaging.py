"""The average of a loss over packed sequences, at token or sequence level, as weights of tokens.

`Averaging` makes a mask into these weights. `Sequences` sums over each sequence, also where several
ranks hold parts of it."""

from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from r1_kernels.arguments import check_cu_seqlens, check_finite
from r1_kernels.registry import Primitives

Level = Literal["token", "sequence"]


class Sequences:
    """S sequences packed into T tokens: sums over each, and per-sequence values per token.

    With a group, each of its ranks holds some tokens of every sequence, and every rank gets the
    sums of the whole sequences.

    Args:
        cu_seqlens: (S + 1,) integers from 0 to T.
        num_tokens: T.
        primitives: the implementation that sums.
        group: the ranks that share the sequences; None: this one alone.

    Raises:
        ValueError: cu_seqlens do not rise from 0 to T, or are not (S + 1,) integers."""

    def __init__(
        self,
        cu_seqlens: Tensor,
        num_tokens: int,
        primitives: Primitives,
        group: ProcessGroup | None = None,
    ):
        check_cu_seqlens(cu_seqlens, num_tokens)
        self.cu_seqlens, self.num_tokens = cu_seqlens, num_tokens
        self.primitives, self.group = primitives, group

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum over each sequence, (S,), from values (T,)."""
        sums = self.primitives.segment_sums(values, self.cu_seqlens)
        if self.group is not None:
            # Over the ranks that share the sequences: each has summed its own tokens alone.
            dist.all_reduce(sums, group=self.group)
        return sums

    def spread(self, values: Tensor) -> Tensor:
        """Return for each token, (T,), the value of its sequence, from values (S,)."""
        lengths = self.cu_seqlens.diff()
        return values.repeat_interleave(lengths, output_size=self.num_tokens)

    def means(self, values: Tensor, unmasked: Tensor) -> Tensor:
        """Return for each token, (T,), the mean of `values` over its sequence's unmasked tokens."""
        total = self.sums(torch.where(unmasked, values, 0.0))
        count = self.sums(unmasked.to(total.dtype))
        return self.spread(total / count.clamp(min=1))


class Averaging(NamedTuple):
    """The average over the tokens' losses, as in the arguments of `policy_loss`.

    Attributes:
        ratio_level: "token" or "sequence".
        average: "token" or "sequence".
        denominator: what the sum is divided by; None: counted.
        cu_seqlens: (S + 1,) borders of the sequences; None: they are not needed.
        sequence_group: the ranks that share the sequences; None: this one alone."""

    ratio_level: Level = "token"
    average: Level = "token"
    denominator: float | Tensor | None = None
    cu_seqlens: Tensor | None = None
    sequence_group: ProcessGroup | None = None

    def sequences(self, num_tokens: int, primitives: Primitives) -> Sequences | None:
        """Return the sequences of the batch, or None if `average` and `ratio_level` need none.

        Args:
            num_tokens: T.
            primitives: the implementation that sums.

        Raises:
            ValueError: unknown names, missing or wrong borders, and a group of several ranks
                without a denominator: a rank cannot count the tokens of other ranks."""
        group = self.sequence_group
        if group is not None and dist.get_world_size(group) == 1:
            group = None
        if group is not None and self.denominator is None:
            raise ValueError(
                "sequence_group needs a denominator: give the number over all ranks, or 1 for the "
                "sum"
            )
        for name in ("average", "ratio_level"):
            if getattr(self, name) not in get_args(Level):
                raise ValueError(f"{name} is {getattr(self, name)!r}: use token or sequence")
        if "sequence" not in (self.average, self.ratio_level):
            return None
        if self.cu_seqlens is None:
            name = "average" if self.average == "sequence" else "ratio_level"
            raise ValueError(f'{name}="sequence" needs cu_seqlens, the borders of the sequences')
        return Sequences(self.cu_seqlens, num_tokens, primitives, group)

    def weights(self, mask: Tensor, sequences: Sequences | None, dtype: torch.dtype) -> Tensor:
        """Return the weights (T,) of `dtype` with which Σ weight · loss is the average.

        average "token": mask / denominator, by default Σ mask. "sequence": the weights of a
        sequence add up to 1 / denominator, by default the number of sequences with an unmasked
        token (GRPO). Without any unmasked token all weights are 0.

        Args:
            mask: (T,) bool, integers or weights.
            sequences: those of the batch; None with average "token".
            dtype: the dtype of the weights.

        Raises:
            ValueError: the denominator is not one positive number; the value of a tensor is not
                checked."""
        denominator = self.denominator
        if isinstance(denominator, Tensor):
            if denominator.numel() != 1:
                raise ValueError(f"denominator must be one number, got {tuple(denominator.shape)}")
            denominator = denominator.reshape(())
        elif denominator is not None:
            check_finite("denominator", denominator)
            if not denominator > 0:
                raise ValueError(f"denominator is {denominator}: it must be positive")
        mask = mask.to(dtype)
        weights = torch.where(mask <= 0, 0.0, mask)
        if self.average == "sequence":
            assert sequences is not None, "average is sequence"
            totals = sequences.sums(weights)
            weights = weights / sequences.spread(torch.where(totals == 0, 1.0, totals))
            count = (totals != 0).sum()
        else:
            count = weights.sum()
        if denominator is None:
            denominator = torch.where(count == 0, 1.0, count.to(weights.dtype))
        return weights / denominator
