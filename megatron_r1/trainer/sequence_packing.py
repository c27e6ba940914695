"""Packs samples into one micro-batch of tensors, end to end, with no attention between samples.

Position t of a sample predicts token t + 1, so the response's tokens are targets at positions
prompt_length - 1 … length - 2; the last position of every sample predicts nothing. Of these, tokens
that were given (`Sample.is_sampled`) are left out: "response tokens" here are the sampled ones. A
sample that is not trained on (`Sample.is_trained`) has no response token and counts for no
response, so that no sum and no denominator of any loss has it.

With context parallelism every sample is padded to a multiple of 2 * ranks. The whole micro-batch
is packed first, and each rank keeps its positions of every tensor (`models.context_parallel`), so
targets and advantages come from the whole sample. For attention, padding belongs to the sample
before it, where causal masking hides it from real tokens; it is never a response token."""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from r1_kernels import SamplingMask
from torch import Tensor

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.context_parallel import gathered_order, positions_of_rank
from megatron_r1.models.host_packed_seq_params import HostPackedSeqParams, mark_positions
from megatron_r1.models.platform import to_device
from megatron_r1.models.routing_replay import RecordedRouting
from megatron_r1.models.sampling_mask import decode_mask
from megatron_r1.models.shared_prefixes import WholeSequences, mark_prefixes, whole_sequences
from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.routing import RoutingShard, pack_routing
from megatron_r1.trainer.token_split import PackedLayout, TokenSplit, packed_layout
from megatron_r1.trainer.training_sample import Sample


def pack_batch(
    samples: list[Sample],
    split: TokenSplit,
    device: torch.device,
    routing: RoutingShard | RecordedRouting | None = None,
    share_prompts: bool = False,
    num_mtp_layers: int = 0,
) -> PackedMicrobatch:
    """Pack `samples`, possibly none, and return this rank's part, T tokens on `device`.

    The batch is padded to `split.batch_multiple` by a sample without response.

    Args:
        samples: the micro-batch.
        split: how its tokens are divided between ranks.
        device: the device of the tensors.
        routing: what this rank replays, if anything: the part of the samples' routing, or what the
            leader of its replica has cut of it.
        share_prompts: tokens that an earlier sample has are not there again (`PrefixMatcher`,
            `models.shared_prefixes`).
        num_mtp_layers: MTP layers that are trained."""
    if isinstance(routing, RoutingShard):
        routing = pack_routing(samples, split, routing)
    layout = packed_layout(samples, split, share_prompts)
    cu_seqlens = layout.cu_seqlens
    tokens = _packed_tokens(samples, layout)
    on_device = partial(to_device, device=device)
    local_positions = positions_of_rank(cu_seqlens, *split.context_rank_and_size)
    values = _response_values(samples, layout)
    is_response, advantages, rollout_logprobs, teacher, weights = (
        tensor[local_positions] for tensor in values
    )
    positions, params = _positions_and_params(layout, local_positions, split, on_device)
    if num_mtp_layers:
        next_token_index, rows = _mtp_targets(
            cu_seqlens, values[0], local_positions, split, num_mtp_layers
        )
        params.next_token_index = on_device(next_token_index)
        params.mtp_target_rows = tuple(on_device(layer_rows) for layer_rows in rows)
    has_teacher = all(sample.teacher_logprobs is not None for sample in samples)
    has_branches = any(sample.weight != 1 for sample in samples)
    num_responses = sum(s.num_responses for s in samples if s.is_trained)
    mask_parts = _sampling_mask(samples, layout, local_positions)
    sampling_mask = SamplingMask(*map(on_device, mask_parts)) if mask_parts is not None else None
    if routing is not None:
        routing = routing._replace(
            experts=on_device(routing.experts), is_recorded=on_device(routing.is_recorded)
        )
    # One tensor for two fields: `advantages` is replaced, never written into, once the rollout
    # has log-probabilities, and the algorithm computes what replaces it from the other.
    outcome_advantages = on_device(advantages)
    return PackedMicrobatch(
        input_ids=on_device(tokens[local_positions][None]),
        position_ids=positions[None],
        packed_seq_params=params,
        cu_seqlens=on_device((cu_seqlens // split.context_size).int()),
        targets=on_device(tokens.roll(-1)[local_positions]),
        is_response=on_device(is_response),
        response_positions=on_device(is_response.nonzero()[:, 0]),
        num_responses=num_responses if split.context_rank == 0 else 0,
        outcome_advantages=outcome_advantages,
        advantages=outcome_advantages,
        rollout_logprobs=on_device(rollout_logprobs),
        last_token_positions=on_device(_last_tokens(samples, layout, local_positions)),
        labels=on_device(torch.tensor([s.label for s in samples], dtype=torch.float32)),
        logprobs={"teacher": on_device(teacher)} if has_teacher else {},
        sequence_weights=on_device(weights) if has_branches else None,
        sampling_mask=sampling_mask,
        num_shared_tokens=sum(layout.skipped),
        routing=routing,
    )


def _positions_and_params(
    layout: PackedLayout,
    local_positions: Tensor,
    split: TokenSplit,
    on_device: Callable[[Tensor], Tensor],
) -> tuple[Tensor, HostPackedSeqParams]:
    """Return the positions within their samples of the tokens at `local_positions`, and the
    samples' borders as attention takes them."""
    cu_seqlens = layout.cu_seqlens
    attention_cu_seqlens = on_device(cu_seqlens.int())
    position = torch.arange(int(cu_seqlens[-1]))
    position -= cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    if layout.continued is not None:
        sequences = None
        if attention_cu_seqlens.device.type != "cpu":
            places, borders, max_length = whole_sequences(cu_seqlens, layout.continued)
            sequences = WholeSequences(on_device(places), on_device(borders), max_length)
        mark_prefixes(attention_cu_seqlens, layout.continued, sequences)
        position += layout.continued.start.repeat_interleave(cu_seqlens.diff())
    positions = on_device(position[local_positions])
    mark_positions(attention_cu_seqlens, positions)
    return positions, _packed_seq_params(attention_cu_seqlens, split, int(position.max()) + 1)


def _last_tokens(samples: list[Sample], layout: PackedLayout, local_positions: Tensor) -> Tensor:
    """Return where among `local_positions` each sample's last token is, (S,); -1: on another
    context rank."""
    local_indices = torch.full((int(layout.cu_seqlens[-1]),), -1)
    local_indices = local_indices.index_copy(0, local_positions, torch.arange(len(local_positions)))
    ends = [start + len(sample) - 1 for start, sample in zip(layout.starts, samples, strict=True)]
    return local_indices[torch.tensor(ends, dtype=torch.int64)]


def _mtp_targets(
    cu_seqlens: Tensor,
    is_response: Tensor,
    local_positions: Tensor,
    split: TokenSplit,
    num_mtp_layers: int,
) -> tuple[Tensor, list[Tensor]]:
    """Return the `next_token_index` and `mtp_target_rows` of `HostPackedSeqParams`.

    Args:
        cu_seqlens: (S + 1,) int64, where the samples begin, and the end.
        is_response: (T,) bool of the whole micro-batch.
        local_positions: int64, the positions of this rank.
        split: how context and tensor parallelism divide the tokens.
        num_mtp_layers: the number of MTP layers."""
    next_token_index = torch.arange(1, int(cu_seqlens[-1]) + 1)
    next_token_index[cu_seqlens[1:] - 1] = -1
    rows, is_target = [], is_response
    for _ in range(num_mtp_layers):
        is_target = is_target[next_token_index] & (next_token_index >= 0)
        rows.append(is_target[local_positions].nonzero()[:, 0])
    # Where each position is when the context ranks' parts are gathered rank after rank.
    gathered_indices = gathered_order(cu_seqlens, split.context_size)
    next_positions = next_token_index[local_positions]
    return torch.where(next_positions >= 0, gathered_indices[next_positions], -1), rows


def _packed_tokens(samples: list[Sample], layout: PackedLayout) -> Tensor:
    """Return the token ids of the micro-batch, (T,) int64, 0 in padding."""
    # bytearray: torch warns of a read-only buffer.
    ids = [torch.frombuffer(bytearray(s.token_ids), dtype=torch.int32).long() for s in samples]
    tokens = torch.zeros(int(layout.cu_seqlens[-1]), dtype=torch.int64)
    for token_ids, start, skip in zip(ids, layout.starts, layout.skipped, strict=True):
        tokens[start + skip : start + len(token_ids)] = token_ids[skip:]
    return tokens


def _response_values(samples: list[Sample], layout: PackedLayout) -> tuple[Tensor, ...]:
    """Return the whole micro-batch's is_response (bool), outcome_advantages, rollout_logprobs,
    teacher and sequence_weights (fp32), (T,) each, 0 outside responses; see `PackedMicrobatch`."""
    total = int(layout.cu_seqlens[-1])
    is_response = torch.zeros(total, dtype=torch.bool)
    advantages, rollout_logprobs, teacher, weights = per_token = torch.zeros(4, total)
    for sample, start in zip(samples, layout.starts, strict=True):
        if not sample.is_trained:
            continue
        response = slice(start + sample.prompt_length - 1, start + len(sample) - 1)
        is_response[response] = True
        if sample.is_sampled:
            is_sampled = torch.frombuffer(bytearray(sample.is_sampled), dtype=torch.uint8)
            is_response[response] = is_sampled.bool()
        advantages[response] = sample.outcome_advantage
        weights[response] = sample.weight / max(1, int(is_response[response].sum()))
        for values, encoded_values in (
            (rollout_logprobs, sample.rollout_logprobs),
            (teacher, sample.teacher_logprobs),
        ):
            if encoded_values:
                values[response] = torch.frombuffer(bytearray(encoded_values), dtype=torch.float32)
    if any(sample.is_sampled for sample in samples):
        per_token[:, ~is_response] = 0.0
    return is_response, *per_token


def _sampling_mask(
    samples: list[Sample], layout: PackedLayout, local_positions: Tensor
) -> SamplingMask | None:
    """Return the kept ids of the tokens that are trained on, at the positions `local_positions`;
    None where no sample has any.

    Raises:
        ValueError: ids that do not fit their sample, or samples with and without ids in one
            micro-batch: these would need the whole vocabulary at each token."""
    are_trained = [s.is_trained and len(s) > s.prompt_length for s in samples]
    if not any(sample.sampling_mask for sample in samples):
        return None
    counts = torch.zeros(int(layout.cu_seqlens[-1]), dtype=torch.int64)
    parts = [torch.empty(0, dtype=torch.int32)]
    for sample, start, is_trained in zip(samples, layout.starts, are_trained, strict=True):
        if not is_trained:
            continue
        if not sample.sampling_mask:
            raise ValueError("a micro-batch has responses with sampling masks and others without")
        length = len(sample) - sample.prompt_length
        num_kept, kept_ids = map(np.array, decode_mask(sample.sampling_mask, length))
        if sample.is_sampled:
            is_sampled = np.frombuffer(sample.is_sampled, np.uint8) > 0
            kept_ids = kept_ids[np.repeat(is_sampled, num_kept)]
            num_kept = np.where(is_sampled, num_kept, 0)
        first = start + sample.prompt_length - 1
        counts[first : first + length] = torch.from_numpy(num_kept)
        parts.append(torch.from_numpy(kept_ids))
    token_ids, starts = torch.cat(parts), counts.cumsum(0) - counts
    lengths = counts[local_positions]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    shift = (starts[local_positions] - offsets[:-1]).repeat_interleave(lengths)
    return SamplingMask(token_ids[torch.arange(int(offsets[-1])) + shift], offsets)


def check_token_ids(samples: Iterable[Sample], vocab_size: int) -> None:
    """Raise UserError for a token that the model does not have. On the CPU, where the samples come
    from: the loss head need not wait for the device to look at its targets."""
    for sample in samples:
        ids = np.frombuffer(sample.token_ids, np.int32)
        wrong_ids = ids[(ids < 0) | (ids >= vocab_size)]
        if len(wrong_ids):
            raise UserError(
                f"a sample has token {wrong_ids[0]}, and the model's vocab_size is {vocab_size}: "
                "give model.path the tokenizer that belongs to its config.json",
                key="model.path",
                cause=Cause.CONFLICT,
            )


def _packed_seq_params(cu_seqlens: Tensor, split: TokenSplit, longest: int) -> HostPackedSeqParams:
    """Return the borders of samples as Megatron takes them.

    Args:
        cu_seqlens: (samples + 1,), the borders.
        split: this rank's part of the tokens.
        longest: positions of the longest sample."""
    params = HostPackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    if split.context_size > 1:
        # The same tensor, because padding belongs to its sample: Transformer Engine would take
        # different unpadded borders as gaps between samples, which its flash attention refuses.
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = cu_seqlens
    return params
