"""The tensors of one packed micro-batch.

Importing it needs no Megatron, so that a loss or an algorithm can be computed and tested
without."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from r1_kernels import SamplingMask
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_r1.models.routing_replay import RecordedRouting


@dataclass
class PackedMicrobatch:
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
    num_responses: int
    """The samples that are trained on, the branches of an episode counted as one, on the first
    context rank; 0 on the others, so that the sum over ranks is the number of responses."""
    last_token_positions: Tensor
    """(S,) int64: where the last token of each sample without padding is; -1: another rank's."""

    is_response: Tensor
    """(T,) bool: whether the target is a response token that is trained on."""
    response_positions: Tensor
    """int64: the positions where it is."""
    outcome_advantages: Tensor
    """(T,) fp32: the `Sample.outcome_advantage` of the response on each of its tokens, 0
    elsewhere."""
    advantages: Tensor
    """(T,) fp32: the advantage of each response token, 0 elsewhere: the response's, until
    `RolloutBatches.store_targets` puts those of an algorithm's `token_advantages` here."""
    rollout_logprobs: Tensor
    """(T,) fp32: the engine's, 0 outside responses."""
    labels: Tensor
    """(S,) fp32: the samples' own, for score models."""
    logprobs: dict[str, Tensor] = field(default_factory=dict)
    """fp32 (T,) by name, 0 outside responses: "old" (π_old) and "ref" (π_ref) are computed by the
    trainer, "teacher" is there where all samples have it."""
    sequence_weights: Tensor | None = None
    """(T,) fp32: what a response token weighs in an average per response, 1 / (sampled tokens of
    the response, or of the whole episode), 0 elsewhere; None where every sample is a whole one."""

    sampling_mask: SamplingMask | None = None
    """The tokens that the sampler kept at each of the T positions, none where `is_response` is
    False; None: the whole vocabulary everywhere."""
    num_shared_tokens: int = 0
    """Tokens of samples that are not in the batch, because their prompt is there already."""

    routing: RecordedRouting | None = None
    """The experts to replay on this rank (`models.routing_replay`), of its own layers and, under
    sequence parallelism, its own part of the T tokens; None without routing replay."""
    values: Tensor | None = None
    """(T,) fp32: the critic's before each response token, 0 elsewhere."""
    returns: Tensor | None = None
    """(T,) fp32: the targets of the values, computed with the token advantages."""
