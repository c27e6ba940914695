"""What a loss gets: the tensors of one packed micro-batch, and the LM head as a loss sees it.

The head gives log-probabilities, or a whole policy loss with its gradients. Only response tokens
pass through it; prompts and padding cost nothing there.

Importing it needs no Megatron, so that a loss or an algorithm can be computed and tested
without."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from r1_kernels import (
    Averaging,
    LinearPolicyLoss,
    PolicySettings,
    SamplingMask,
    TokenTensors,
    linear_policy_loss_from_settings,
    linear_token_logprobs,
)
from r1_kernels.arguments import trusted_values
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.config.algorithms import RatioLevel

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_r1.models.routing_replay import RecordedRouting


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
    num_responses: int
    """The samples that are trained on, the branches of an episode counted as one, on the first
    context rank; 0 on the others, so that the sum over ranks is the number of responses."""
    last_token_positions: Tensor
    """(S,) int64: where the last token of each sample without padding is; -1: another rank's."""

    is_response: Tensor
    """(T,) bool: whether the target is a response token that is trained on."""
    response_positions: Tensor
    """int64: the positions where it is."""
    response_rewards_or_advantages: Tensor
    """(T,) fp32: what the controller sent for the response (`Sample.reward_or_advantage`) on each
    of its tokens, 0 elsewhere."""
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


class TokenWeights(NamedTuple):
    """What a response token weighs in a micro-batch's sum (`losses.token_weights`).

    Attributes:
        mask: (T,) bool or fp32, the response tokens or their weights.
        average: "token", or "sequence" for a mask that is divided by its sum over each sequence.
        denominator: what the sum is divided by."""

    mask: Tensor
    average: Literal["token", "sequence"] = "token"
    denominator: int = 1


@dataclass(frozen=True)
class LossHead:
    """The hidden states of one micro-batch, and the head's weight.

    Attributes:
        batch: the micro-batch of T tokens.
        hidden: (T, H), whose gradient Megatron sums over `tensor_group`.
        weight: (V_local, H), this rank's rows.
        temperature: the logits are divided by it.
        tensor_group: the tensor-parallel ranks.
        vocab_size: number of tokens; rows beyond are padding.
        context_group: the ranks that hold the other parts of the samples.
        main_grad: (V_local, H) fp32, to which the backward pass adds the weight's gradient; None:
            autograd gets it.
        stores_old_logprobs: whether `logprobs` stores its result as batch.logprobs["old"] where
            there is none: in the update of a policy, which starts at π_old (`policy_loss` always
            does)."""

    batch: PackedBatch
    hidden: Tensor
    weight: Tensor
    temperature: float
    tensor_group: ProcessGroup
    vocab_size: int
    context_group: ProcessGroup | None = None
    main_grad: Tensor | None = None
    stores_old_logprobs: bool = False

    def logprobs(self) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities and entropy of the response tokens, over what was kept.

        Returns:
            Each (T,) fp32 (fp64 for fp64), nats, 0 at other positions."""
        rows = self.batch.response_positions
        with trusted_values():  # `packed.check_token_ids` has seen the targets
            logprobs, entropy = linear_token_logprobs(
                self.hidden[rows],
                self.weight,
                self.batch.targets[rows],
                sampling_mask=self._kept_at(rows),
                **self._options(),
            )
        zeros = logprobs.new_zeros(len(self.hidden))
        logprobs, entropy = (zeros.index_copy(0, rows, values) for values in (logprobs, entropy))
        if self.stores_old_logprobs:
            self.batch.logprobs.setdefault("old", logprobs.detach())
        return logprobs, entropy

    def policy_loss(
        self, settings: PolicySettings, weights: TokenWeights, ratio_level: RatioLevel = "token"
    ) -> LinearPolicyLoss:
        """Return the policy loss of the response tokens for `batch.advantages`.

        Uses batch.logprobs["old"] and, if there, ["ref"]. Without "old" the current policy is the
        old one (ratio 1), and its log-probabilities are stored as "old".

        Args:
            settings: those of a token's loss; with an `importance_cap` the difference between the
                engine's and the trainer's log-probabilities is corrected.
            weights: what each token weighs.
            ratio_level: "sequence" for one ratio per response."""
        batch = self.batch
        tokens = TokenTensors(
            logprobs=None,
            old_logprobs=batch.logprobs.get("old"),
            ref_logprobs=batch.logprobs.get("ref"),
            rollout_logprobs=None if settings.importance_cap is None else batch.rollout_logprobs,
            advantages=batch.advantages,
            weights=weights.mask,
        )
        averaging = Averaging(
            ratio_level=ratio_level,
            average=weights.average,
            denominator=weights.denominator,
            cu_seqlens=batch.cu_seqlens,
            sequence_group=self.context_group,
        )
        with trusted_values():  # and `pack_batch` makes cu_seqlens
            terms = linear_policy_loss_from_settings(
                self.hidden,
                self.weight,
                batch.targets,
                tokens,
                settings,
                averaging,
                rows=batch.response_positions,
                sampling_mask=batch.sampling_mask,
                **self._options(),
            )
        batch.logprobs.setdefault("old", terms.logprobs)
        return terms

    def _kept_at(self, rows: Tensor) -> SamplingMask | None:
        """Return the kept ids of all response tokens, `rows`."""
        if self.batch.sampling_mask is None:
            return None
        # Other tokens have no ids: those of one row end where those of the next begin.
        token_ids, offsets = self.batch.sampling_mask
        return SamplingMask(token_ids, torch.cat([offsets[rows], offsets[-1:]]))

    def _options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "group": self.tensor_group,
            "vocab_size": self.vocab_size,
            # The LMHead's gather or copy sums it over the group, in the backward pass.
            "reduce_hidden_grad": False,
            "main_grad": self.main_grad,
        }
