"""Packs samples into one micro-batch of tensors, end to end, with no attention between samples.
`Scores` reads one score per sample back out of it, for reward models.

Position t of a sample predicts token t + 1, so the response's tokens are targets at positions
prompt_length - 1 … length - 2; the last position of every sample predicts nothing. A sample's mask
leaves out the tokens in between that were given: "response tokens" here are the sampled ones. A
sample that is not trained on (`Sample.is_trained`) has no response token and counts for no
trajectory, so that no sum and no denominator of any loss has it.

With context parallelism every sample is padded to a multiple of 2 * ranks. The whole micro-batch
is packed first, and each rank keeps its positions of every tensor (`models.context_parallel`), so
targets and advantages come from the whole sample. For attention, padding belongs to the sample
before it, where causal masking hides it from real tokens; it is never a response token.

A reward model's score of a text is read at its last token. That position may be on any rank of the
context group. All these ranks compute the same loss from the same scores; the gradient reaches the
rank that has the position, and the sample is counted on the first context rank
(`PackedBatch.num_trajectories`)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.context_parallel import held_positions
from megatron_r1.models.prefixes import with_prefixes
from megatron_r1.models.replay import RecordedRouting
from megatron_r1.trainer.batch import PackedBatch
from megatron_r1.trainer.routing import RoutingPart, recorded_routing
from megatron_r1.trainer.token_split import Placement, TokenSplit, placed
from megatron_r1.trainer.training_sample import Sample


def packed_batch(
    samples: list[Sample],
    split: TokenSplit,
    device: torch.device,
    routing: RoutingPart | RecordedRouting | None = None,
    share_prompts: bool = False,
) -> PackedBatch:
    """Pack `samples`, possibly none, and return this rank's part, T tokens on `device`.

    The batch is padded to `split.batch_multiple` by a sample without response.

    Args:
        samples: the micro-batch.
        split: how its tokens are divided between ranks.
        device: the device of the tensors.
        routing: what this rank replays, if anything: the part of the samples' routing, or what the
            leader of its replica has cut of it.
        share_prompts: tokens that an earlier sample has are not there again (`SharedTokens`,
            `models.prefixes`)."""
    if isinstance(routing, RoutingPart):
        routing = recorded_routing(samples, split, routing)
    placement = placed(samples, split, share_prompts)
    cu_seqlens, total = placement.cu_seqlens, int(placement.cu_seqlens[-1])
    tokens = _tokens(samples, placement)
    attention_cu_seqlens = cu_seqlens.int().to(device)
    position = torch.arange(total) - cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    if placement.continued is not None:
        with_prefixes(attention_cu_seqlens, placement.continued)
        position += placement.continued.first.repeat_interleave(cu_seqlens.diff())
    held = held_positions(cu_seqlens, *split.of_context)
    # The inverse of `held`, -1 for positions on other context ranks.
    here = torch.full((total,), -1).index_copy(0, held, torch.arange(len(held)))
    ends = [at + len(sample) - 1 for at, sample in zip(placement.starts, samples, strict=True)]
    is_response, advantages, rollout_logprobs, teacher, weights = (
        whole[held] for whole in _response_values(samples, placement)
    )
    has_teacher = all(sample.teacher is not None for sample in samples)
    has_branches = any(sample.weight != 1 for sample in samples)
    num_trajectories = sum(s.num_trajectories for s in samples if s.is_trained)
    return PackedBatch(
        input_ids=tokens[held][None].to(device),
        position_ids=position[held][None].to(device),
        packed_seq_params=_packed_seq_params(attention_cu_seqlens, split, int(position.max()) + 1),
        cu_seqlens=(cu_seqlens // split.context).int().to(device),
        targets=tokens.roll(-1)[held].to(device),
        is_response=is_response.to(device),
        response_rows=is_response.nonzero()[:, 0].to(device),
        num_trajectories=num_trajectories if split.context_rank == 0 else 0,
        advantages=advantages.to(device),
        rollout_logprobs=rollout_logprobs.to(device),
        last_tokens=here[torch.tensor(ends, dtype=torch.int64)].to(device),
        labels=torch.tensor([s.label for s in samples], dtype=torch.float32, device=device),
        logprobs={"teacher": teacher.to(device)} if has_teacher else {},
        sequence_weights=weights.to(device) if has_branches else None,
        num_shared=sum(placement.skipped),
        routing=routing and RecordedRouting(*(part.to(device) for part in routing)),
    )


def _tokens(samples: list[Sample], placement: Placement) -> Tensor:
    """Return the token ids of the micro-batch, (T,) int64, 0 in padding."""
    # bytearray: torch warns of a read-only buffer.
    ids = [torch.frombuffer(bytearray(s.token_ids), dtype=torch.int32).long() for s in samples]
    tokens = torch.zeros(int(placement.cu_seqlens[-1]), dtype=torch.int64)
    for own, start, skip in zip(ids, placement.starts, placement.skipped, strict=True):
        tokens[start + skip : start + len(own)] = own[skip:]
    return tokens


def _response_values(samples: list[Sample], placement: Placement) -> tuple[Tensor, ...]:
    """Return the whole micro-batch's is_response (bool), advantages, rollout_logprobs, teacher and
    sequence_weights (fp32), (T,) each, 0 outside responses; see `PackedBatch`."""
    total = int(placement.cu_seqlens[-1])
    is_response = torch.zeros(total, dtype=torch.bool)
    advantages, rollout_logprobs, teacher, weights = per_token = torch.zeros(4, total)
    for sample, start in zip(samples, placement.starts, strict=True):
        if not sample.is_trained:
            continue
        response = slice(start + sample.prompt_length - 1, start + len(sample) - 1)
        is_response[response] = True
        if sample.mask:
            mask = torch.frombuffer(bytearray(sample.mask), dtype=torch.uint8)
            is_response[response] = mask.bool()
        advantages[response] = sample.advantage
        weights[response] = sample.weight / max(1, int(is_response[response].sum()))
        for values, encoded in ((rollout_logprobs, sample.logprobs), (teacher, sample.teacher)):
            if encoded:
                values[response] = torch.frombuffer(bytearray(encoded), dtype=torch.float32)
    if any(sample.mask for sample in samples):
        per_token[:, ~is_response] = 0.0
    return is_response, *per_token


def check_token_ids(samples: Iterable[Sample], vocab_size: int) -> None:
    """Raise UserError for a token that the model does not have. On the host, where the samples come
    from: the loss head need not wait for the device to look at its targets."""
    for sample in samples:
        ids = np.frombuffer(sample.token_ids, np.int32)
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if len(wrong):
            raise UserError(
                f"a sample has token {wrong[0]}, and the model's vocab_size is {vocab_size}: give "
                "model.path the tokenizer that belongs to its config.json",
                key="model.path",
                cause=Cause.CONFLICT,
            )


def _packed_seq_params(cu_seqlens: Tensor, split: TokenSplit, longest: int) -> PackedSeqParams:
    """Return the borders of samples as Megatron takes them.

    Args:
        cu_seqlens: (samples + 1,), the borders.
        split: this rank's part of the tokens.
        longest: positions of the longest sample."""
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    if split.context > 1:
        # The same tensor, because padding belongs to its sample: Transformer Engine would take
        # different unpadded borders as gaps between samples, which its flash attention refuses.
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = cu_seqlens
    return params


@dataclass(frozen=True)
class Scores:
    """The output of a score head for one micro-batch.

    Attributes:
        every: (T,) fp32, the score after each token of this rank.
        context_group: the ranks that hold the other tokens."""

    batch: PackedBatch
    every: Tensor
    context_group: ProcessGroup

    def at_last_tokens(self) -> Tensor:
        """Return the scores (S,) fp32 at the last token of each sample, on every context rank."""
        at = self.batch.last_tokens
        held = torch.where(at >= 0, self.every[at.clamp(min=0)], 0.0)
        # Over the context group: of each sample one rank has the score, the others 0. Megatron's
        # "tensor" region sums over any group in the forward pass and is the identity backward.
        return reduce_from_tensor_model_parallel_region(held, group=self.context_group)
