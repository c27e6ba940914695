"""The tensors of one packed micro-batch, as losses and estimators read them.

Importing it needs no Megatron, so that a loss can be computed and tested without."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_r1.models.replay import RecordedRouting


@dataclass
class PackedBatch:
    """T tokens of S samples laid end to end: a whole micro-batch, or a context rank's part of one.
    Tensors of (T,) are indexed by the predicting position."""

    input_ids: Tensor
    """(1, T) int64."""
    position_ids: Tensor
    """(1, T) int64, from 0 in every sample."""
    targets: Tensor
    """(T,) int64: the token after each position."""

    packed_seq_params: PackedSeqParams
    """`cu_seqlens` of the whole micro-batch, for attention."""
    cu_seqlens: Tensor
    """(S + 1,) int32, from 0 to T: where each sample of this rank's part begins, and T."""
    num_trajectories: int
    """The samples that are trained on, the branches of a trajectory counted as one, on the first
    context rank; 0 on the others, so that the sum over ranks is the number of trajectories."""
    last_tokens: Tensor
    """(S,) int64: where the last token of each sample without padding is; -1: another rank's."""

    is_response: Tensor
    """(T,) bool: whether the target is a response token that is trained on."""
    response_rows: Tensor
    """int64: the positions where it is."""
    advantages: Tensor
    """(T,) fp32: the response's advantage on each of its tokens, 0 elsewhere. With an algorithm's
    `token_advantages` it is what these are computed from (`Sample.advantage`), until
    `ScoredRollout.store` puts each token's own advantage here."""
    rollout_logprobs: Tensor
    """(T,) fp32: the engine's, 0 outside responses."""
    labels: Tensor
    """(S,) fp32: the samples' own, for score models."""
    logprobs: dict[str, Tensor] = field(default_factory=dict)
    """fp32 (T,) by name, 0 outside responses: "old" (π_old) and "ref" (π_ref) are computed by the
    trainer, "teacher" is there where all samples have it."""
    sequence_weights: Tensor | None = None
    """(T,) fp32: what a response token weighs in an average per trajectory, 1 / (sampled tokens of
    the whole trajectory), 0 elsewhere; None where every sample is a whole trajectory."""

    num_shared: int = 0
    """Tokens of samples that are not in the batch, because their prompt is there already."""

    routing: RecordedRouting | None = None
    """The experts to replay on this rank (`models.replay`), of its own layers and, under sequence
    parallelism, its own part of the T tokens; None without routing replay."""
    values: Tensor | None = None
    """(T,) fp32: the critic's before each response token, 0 elsewhere."""
    returns: Tensor | None = None
    """(T,) fp32: the targets of the values, computed by the advantage estimator."""
