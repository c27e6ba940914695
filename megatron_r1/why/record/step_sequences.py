"""Makes the sequences of tokens that a step trains on, as its log has them."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.models.routing_shape import RoutingShape
from megatron_r1.models.sampling_mask import DecodedMask, decode_mask
from megatron_r1.why.comparison import ResponseIndex


class TokenSequence(NamedTuple):
    """One sequence of tokens that is trained on: a response behind its prompt, or a branch.

    Attributes:
        response: its response.
        token_ids: int32.
        is_sampled: bool.
        logprobs: float32, of the sampled tokens.
        versions: int32, likewise.
        advantage: NaN: not trained on.
        num_sampled: the sampled tokens of the response.
        kept_ids: the ids that the engine drew each sampled token from; None: the whole vocabulary.
        experts: int16, (tokens, MoE layers, experts per token), those that the engine chose, -1
            where it chose none; None without routing replay."""

    response: ResponseIndex
    token_ids: np.ndarray
    is_sampled: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    advantage: float
    num_sampled: int
    kept_ids: DecodedMask | None
    experts: np.ndarray | None


def response_sequences(
    index: ResponseIndex,
    group: Group,
    graded: GradedResponse,
    advantage: float,
    shape: RoutingShape | None,
) -> Iterator[TokenSequence]:
    """Yield the sequences of a response.

    Args:
        index: the response.
        group: its group.
        graded: the response.
        advantage: its advantage.
        shape: the sizes of the engine's routing; None: it is not replayed."""
    response, branches = graded.response, graded.episode.branches if graded.episode else []
    if not branches:
        ids = np.concatenate([np.asarray(group.prompt_ids, np.int32), response.token_ids])
        is_sampled = np.arange(len(ids)) >= len(group.prompt_ids)
        logprobs = np.asarray(response.logprobs, np.float32)
        versions, count = np.asarray(response.policy_versions), len(response.token_ids)
        trained_advantage = advantage if count else math.nan
        kept_ids = _decode_kept_ids(response.sampling_mask, np.ones(count, bool))
        experts = _token_experts(response.routing, len(ids), shape)
        yield TokenSequence(
            index, ids, is_sampled, logprobs, versions, trained_advantage, count, kept_ids, experts
        )
        return
    total = sum(branch.num_sampled for branch in branches)
    for branch in branches:
        is_sampled = np.frombuffer(branch.is_sampled, bool)
        end = int(np.flatnonzero(is_sampled)[-1]) + 1
        yield TokenSequence(
            index,
            np.asarray(branch.token_ids, np.int32)[:end],
            is_sampled[:end],
            np.asarray(branch.logprobs, np.float32)[is_sampled],
            np.asarray(branch.policy_versions)[is_sampled],
            advantage,
            total,
            _decode_kept_ids(branch.sampling_mask, np.frombuffer(branch.is_sampled, bool)),
            _token_experts(branch.routing, len(branch.token_ids), shape, end),
        )


def _decode_kept_ids(mask: bytes, is_sampled: np.ndarray) -> DecodedMask | None:
    """Return the kept ids of the sampled tokens.

    Args:
        mask: the ids of all tokens (`models.sampling_mask`); empty: there was no cut.
        is_sampled: (tokens,) bool; the others have no ids."""
    if not mask:
        return None
    counts, ids = decode_mask(mask, len(is_sampled))
    return DecodedMask(counts[is_sampled], ids)


def _token_experts(
    routing: bytes | memoryview, num_tokens: int, shape: RoutingShape | None, end: int | None = None
) -> np.ndarray | None:
    """Return the experts of each token, as `TokenSequence.experts`.

    Args:
        routing: rows of the tokens before the last, the first ones may be missing.
        num_tokens: the tokens that it belongs to.
        shape: its sizes; None: it is not replayed.
        end: the tokens that are wanted; the last of them is not fed to a model; None: all."""
    if shape is None:
        return None
    experts = np.full((num_tokens, len(shape.moe_layers), shape.topk), -1, np.int16)
    rows = np.frombuffer(routing, f"<u{shape.index_bytes}").reshape(-1, *experts.shape[1:])
    experts[num_tokens - 1 - len(rows) : num_tokens - 1] = rows
    experts = experts[:end]
    experts[-1:] = -1
    return experts
