"""Tries whether an engine has weights that are not the checkpoint's: tensors of an earlier version,
or exchanged ones, and experts that are stale, exchanged, or another function."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, islice, pairwise
from typing import TYPE_CHECKING

import numpy as np

from megatron_r1.why.checks.engine_causes import DepartureCause
from megatron_r1.why.checks.engine_gaps import EngineGaps, ExplainedEngine, mean_gap

if TYPE_CHECKING:
    from torch import Tensor
from functools import partial
from typing import NamedTuple

from megatron_r1.reporting.formatting import format_number
from megatron_r1.why.checks.engine_causes import MIN_TOKENS

TRIED_TOKENS = 512
"""Sampled tokens that a change of the weights is tried on, before it is tried on all."""
MAX_TRIED = 128
"""Groups of tensors of a version, and exchanges, that are tried."""
MAX_NAMED = 4
"""Groups that are named where several explain a departure as well as one another."""
MAX_LAYERS_FOR_ALL_PAIRS = 8
"""The most layers of a model whose every pair is tried as exchanged; in larger ones, neighbors."""
LAYER = re.compile(r"(.*\.layers)\.(\d+)\.(.*)")
FUSED_MODULES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules that engines keep as one."""
EXCHANGEABLE_MODULES = (("gate_proj", "up_proj"), ("k_proj", "v_proj"))
"""Modules of a layer whose tensors may be taken for each other's."""
TENSOR_REMEDY = "the push of that tensor (docs/push.md): its name and place in the engine's model"
MAX_PAIRS = 64
"""Pairs of experts that are tried as exchanged ones."""
MAX_CANDIDATE_EXPERTS = 4
"""Experts that are tried as the one, or two, that differ."""
EXPERT_REMEDY = (
    "the push of that expert (docs/push.md), rollout.expert_parallel, rollout.redundant_experts"
)


def departing_tensor(gaps: EngineGaps) -> DepartureCause | None:
    """Try tensors of earlier versions, and simple exchanges."""
    means = {name: mean for name, mean in gaps.means_by_name().items() if mean > gaps.tolerance}
    if not means:
        return None
    tried_sequences = gaps.largest_gaps(max(means, key=lambda name: means[name]), TRIED_TOKENS)
    if not tried_sequences:
        return None
    search = TensorSearch(gaps, tried_sequences)
    return search.stale_tensors() or search.exchanged_tensors()


class TensorSearch:
    """Looks for the tensors that make an engine's log-probabilities others than the checkpoint's.

    Args:
        gaps: the differences.
        tried_sequences: the sequences that changes are tried on, all of the newest version."""

    def __init__(self, gaps: EngineGaps, tried_sequences: Sequence[int]) -> None:
        from megatron_r1.why.policy.changed_weights import ChangedWeights

        self._gaps = gaps
        self._weights = ChangedWeights(gaps.policies)
        self._sequences = [gaps.policies.computed_sequences[index] for index in tried_sequences]
        self._departure = np.concatenate([gaps.gaps[index] for index in tried_sequences])
        self._old_logprobs = np.concatenate(
            [gaps.policies.old_logprobs[index] for index in tried_sequences]
        )

    def stale_tensors(self) -> DepartureCause | None:
        """Try the tensors of the version before, and of the first."""
        newest_version = self._gaps.newest_version
        for version in sorted({max(0, newest_version - 1), 0} - {newest_version}, reverse=True):
            old_tensors = self._weights.version_tensors(version)
            if not old_tensors:
                continue
            groups = self._stale_groups(old_tensors)
            if not groups:
                continue
            nouns = list(groups)
            engine = self._explained_engine({name: old_tensors[name] for name in groups[nouns[0]]})
            if engine is not None:
                alternatives = "".join(f", or {noun}" for noun in nouns[1:MAX_NAMED])
                return DepartureCause(
                    f"{nouns[0]}{alternatives} in {engine.name} is of version {version}, "
                    f"not {newest_version}: {engine.gap_sizes}",
                    TENSOR_REMEDY,
                )
        return None

    def exchanged_tensors(self) -> DepartureCause | None:
        """Try exchanges of tensors."""
        for noun, sources in islice(tensor_exchanges(self._weights.tensors), MAX_TRIED):
            if self._mean_residual(self._effect_on_logprobs(sources)) > self._gaps.tolerance:
                continue
            if (engine := self._explained_engine(sources)) is not None:
                return DepartureCause(
                    f"{noun} are exchanged in {engine.name}: {engine.gap_sizes}", TENSOR_REMEDY
                )
        return None

    def _stale_groups(self, old_tensors: dict[str, Tensor]) -> dict[str, tuple[str, ...]]:
        """Return the groups of tensors, by noun, that explain the departure when they are older
        ones. The smallest comes first, of that which explains most and those that explain about as
        much.

        Parts of layers are tried in the order in which the older layers resemble the departure."""
        groups, layers = whole_groups(old_tensors)
        effects = {
            noun: self._effect_on_logprobs({name: old_tensors[name] for name in names})
            for noun, names in (groups | layers).items()
        }
        residuals = {noun: self._mean_residual(effect) for noun, effect in effects.items()}
        for layer in sorted(layers, key=lambda noun: -self._cosine_with_departure(effects[noun])):
            parts = layer_parts(layer, layers[layer])
            groups |= parts
            for noun, names in islice(parts.items(), max(0, MAX_TRIED - len(residuals))):
                residuals[noun] = self._mean_residual(
                    self._effect_on_logprobs({name: old_tensors[name] for name in names})
                )
        groups |= layers
        smallest_residual = min(residuals.values())
        limit = min(self._gaps.tolerance, max(2 * smallest_residual, self._gaps.tolerance / 16))
        explaining_nouns = [noun for noun in residuals if residuals[noun] <= limit]
        return {
            noun: groups[noun]
            for noun in sorted(explaining_nouns, key=lambda noun: len(groups[noun]))
        }

    def _cosine_with_departure(self, effect: np.ndarray) -> float:
        """Return the cosine of an effect with the departure, 0 for no effect."""
        norms = np.linalg.norm(effect) * np.linalg.norm(self._departure)
        return float(effect @ self._departure / norms) if norms else 0.0

    def _effect_on_logprobs(self, values: dict[str, Tensor]) -> np.ndarray:
        """Return how much changed tensors move the log-probabilities of the tried tokens."""
        return np.concatenate(self._weights.logprobs(values, self._sequences)) - self._old_logprobs

    def _mean_residual(self, effect: np.ndarray) -> float:
        """Return the mean |difference| that an effect leaves of the departure."""
        return mean_gap([self._departure - effect])

    def _explained_engine(self, values: dict[str, Tensor]) -> ExplainedEngine | None:
        """Return the engine whose tokens, all of them, changed tensors explain."""
        computed_sequences = self._gaps.policies.computed_sequences
        return self._gaps.explained_engine(self._weights.logprobs(values, computed_sequences))


def whole_groups(
    names: Iterable[str],
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Return groups of tensors that may be stale together, by noun: those outside of layers, each
    and all, and parts of all layers; and the layers.

    Args:
        names: the tensors."""
    outside: list[str] = []
    layers: dict[str, list[str]] = {}
    names_by_noun: dict[str, list[str]] = {}
    for name in names:
        if match := LAYER.fullmatch(name):
            layers.setdefault(f"layer {match[2]}", []).append(name)
        else:
            outside.append(name)
    for layer_names in layers.values():
        for noun, part_names in module_groups(layer_names).items():
            names_by_noun.setdefault(f"{noun} of all layers", []).extend(part_names)
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in outside}
    if len(outside) > 1:
        groups[" and ".join(outside)] = tuple(outside)
    if len(layers) > 1:
        groups |= {noun: tuple(part_names) for noun, part_names in names_by_noun.items()}
    return groups, {noun: tuple(layer_names) for noun, layer_names in layers.items()}


def layer_parts(layer: str, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the groups of a layer's tensors that may be stale together, by noun.

    Args:
        layer: its noun.
        names: its tensors."""
    return {
        part[0] if len(part) == 1 else f"{noun} of {layer}": part
        for noun, part in module_groups(names).items()
        if len(part) < len(names)
    }


def module_groups(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return a layer's tensors by module, and by modules that engines keep as one: names in the
    layer, without those that have the same tensors.

    Args:
        names: the tensors."""
    groups: dict[str, list[str]] = {}
    for name in names:
        words = name.partition(".layers.")[2].split(".")[1:]
        for count in range(1, len(words) + 1):
            groups.setdefault(".".join(words[:count]), []).append(name)
    for modules in FUSED_MODULES:
        for parent in {noun.rpartition(".")[0] for noun in groups if noun.endswith(modules)}:
            nouns = [f"{parent}.{module}" for module in modules]
            if all(noun in groups for noun in nouns):
                groups[f"{parent}.{', '.join(modules)}"] = [
                    name for noun in nouns for name in groups[noun]
                ]
    noun_by_group = {tuple(group): noun for noun, group in groups.items()}
    return {noun: group for group, noun in noun_by_group.items()}


def tensor_exchanges(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield exchanges that keep all shapes: what is exchanged, and the tensors that have others'
    values. Modules of all layers come first, then of each layer, then layers.

    Args:
        tensors: a model's, by name."""
    by_layer: dict[int, dict[str, str]] = {}
    for name in tensors:
        if match := LAYER.fullmatch(name):
            by_layer.setdefault(int(match[2]), {})[match[3]] = name
    for pair in EXCHANGEABLE_MODULES:
        by_number = {
            layer: sources
            for layer, names in by_layer.items()
            if (sources := _exchanged_modules(tensors, names, pair))
        }
        if len(by_number) > 1:
            all_sources = {
                name: value
                for layer_sources in by_number.values()
                for name, value in layer_sources.items()
            }
            yield f"{pair[0]} and {pair[1]} of all layers", all_sources
        for layer, sources in by_number.items():
            yield f"{pair[0]} and {pair[1]} of layer {layer}", sources
    layers = sorted(by_layer)
    for a, b in (
        combinations(layers, 2) if len(layers) <= MAX_LAYERS_FOR_ALL_PAIRS else pairwise(layers)
    ):
        names, other_names = by_layer[a], by_layer[b]
        if names.keys() == other_names.keys() and all(
            tensors[names[part]].shape == tensors[other_names[part]].shape for part in names
        ):
            yield (
                f"layers {a} and {b}",
                {names[part]: tensors[other_names[part]] for part in names}
                | {other_names[part]: tensors[names[part]] for part in names},
            )


def _exchanged_modules(
    tensors: dict[str, Tensor], names: dict[str, str], pair: tuple[str, str]
) -> dict[str, Tensor]:
    """Return the values of a layer's tensors with two modules exchanged; empty where they are not
    there or have other shapes.

    Args:
        tensors: the model's.
        names: the layer's full names, by the name in it.
        pair: the modules."""
    sources: dict[str, Tensor] = {}
    for part, name in names.items():
        for module, other_module in (pair, pair[::-1]):
            other_name = names.get(part.replace(f"{module}.", f"{other_module}."))
            if f"{module}." not in part or other_name is None:
                continue
            if tensors[name].shape == tensors[other_name].shape:
                sources[name] = tensors[other_name]
    return sources


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
