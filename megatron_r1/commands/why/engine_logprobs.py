"""The engines' log-probabilities against those of transformers, and what explains a difference:
older weights, another temperature, a cut, exchanged experts, rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from megatron_r1.commands.compare.records import ROUNDING
from megatron_r1.commands.why.comparison import (
    DEPARTS,
    EQUAL,
    CheckedQuantity,
    DepartureCurve,
    not_checked,
)
from megatron_r1.commands.why.formulas import kl_of_difference
from megatron_r1.commands.why.recorded_step import RecordedStep
from megatron_r1.commands.why.sampling import FAMILY
from megatron_r1.reporting.formatting import format_number as number
from megatron_r1.reporting.formatting import format_percent as percent

if TYPE_CHECKING:
    from megatron_r1.commands.why.recompute import Recomputation

TOLERANCE_SOURCE = "rounding of the engine's dtype (docs/compare.md), mean over tokens"
TEMPERATURES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)
"""Times the run's temperature: which of them explains a departure."""
EXPLAINED = 0.5
"""A hypothesis explains a departure that it makes smaller by this factor, or more."""
BY_TEMPERATURE = 0.15
"""The same of a temperature, which makes many departures a little smaller."""
ONE_SIDED = 0.95
"""Share of the tokens that a renormalized distribution has more likely than the whole one."""
FEW_TOKENS = 20
"""Tokens of an engine or expert that are too few to compare."""
BINS = 40
SIZE = 4.0
"""Two mean differences within this factor have the same size."""
MAX_PAIRS = 64
"""Pairs of experts that are tried as exchanged ones."""
SUSPECTS = 4
"""Experts that are tried as the one, or two, that differ."""
OF_EXPERTS = (
    "the push of that expert (docs/push.md), rollout.expert_parallel, rollout.redundant_experts"
)


def check_logprobs(step: RecordedStep, recomputed: Recomputation) -> list[CheckedQuantity]:
    """Return the comparison of the engines' log-probabilities."""
    return [_Gaps(step, recomputed).comparison()]


def departures(recomputed: Recomputation) -> list[DepartureCurve]:
    """Return how far engines are from transformers over the position in the response; nothing where
    that could not be recomputed."""
    if "old" not in vars(recomputed):
        return []
    gaps = _Gaps(recomputed.step, recomputed)
    return [DepartureCurve("engine against the checkpoint", *gaps.by_position())]


class _Gaps:
    """Differences of engines' log-probabilities from transformers', token by token."""

    def __init__(self, step: RecordedStep, recomputed: Recomputation) -> None:
        self.step, self.recomputed = step, recomputed
        newest = step.step - 1
        self.sequences = [recomputed.sequences[at] for at in recomputed.scored_sequences]
        self.newest = [sequence.versions == newest for sequence in self.sequences]
        self.engines = [
            step.responses[sequence.response].response.engine for sequence in self.sequences
        ]
        self.gaps = self._logprob_gaps(recomputed.old)
        # Tokens of earlier versions are an earlier policy's.
        versions = {int(v) for sequence in self.sequences for v in np.unique(sequence.versions)}
        for version in sorted(versions - {newest}):
            recomputed_logprobs = recomputed.logprobs_after(version)
            if recomputed_logprobs is not None:
                self._fill_version_gaps(version, recomputed_logprobs)
        self.tolerance = ROUNDING[step.run_config.rollout.dtype]

    def _logprob_gaps(self, recomputed_logprobs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return engine's - recomputed log-probability of the newest version's tokens, else NaN."""
        return [
            np.where(is_newest, sequence.logprobs - recomputed, np.nan)
            for sequence, recomputed, is_newest in zip(
                self.sequences, recomputed_logprobs, self.newest, strict=True
            )
        ]

    def _fill_version_gaps(self, version: int, recomputed_logprobs: Sequence[np.ndarray]) -> None:
        """Put the differences of another version's tokens into `gaps`."""
        for gap, sequence, recomputed in zip(
            self.gaps, self.sequences, recomputed_logprobs, strict=True
        ):
            chosen = sequence.versions == version
            gap[chosen] = (sequence.logprobs - recomputed)[chosen]

    def mean(self, gaps: Sequence[np.ndarray], only: Sequence[bool] | None = None) -> float:
        """Return the mean |difference|, of the chosen sequences."""
        chosen = [gap for at, gap in enumerate(gaps) if only is None or only[at]]
        differences = np.abs(np.concatenate(chosen)) if chosen else np.empty(0)
        differences = differences[~np.isnan(differences)]
        return float(differences.mean()) if len(differences) else math.nan

    def by_position(self) -> tuple[list[float], list[float]]:
        """Return the mean |difference| over positions in the response."""
        longest = max((len(gap) for gap in self.gaps), default=0)
        edges = np.unique(np.linspace(0, longest, min(BINS, longest) + 1).astype(int))
        positions, values = [], []
        for first, end in pairwise(edges):
            differences = np.abs(np.concatenate([gap[first:end] for gap in self.gaps]))
            differences = differences[~np.isnan(differences)]
            if len(differences):
                positions.append(float(first + end - 1) / 2)
                values.append(float(differences.mean()))
        return positions, values

    def comparison(self) -> CheckedQuantity:
        gaps = np.concatenate(self.gaps) if self.gaps else np.empty(0)
        known_gaps = gaps[~np.isnan(gaps)]
        name = "engines' log-probabilities"
        if not len(known_gaps):
            return not_checked(FAMILY, name, "no checkpoint of the tokens' versions is kept")
        distance = float(np.abs(known_gaps).mean())
        compared = (
            f"those of {len(known_gaps):,} tokens of {len(self.gaps):,} sequences with "
            "transformers' under the weights of their version; mean |Δ| by engine: "
            + ", ".join(f"{key} {number(value)}" for key, value in self._by_engine().items())
            + f"; KL {number(kl_of_difference(-known_gaps))}"
        )
        affected = [self.mean([gap]) > self.tolerance for gap in self.gaps]
        explained = self._explanation(distance)
        if explained is None and distance <= self.tolerance and not self._one_engine():
            return CheckedQuantity(
                FAMILY, name, EQUAL, compared, distance, self.tolerance, TOLERANCE_SOURCE
            )
        reason, remedy = explained or (
            f"mean |Δ| is {number(distance)}: the engine computes another function of these "
            "weights than transformers",
            "rollout.dtype, rollout.vllm (quantization, kernels), or megatron-r1 check-model on "
            "the model",
        )
        concerned = dict.fromkeys(
            sequence.response
            for sequence, is_affected in zip(self.sequences, affected, strict=True)
            if is_affected
        )
        return CheckedQuantity(
            FAMILY,
            name,
            DEPARTS,
            compared,
            distance,
            self.tolerance,
            TOLERANCE_SOURCE,
            reason,
            list(concerned),
            int(
                sum((np.abs(gap) > self.tolerance).sum() for gap in self.gaps)  # NaN is not above
            ),
            self.step.loss_fraction(list(concerned)),
            remedy,
        )

    def _by_engine(self) -> dict[str, float]:
        names = sorted(set(self.engines))
        return {
            name or "not named": self.mean(self.gaps, [engine == name for engine in self.engines])
            for name in names
        }

    def _one_engine(self) -> str | None:
        """Return the engine that alone is beyond the tolerance, where others are not."""
        means = {name: mean for name, mean in self._by_engine().items() if not math.isnan(mean)}
        beyond = [name for name, mean in means.items() if mean > self.tolerance]
        return beyond[0] if len(beyond) == 1 and len(means) > 1 else None

    def _explanation(self, distance: float) -> tuple[str, str] | None:
        """Return what explains the distance, and the remedy; None where nothing does."""
        tests: tuple[Callable[[float], tuple[str, str] | None], ...] = (
            self._explain_by_stale_weights,
            self._router_bias,
            self._temperature,
            self._shifted,
            self._renormalized,
            self._expert,
            self._explain_by_rounding,
        )
        if distance <= self.tolerance / 16 and not self._one_engine():
            return None
        return next((explanation for test in tests if (explanation := test(distance))), None)

    def _explain_by_stale_weights(self, distance: float) -> tuple[str, str] | None:
        """Try the weights of earlier versions, engine by engine."""
        explanations = [
            (better[1], version, better)
            for version in self._earlier
            if (logprobs := self.recomputed.logprobs_after(version)) is not None
            and (better := self._better_explanation(self._logprob_gaps(logprobs))) is not None
        ]
        if not explanations:
            return None
        _, version, (who, then, now) = min(explanations)
        sizes = f"mean |Δ| {number(then)} against {number(now)}"
        newest = self.step.step - 1
        if self._is_trainers_too:
            return (
                f"engines and trainer computed with the weights of version {version}, not "
                f"{newest}: {sizes}",
                "the checkpoint that the run went on from: other weights were loaded than those of "
                f"step {newest} (docs/checkpoints.md)",
            )
        return (
            f"{who} computed with the weights of version {version}, not {newest}: {sizes}",
            f"the push to {who}: logs/{who}*.log, push/* in metrics.jsonl, push.transport "
            "(docs/push.md)",
        )

    @property
    def _earlier(self) -> list[int]:
        """Versions before the one that the step trains. Some of their checkpoints may be kept."""
        newest = self.step.step - 1
        return sorted({max(0, newest - 1), max(0, newest - 2), 0} - {newest}, reverse=True)

    @property
    def _is_trainers_too(self) -> bool:
        """Whether all engines are beyond the tolerance, and the trainer agrees with them."""
        logged = self.step.line.get("logprob_diff/mean")
        means = [mean for mean in self._by_engine().values() if not math.isnan(mean)]
        is_near = isinstance(logged, int | float) and logged <= self.tolerance
        return is_near and min(means, default=0.0) > self.tolerance

    def _shifted(self, distance: float) -> tuple[str, str] | None:
        """Try the log-probabilities of the token before, and of the one after."""
        for away, which in ((1, "after"), (-1, "before")):
            shifted = [np.roll(logprobs, -away) for logprobs in self.recomputed.old]
            gaps = self._logprob_gaps(shifted)
            for gap in gaps:
                gap[-1 if away > 0 else 0 : None if away > 0 else 1] = np.nan
            mean = self.mean(gaps)
            if mean <= EXPLAINED * distance:
                return (
                    f"they are shifted by a token, each is that of the token {which}: mean |Δ| "
                    f"{number(mean)} against {number(distance)}",
                    "the reply of the engine: its log-probabilities begin at another token than "
                    "its tokens",
                )
        return None

    def _explain_by_rounding(self, distance: float) -> tuple[str, str] | None:
        """Compare the size of the differences with what bfloat16 makes of transformers."""
        if self.step.config.rollout.dtype != "float32" or distance <= self.tolerance:
            return None
        size = self.mean(
            [
                a - b
                for a, b in zip(
                    self.recomputed.bfloat16_logprobs(), self.recomputed.old, strict=True
                )
            ]
        )
        if not size / SIZE <= distance <= size * SIZE:
            return None
        return (
            f"mean |Δ| is {number(distance)}, and {number(size)} between transformers in bfloat16 "
            "and in float32: the engine computes in 16 bits",
            "rollout.dtype: float32 has no effect on the engine (rollout.vllm)",
        )

    def _router_bias(self, distance: float) -> tuple[str, str] | None:
        """Try routers without the bias that balances their experts."""
        logprobs = self.recomputed.without_router_bias()
        if logprobs is None:
            return None
        explanation = self._better_explanation(self._logprob_gaps(logprobs))
        if explanation is None:
            return None
        who, then, now = explanation
        return (
            f"{who} routes without the routers' correction bias: mean |Δ| {number(then)} against "
            f"{number(now)}",
            "the push of e_score_correction_bias to the engine (docs/push.md), or "
            "model.expert_bias_update_rate",
        )

    def _better_explanation(self, gaps: Sequence[np.ndarray]) -> tuple[str, float, float] | None:
        """Return the first engine whose differences others explain: its name, their mean and that
        of its own; None where they explain no engine's."""
        for name in sorted(set(self.engines)):
            only = [engine == name for engine in self.engines]
            now, then = self.mean(self.gaps, only), self.mean(gaps, only)
            if now > self.tolerance / 16 and then < EXPLAINED * now:
                return name or "engine", then, now
        return None

    def _temperature(self, distance: float) -> tuple[str, str] | None:
        """Try other temperatures."""
        temperature = self.recomputed.temperature
        coarse, _ = self._best_scale(TEMPERATURES)
        at = TEMPERATURES.index(coarse)
        near = TEMPERATURES[max(0, at - 1) : at + 2]
        scale, mean = self._best_scale(np.linspace(near[0], near[-1], 41).tolist())
        if not mean <= BY_TEMPERATURE * distance or abs(scale - 1) < 0.01:
            return None
        return (
            f"temperature {scale * temperature:.3g} explains them, the settings say "
            f"{temperature:g}: mean |Δ| {number(mean)} against {number(distance)}",
            "rollout.temperature, or what the engine makes of it (rollout.vllm)",
        )

    def _best_scale(self, scales: Sequence[float]) -> tuple[float, float]:
        """Return the multiple of the run's temperature that leaves the smallest mean |difference|,
        and that mean."""
        temperatures = [self.recomputed.temperature * scale for scale in scales]
        logprobs_by_scale = self.recomputed.logprobs_at_temperatures(temperatures)
        means = [self.mean(self._logprob_gaps(logprobs)) for logprobs in logprobs_by_scale]
        best = int(np.argmin(np.nan_to_num(means, nan=np.inf)))
        return scales[best], means[best]

    def _renormalized(self, distance: float) -> tuple[str, str] | None:
        """Look for log-probabilities over a part of the vocabulary: none is below the whole's."""
        if self.step.config.rollout.truncates_sampling:  # both are over the kept tokens already
            return None
        gaps = np.concatenate(self.gaps)
        large = gaps[np.abs(gaps) > max(self.tolerance / 4, 1e-5)]
        if len(large) < FEW_TOKENS or (large > 0).mean() < ONE_SIDED:
            return None
        kept_share = math.exp(-float(large.max()))
        return (
            f"{percent(float((large > 0).mean()))} of the tokens that differ are more likely to "
            f"the engine, by up to 1/{kept_share:.3g}: it sampled from a part of the vocabulary "
            "and renormalized (top-p, top-k or min-p), the trainer does not",
            "the cut of rollout.vllm or the model's generation_config.json: set it as "
            "rollout.top_p, top_k or min_p, or leave it out",
        )

    def _expert(self, distance: float) -> tuple[str, str] | None:
        """Look for experts whose tokens differ more than others: of another version, exchanged, or
        another thing."""
        ranked = self._experts_by_gap()
        for layer, expert, *_ in ranked[:SUSPECTS]:
            if (explanation := self._stale_expert(layer, expert)) is not None:
                return explanation
        for layer, expert, other_expert in self._pairs(ranked):
            logprobs = self.recomputed.with_experts(
                layer, {expert: other_expert, other_expert: expert}
            )
            if (better := self._better_explanation(self._logprob_gaps(logprobs))) is not None:
                return (
                    f"experts {min(expert, other_expert)} and {max(expert, other_expert)} of "
                    f"{_layer(layer)} are exchanged in {better[0]}: mean |Δ| "
                    f"{number(better[1])} against {number(better[2])}",
                    OF_EXPERTS,
                )
        if not ranked or ranked[0][2] < 4 * ranked[0][3] or distance <= self.tolerance:
            return None
        layer, expert, with_it, without = ranked[0]
        return (
            f"tokens of expert {expert} of {_layer(layer)} differ by {number(with_it)}, others by "
            f"{number(without)}: the engine has another expert there",
            OF_EXPERTS,
        )

    def _pairs(self, ranked: Sequence[tuple[str, int, float, float]]) -> list[tuple[str, int, int]]:
        """Return pairs of experts of a layer that may be exchanged: the suspects with each other,
        and with experts that few tokens may have been routed to."""
        chosen = ranked[:SUSPECTS]
        pairs = [
            (layer, expert, other_expert)
            for at, (layer, expert, *_) in enumerate(chosen)
            for other_layer, other_expert, *_ in chosen[at + 1 :]
            if layer == other_layer
        ]
        for layer, expert, *_ in chosen:
            other_experts = range(self.recomputed.num_experts(layer))
            pairs += [
                (layer, expert, other_expert)
                for other_expert in other_experts
                if other_expert != expert
            ]
        distinct: dict[tuple[str, frozenset[int]], tuple[str, int, int]] = {}
        for layer, expert, other_expert in pairs:
            distinct.setdefault(
                (layer, frozenset((expert, other_expert))), (layer, expert, other_expert)
            )
        return [*distinct.values()][:MAX_PAIRS]

    def _experts_by_gap(self) -> list[tuple[str, int, float, float]]:
        """Return layer, expert, the mean |difference| of its tokens and that of the others, the
        largest ratio of both first."""
        gaps, ranked = np.abs(np.concatenate(self.gaps)), []
        for layer, by_row in self.recomputed.experts().items():
            experts = np.concatenate(by_row)
            for expert in range(int(experts.max()) + 1):
                is_routed = (experts == expert).any(1)
                if is_routed.sum() < FEW_TOKENS:
                    continue
                with_it = float(np.nanmean(gaps[is_routed]))
                is_few = (~is_routed).sum() < FEW_TOKENS  # all tokens go through it
                without = with_it if is_few else float(np.nanmean(gaps[~is_routed]))
                ranked.append((layer, expert, with_it, without))
        return sorted(ranked, key=lambda expert: -expert[2] / max(expert[3], 1e-12))

    def _stale_expert(self, layer: str, expert: int) -> tuple[str, str] | None:
        explanations = [
            (better[1], version, better)
            for version in self._earlier
            if (logprobs := self.recomputed.with_old_expert(layer, expert, version)) is not None
            and (better := self._better_explanation(self._logprob_gaps(logprobs))) is not None
        ]
        if not explanations:
            return None
        _, version, (who, then, now) = min(explanations)
        return (
            f"expert {expert} of {_layer(layer)} has the weights of version {version} in {who}, "
            f"not {self.step.step - 1}: mean |Δ| {number(then)} against {number(now)}",
            OF_EXPERTS,
        )


def _layer(name: str) -> str:
    return name.removesuffix(".mlp.experts")
