"""Tries whether an engine has experts that are not the checkpoint's: stale ones, exchanged ones, or
another function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from megatron_r1.reporting.formatting import format_number
from megatron_r1.why.checks.engine_causes import MIN_TOKENS, DepartureCause
from megatron_r1.why.checks.engine_gaps import EngineGaps

MAX_PAIRS = 64
"""Pairs of experts that are tried as exchanged ones."""
MAX_CANDIDATE_EXPERTS = 4
"""Experts that are tried as the one, or two, that differ."""
EXPERT_REMEDY = (
    "the push of that expert (docs/push.md), rollout.expert_parallel, rollout.redundant_experts"
)


class ExpertGap(NamedTuple):
    """The mean |difference| of an expert's tokens, and of the layer's other tokens."""

    layer: str
    expert: int
    routed_gap: float
    other_gap: float


def departing_expert(gaps: EngineGaps) -> DepartureCause | None:
    """Look for experts whose tokens differ more than others."""
    ranked = experts_by_gap(gaps)
    candidates = ranked[:MAX_CANDIDATE_EXPERTS]
    for candidate in candidates:
        if (cause := _stale_expert(gaps, candidate.layer, candidate.expert)) is not None:
            return cause
    if candidates and gaps.policies.models.is_streamed:  # each would read the whole checkpoint
        gaps.untried_causes.append("exchanged experts")
        candidates = []
    for layer, expert, other_expert in _exchangeable_expert_pairs(gaps, candidates):
        sources = {expert: other_expert, other_expert: expert}
        engine = gaps.explained_engine(gaps.changed_parts.logprobs_with_experts(layer, sources))
        if engine is not None:
            return DepartureCause(
                f"experts {min(sources)} and {max(sources)} of {_layer_name(layer)} are exchanged "
                f"in {engine.name}: {engine.gap_sizes}",
                EXPERT_REMEDY,
            )
    if not ranked or gaps.distance <= gaps.tolerance:
        return None
    worst = ranked[0]
    if worst.routed_gap < 4 * worst.other_gap:
        return None
    return DepartureCause(
        f"tokens of expert {worst.expert} of {_layer_name(worst.layer)} differ by "
        f"{format_number(worst.routed_gap)}, others by {format_number(worst.other_gap)}: the "
        "engine has another expert there",
        EXPERT_REMEDY,
    )


def experts_by_gap(gaps: EngineGaps) -> list[ExpertGap]:
    """Return the experts of all layers, those first whose tokens differ most from the others'."""
    differences, ranked = np.abs(np.concatenate(gaps.gaps)), []
    for layer, experts_of_sequences in gaps.policies.experts().items():
        experts = np.concatenate(experts_of_sequences)
        for expert in range(int(experts.max()) + 1):
            is_routed = (experts == expert).any(1)
            if is_routed.sum() < MIN_TOKENS:
                continue
            routed_gap = float(np.nanmean(differences[is_routed]))
            is_few = (~is_routed).sum() < MIN_TOKENS  # all tokens go through it
            other_gap = routed_gap if is_few else float(np.nanmean(differences[~is_routed]))
            ranked.append(ExpertGap(layer, expert, routed_gap, other_gap))
    return sorted(ranked, key=lambda gap: -gap.routed_gap / max(gap.other_gap, 1e-12))


def _stale_expert(gaps: EngineGaps, layer: str, expert: int) -> DepartureCause | None:
    """Try the expert's weights of earlier versions."""
    stale = gaps.stale_version(partial(gaps.changed_parts.logprobs_with_old_expert, layer, expert))
    if stale is None:
        return None
    version, engine = stale
    return DepartureCause(
        f"expert {expert} of {_layer_name(layer)} has the weights of version {version} in "
        f"{engine.name}, not {gaps.newest_version}: {engine.gap_sizes}",
        EXPERT_REMEDY,
    )


def _exchangeable_expert_pairs(
    gaps: EngineGaps, candidates: Sequence[ExpertGap]
) -> list[tuple[str, int, int]]:
    """Return pairs of experts of a layer that may be exchanged: the candidates with each other, and
    with experts that few tokens may have been routed to."""
    pairs = [
        (candidate.layer, candidate.expert, other_candidate.expert)
        for index, candidate in enumerate(candidates)
        for other_candidate in candidates[index + 1 :]
        if candidate.layer == other_candidate.layer
    ]
    for candidate in candidates:
        pairs += [
            (candidate.layer, candidate.expert, other_expert)
            for other_expert in range(gaps.changed_parts.num_experts(candidate.layer))
            if other_expert != candidate.expert
        ]
    pairs_by_experts: dict[tuple[str, frozenset[int]], tuple[str, int, int]] = {}
    for layer, expert, other_expert in pairs:
        pairs_by_experts.setdefault(
            (layer, frozenset((expert, other_expert))), (layer, expert, other_expert)
        )
    return [*pairs_by_experts.values()][:MAX_PAIRS]


def _layer_name(name: str) -> str:
    return name.removesuffix(".mlp.experts")
