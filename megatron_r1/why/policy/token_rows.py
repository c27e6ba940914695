"""Holds logged tokens as a model's input, and makes other inputs from them: with other experts,
joined, or trained on with their prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRow:
    """One sequence of tokens of a response: all of it, or a branch of an episode.

    Attributes:
        token_ids: int64, (tokens,).
        is_sampled: bool, (tokens,): those that the policy sampled.
        logprobs: float32, (sampled tokens,): the engine's.
        response: the number of the response in the step.
        advantage: each token's; NaN: it is not trained on.
        num_sampled: the sampled tokens of the response with all its branches.
        token_advantages: each sampled token's, float64, where they differ; None: `advantage`.
        targets: int64, (tokens,): the token whose log-probability is computed at each; None:
            `token_ids`.
        positions: int64, (tokens,), where they are not counted from 0, as in a packed row.
        experts: int16, (tokens, MoE layers, experts per token): the experts that the model uses
            instead of those that its routers choose; -1: the router's choice for this token; None:
            the routers' choice for all tokens.
        kept_ids: the ids that the engine could draw each sampled token from, as two tensors: how
            many they are for each token, (sampled tokens,), and the ids of all tokens one after the
            other, int64; None: it drew from the whole vocabulary."""

    token_ids: Tensor
    is_sampled: Tensor
    logprobs: Tensor
    response: int
    advantage: float
    num_sampled: int
    kept_ids: tuple[Tensor, Tensor] | None = None
    token_advantages: Tensor | None = None
    targets: Tensor | None = None
    positions: Tensor | None = None
    experts: Tensor | None = None

    @property
    def is_trained(self) -> bool:
        """Whether the row has an advantage."""
        return not math.isnan(self.advantage)


def rows_with_own_experts(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Return rows whose experts the model chooses, as the trainer's reference does."""
    return [replace(row, experts=None) for row in rows]


def rows_with_shifted_experts(rows: Sequence[TokenRow], shift: int) -> list[TokenRow]:
    """Return rows with the engine's experts moved to other tokens; those of the tokens that get
    none are the router's choice.

    Args:
        rows: the sequences.
        shift: 1: to the token after; -1: to the token before."""
    shifted_rows = []
    for row in rows:
        experts = None
        if row.experts is not None:
            experts = torch.full_like(row.experts, -1)
            source, target = (slice(-1), slice(1, None))[::shift]
            experts[target] = row.experts[source]
        shifted_rows.append(replace(row, experts=experts))
    return shifted_rows


def join_rows(rows: Sequence[TokenRow], restarts: bool) -> TokenRow:
    """Return rows end to end as one.

    Args:
        rows: in the order in which they are joined.
        restarts: whether positions begin anew with each."""
    kept_ids = [row.kept_ids for row in rows if row.kept_ids is not None]
    experts = [row.experts for row in rows if row.experts is not None]
    token_ids = torch.cat([row.token_ids for row in rows])
    positions = [torch.arange(len(row.token_ids)) for row in rows]
    return replace(
        rows[0],
        token_ids=token_ids,
        is_sampled=torch.cat([row.is_sampled for row in rows]),
        kept_ids=(
            torch.cat([counts for counts, _ in kept_ids]),
            torch.cat([ids for _, ids in kept_ids]),
        )
        if kept_ids
        else None,
        experts=torch.cat(experts) if experts else None,
        positions=torch.cat(positions) if restarts else torch.arange(len(token_ids)),
    )


def row_with_prompt(row: TokenRow) -> TokenRow:
    """Return a row whose tokens are all trained on; the engine's log-probability of those that it
    has not sampled is 0, as in the trainer."""
    logprobs = torch.zeros(len(row.token_ids))
    logprobs[row.is_sampled] = row.logprobs
    return replace(
        row,
        is_sampled=torch.arange(len(row.token_ids)) > 0,
        logprobs=logprobs[1:],
        num_sampled=len(row.token_ids) - 1,
        kept_ids=None,
    )
