"""Tries candidate causes of a difference of the engines' log-probabilities from transformers':
older weights, adapters of another scale, routers without their bias, another temperature, a shift
by a token, a cut, rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_r1.config.model import LoraConfig
from megatron_r1.reporting.formatting import format_number, format_percent
from megatron_r1.why.checks.engine_gaps import (
    MAX_UNEXPLAINED_FRACTION,
    EngineGaps,
    ExplainedEngine,
    mean_gap,
)

TEMPERATURE_FACTORS = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)
"""Times the run's temperature: which of them explains a departure."""
MAX_UNEXPLAINED_BY_TEMPERATURE = 0.15
"""The largest ratio of the distance with a temperature to the distance without it, at which the
temperature is named as the cause. Many temperatures make a distance a little smaller."""
MIN_ONE_SIDED_FRACTION = 0.95
"""The least share of tokens that a renormalized distribution has more likely than the whole one."""
MIN_TOKENS = 20
"""The fewest tokens of an engine or expert that are compared."""
MAX_SIZE_FACTOR = 4.0
"""Two mean differences within this factor have the same size."""


class DepartureCause(NamedTuple):
    """A departure's cause, with the numbers that speak for it, and what to change."""

    reason: str
    remedy: str


def stale_weights(gaps: EngineGaps) -> DepartureCause | None:
    """Try the weights of earlier versions, engine by engine."""
    if (stale := gaps.stale_version(gaps.policies.logprobs_after)) is None:
        return None
    return older_weights(gaps, *stale)


def older_weights(gaps: EngineGaps, version: int, engine: ExplainedEngine) -> DepartureCause:
    """Return that an engine has the weights of an earlier version, as the trainer may too.

    Args:
        gaps: how far engines and trainer are from the recomputed log-probabilities.
        version: the policy version that the engine computed with.
        engine: the engine and its gap."""
    if _trainer_agrees(gaps):
        return DepartureCause(
            f"engines and trainer computed with the weights of version {version}, not "
            f"{gaps.newest_version}: {engine.gap_sizes}",
            "the checkpoint that the run went on from: other weights were loaded than those of "
            f"step {gaps.newest_version} (docs/checkpoints.md)",
        )
    if version == 0 and gaps.step.run_config.model.lora is not None:
        return DepartureCause(
            f"{engine.name} computed without adapters, with the weights of model.path alone: "
            f"{engine.gap_sizes}",
            "the merge of model.lora in the push (docs/lora.md)",
        )
    return DepartureCause(
        f"{engine.name} computed with the weights of version {version}, not {gaps.newest_version}: "
        f"{engine.gap_sizes}",
        f"the push to {engine.name}: logs/{engine.name}*.log, push/* in metrics.jsonl, "
        "push.transport (docs/push.md)",
    )


def _trainer_agrees(gaps: EngineGaps) -> bool:
    """Return whether all engines are beyond the tolerance, and the trainer agrees with them."""
    logged = gaps.step.metrics_row.get("logprob_diff/mean")
    means = [mean for mean in gaps.engine_means().values() if not math.isnan(mean)]
    is_near = isinstance(logged, int | float) and logged <= gaps.tolerance
    return is_near and min(means, default=0.0) > gaps.tolerance


def other_adapter_scale(gaps: EngineGaps) -> DepartureCause | None:
    """Try other scales of the adapters."""
    if (lora := gaps.step.run_config.model.lora) is None:
        return None
    for scale, noun in adapter_scales(lora).items():
        logprobs = gaps.changed_parts.logprobs_with_adapter_scale(scale)
        engine = None if logprobs is None else gaps.explained_engine(logprobs)
        # Weights of an earlier version are near smaller adapters, but not as near as rounding.
        if engine is not None and engine.mean_gap <= gaps.tolerance < engine.unexplained_gap:
            return DepartureCause(
                f"{engine.name} computed with adapters times {scale:g} ({noun}), not "
                f"{lora.scale:g}: {engine.gap_sizes}",
                "the merge of model.lora in the push (docs/lora.md)",
            )
    return None


def adapter_scales(lora: LoraConfig) -> dict[float, str]:
    """Return scales that adapters may have by mistake, in place of alpha / rank, with what they
    are."""
    scales = {
        2 * lora.scale: "twice alpha / rank",
        lora.scale / 2: "half of alpha / rank",
        1.0: "neither alpha nor rank",
        lora.alpha / math.sqrt(lora.rank): "alpha / √rank",
        lora.alpha: "alpha without the division by the rank",
    }
    return {scale: noun for scale, noun in scales.items() if scale != lora.scale}


def missing_router_bias(gaps: EngineGaps) -> DepartureCause | None:
    """Try routers without the bias that balances their experts."""
    logprobs = gaps.changed_parts.logprobs_without_router_bias()
    if logprobs is None or (engine := gaps.explained_engine(logprobs)) is None:
        return None
    return DepartureCause(
        f"{engine.name} routes without the routers' correction bias: {engine.gap_sizes}",
        "the push of e_score_correction_bias to the engine (docs/push.md), or "
        "model.expert_bias_update_rate",
    )


def other_temperature(gaps: EngineGaps) -> DepartureCause | None:
    """Try other temperatures."""
    temperature = gaps.policies.temperature
    coarse, _ = _best_scale(gaps, TEMPERATURE_FACTORS)
    index = TEMPERATURE_FACTORS.index(coarse)
    neighbors = TEMPERATURE_FACTORS[max(0, index - 1) : index + 2]
    scale, mean = _best_scale(gaps, np.linspace(neighbors[0], neighbors[-1], 41).tolist())
    if not mean <= MAX_UNEXPLAINED_BY_TEMPERATURE * gaps.distance or abs(scale - 1) < 0.01:
        return None
    return DepartureCause(
        f"temperature {scale * temperature:.3g} explains them, the settings say "
        f"{temperature:g}: mean |Δ| {format_number(mean)} against {format_number(gaps.distance)}",
        "rollout.temperature, or what the engine makes of it (rollout.vllm)",
    )


def _best_scale(gaps: EngineGaps, scales: Sequence[float]) -> tuple[float, float]:
    """Return the multiple of the run's temperature that leaves the smallest mean |difference|, and
    that mean."""
    temperatures = [gaps.policies.temperature * scale for scale in scales]
    logprobs_by_scale = gaps.policies.logprobs_at_temperatures(temperatures)
    means = [mean_gap(gaps.gaps_from(logprobs)) for logprobs in logprobs_by_scale]
    best = int(np.argmin(np.nan_to_num(means, nan=np.inf)))
    return scales[best], means[best]


def shifted_by_a_token(gaps: EngineGaps) -> DepartureCause | None:
    """Try the log-probabilities of the token before, and of the one after."""
    for shift, side in ((1, "after"), (-1, "before")):
        shifted_gaps = gaps.gaps_from(
            [np.roll(logprobs, -shift) for logprobs in gaps.policies.old_logprobs]
        )
        for gap in shifted_gaps:  # the token that was rolled around
            gap[-1 if shift > 0 else 0 : None if shift > 0 else 1] = np.nan
        mean = mean_gap(shifted_gaps)
        if mean <= MAX_UNEXPLAINED_FRACTION * gaps.distance:
            return DepartureCause(
                f"they are shifted by a token, each is that of the token {side}: mean |Δ| "
                f"{format_number(mean)} against {format_number(gaps.distance)}",
                "the reply of the engine: its log-probabilities begin at another token than "
                "its tokens",
            )
    return None


def renormalized_cut(gaps: EngineGaps) -> DepartureCause | None:
    """Look for log-probabilities over a part of the vocabulary: none is below the whole's."""
    if gaps.step.config.rollout.uses_sampling_mask:  # both are over the kept tokens already
        return None
    differences = np.concatenate(gaps.gaps)
    large_differences = differences[np.abs(differences) > max(gaps.tolerance / 4, 1e-5)]
    if (
        len(large_differences) < MIN_TOKENS
        or (large_differences > 0).mean() < MIN_ONE_SIDED_FRACTION
    ):
        return None
    likelier_fraction = float((large_differences > 0).mean())
    kept_share = math.exp(-float(large_differences.max()))
    return DepartureCause(
        f"{format_percent(likelier_fraction)} of the tokens that differ are more likely to "
        f"the engine, by up to 1/{kept_share:.3g}: it sampled from a part of the vocabulary "
        "and renormalized (top-p, top-k or min-p), the trainer does not",
        "the cut of rollout.vllm or the model's generation_config.json: set it as "
        "rollout.top_p, top_k or min_p, or leave it out",
    )


def rounding_of_bfloat16(gaps: EngineGaps) -> DepartureCause | None:
    """Compare the size of the differences with what bfloat16 makes of transformers."""
    if gaps.step.config.rollout.dtype != "float32" or gaps.distance <= gaps.tolerance:
        return None
    size = mean_gap(
        [
            rounded - logprobs
            for rounded, logprobs in zip(
                gaps.changed_parts.bfloat16_logprobs(), gaps.policies.old_logprobs, strict=True
            )
        ]
    )
    if not size / MAX_SIZE_FACTOR <= gaps.distance <= size * MAX_SIZE_FACTOR:
        return None
    return DepartureCause(
        f"mean |Δ| is {format_number(gaps.distance)}, and {format_number(size)} between "
        "transformers in bfloat16 and in float32: the engine computes in 16 bits",
        "rollout.dtype: float32 has no effect on the engine (rollout.vllm)",
    )
