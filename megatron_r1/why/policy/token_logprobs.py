"""Computes log-probabilities of logged tokens by one model of transformers that is in memory, on
the CPU.

A pass has a few responses, padded on the right, which a causal model does not see. Where experts
were recorded, the routers choose these (`expert_replay`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy.expert_replay import row_replay
from megatron_r1.why.policy.token_rows import TokenRow

TOKENS_AT_ONCE, LOGITS_AT_ONCE = 4096, 2**26
"""Tokens and logits of a forward pass, padding included, unless one response has more."""
BYTES_PER_LOGIT = 28
"""fp32 logits, and in float64 their log-softmax, its exponentials and a gradient."""


def length_batches(rows: Sequence[TokenRow], vocabulary: int) -> Iterator[list[int]]:
    """Yield indices of rows of similar length, as many as fit into a pass."""
    max_tokens = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocabulary)
    batch: list[int] = []
    for index in sorted(
        range(len(rows)), key=lambda index_of_row: -len(rows[index_of_row].token_ids)
    ):
        longest = len(rows[(batch or [index])[0]].token_ids)
        if batch and longest * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def token_logits(model: Any, rows: Sequence[TokenRow]) -> list[Tensor]:
    """Return of each row the logits that predict its sampled tokens, (sampled tokens, vocabulary)
    float32."""
    with parametrize.cached(), row_replay(model, rows):  # adapters are merged once
        out = model(use_cache=False, **forward_inputs(rows)).logits
    return [
        out[index, : len(row.token_ids) - 1][row.is_sampled[1:]] for index, row in enumerate(rows)
    ]


def forward_inputs(rows: Sequence[TokenRow]) -> dict[str, Tensor]:
    """Return the inputs of a model for rows, padded on the right to the longest, (rows, tokens)
    each."""
    longest = max(len(row.token_ids) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row.token_ids)] = row.token_ids
    return {"input_ids": ids, **_position_inputs(rows, longest)}


def _position_inputs(rows: Sequence[TokenRow], longest: int) -> dict[str, Tensor]:
    """Return the positions of rows that have some, with a mask that keeps transformers from taking
    positions that begin anew for the borders of sequences."""
    if all(row.positions is None for row in rows):
        return {}
    positions = torch.arange(longest).repeat(len(rows), 1)
    for index, row in enumerate(rows):
        if row.positions is not None:
            positions[index, : len(row.positions)] = row.positions
    return {"position_ids": positions, "attention_mask": torch.ones_like(positions)}


def token_logprobs_and_entropies(
    logits: Tensor, row: TokenRow, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy of each sampled token, float64: over the ids that the
    engine kept, where it kept a part.

    Args:
        logits: (sampled tokens, vocabulary).
        row: the sequence.
        temperature: the logits are divided by it.

    Raises:
        CannotRecompute: a sampled token is not among the ids that were kept for it."""
    logits = logits.double() / temperature
    ids = (row.token_ids if row.targets is None else row.targets)[row.is_sampled][:, None]
    if row.kept_ids is None:
        logprobs = torch.log_softmax(logits, dim=-1)
    else:
        counts, kept_ids = row.kept_ids
        is_cut = torch.ones(logits.shape, dtype=torch.bool)
        is_cut[torch.arange(len(counts)).repeat_interleave(counts), kept_ids] = False
        logprobs = torch.log_softmax(logits.masked_fill(is_cut, -math.inf), dim=-1)
        if bool(is_cut.gather(1, ids).any()):
            raise CannotRecompute("a sampled token is not among those that its engine kept")
        logprobs = logprobs.masked_fill(is_cut, 0)  # entropy counts 0 log 0 as 0
    return logprobs.gather(1, ids)[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@torch.no_grad()
def sampled_logprobs(
    model: Any, rows: Sequence[TokenRow], temperatures: Sequence[float] = (1.0,)
) -> list[list[Tensor]]:
    """Return the log-probability of every sampled token, float64, by temperature and row.

    Args:
        model: as `read_model` returns it.
        rows: the sequences.
        temperatures: the logits are divided by each."""
    logprobs_by_temperature: list[list[Tensor]] = [
        [torch.empty(0)] * len(rows) for _ in temperatures
    ]
    for batch in length_batches(rows, model.config.vocab_size):
        for index, logits in zip(
            batch, token_logits(model, [rows[row_index] for row_index in batch]), strict=True
        ):
            for row_logprobs, temperature in zip(
                logprobs_by_temperature, temperatures, strict=True
            ):
                row_logprobs[index] = token_logprobs_and_entropies(
                    logits, rows[index], temperature
                )[0]
    return logprobs_by_temperature
