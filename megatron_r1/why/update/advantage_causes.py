"""Yields candidate causes in the advantages, which need no model: those of other rules, and of
other responses."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron_r1.why import formulas
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.update.candidate_cause import CandidateCause, other_values

if TYPE_CHECKING:
    from megatron_r1.why.update.run_differences import RunDifferences

Rewards = Sequence[Sequence[float | None]]
Advantages = list[list[float]]
EPSILONS = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0)
"""Usual values of `rl.advantage_epsilon`, and those of another unit."""
FACTORS = (0.5, 2.0)
"""Factors of the advantages that are tried for every step."""
ADVANTAGE_TOLERANCE = 1e-5
"""The largest difference of advantages that changes nothing which `why` would see."""


def advantage_causes(step: RecordedStep, differences: RunDifferences) -> Iterator[CandidateCause]:
    """Yield advantages of other rules, and of other responses.

    Args:
        step: what the run recorded of it.
        differences: what the checkpoint after it says."""
    if not step.has_response_advantages:
        return
    yield from _rule_causes(step)
    yield from _shifted_advantage_causes(step)
    yield from _reward_causes(step)
    yield from _epsilon_causes(step)
    yield from _scaled_advantage_causes(step, differences)


def _compute_advantages(step: RecordedStep, rewards: Rewards, **options: Any) -> Advantages:
    """Return the advantages of other rewards."""
    rl = step.config.rl
    arguments: dict[str, Any] = {"std": rl.advantage_std, "epsilon": rl.advantage_epsilon} | options
    return formulas.recomputed_advantages(rewards, step.rules, **arguments)


def _rule_causes(step: RecordedStep) -> Iterator[CandidateCause]:
    """Yield advantages of the same rewards by other rules."""
    rl, rewards = step.config.rl, step.training_rewards
    for std in other_values(("group", "batch", "none"), rl.advantage_std):
        yield CandidateCause(
            f"advantages divided by the deviation of: {std}",
            "rl.advantage_std",
            advantages=_compute_advantages(step, rewards, std=std),
        )
    yield CandidateCause(
        "advantages that are not centred on the mean",
        "the mean of the rewards",
        "the advantages of rl.algorithm: the mean of the group is subtracted",
        advantages=_compute_advantages(step, rewards, is_centered=False),
    )
    yield CandidateCause(
        "a deviation over n - 1 rewards",
        "rl.advantage_std",
        "the advantages of rl.algorithm: the deviation is the population's, over n",
        advantages=_compute_advantages(step, rewards, ddof=1),
    )
    yield CandidateCause(
        "advantages with the other sign",
        "the sign of the advantages",
        "the advantages or the loss of rl.algorithm: a better response becomes more likely",
        advantages=_map_advantages(step, operator.neg),
    )
    yield CandidateCause(
        "advantages clipped at 0",
        "the sign of the advantages",
        "the advantages of rl.algorithm: a response below the mean becomes less likely",
        advantages=_map_advantages(step, lambda advantage: max(0.0, advantage)),
    )


def _reward_causes(step: RecordedStep) -> Iterator[CandidateCause]:
    """Yield advantages of other rewards, and of more or fewer responses."""
    rl = step.config.rl
    unpenalized_rewards = [
        [g.reward if g.is_graded else None for g in group.responses] for group in step.groups
    ]
    if rl.overlong_buffer:
        yield CandidateCause(
            "rewards without the penalty of long responses",
            "rl.overlong_buffer",
            advantages=_compute_advantages(step, unpenalized_rewards),
        )
        yield CandidateCause(
            "a penalty of long responses that is added to their rewards, with the other sign,",
            "rl.overlong_buffer",
            "rl.overlong_penalty: it is subtracted from the rewards of long responses",
            advantages=_compute_advantages(step, step.rewards_with_penalty(-rl.overlong_penalty)),
        )
    accuracy = [
        [g.rewards.get("accuracy") if g.is_graded else None for g in group.responses]
        for group in step.groups
    ]
    if accuracy != unpenalized_rewards:
        yield CandidateCause(
            "rewards of accuracy alone",
            "rewards.weights",
            advantages=_compute_advantages(step, accuracy),
        )
    if any(graded.is_truncated for graded in step.responses.values()):
        yield _truncation_cause(step, _compute_advantages(step, step.training_rewards))


def _epsilon_causes(step: RecordedStep) -> Iterator[CandidateCause]:
    """Yield advantages with another `rl.advantage_epsilon`, where that makes a difference."""
    rl = step.config.rl
    for epsilon in EPSILONS:
        other_advantages = _compute_advantages(step, step.training_rewards, epsilon=epsilon)
        if _are_apart(other_advantages, step.advantages):
            yield CandidateCause(
                f"rl.advantage_epsilon {epsilon:g}",
                "rl.advantage_std",
                f"rl.advantage_epsilon: {rl.advantage_epsilon:g} has no effect",
                advantages=other_advantages,
            )


def _map_advantages(step: RecordedStep, change: Callable[[float], float]) -> Advantages:
    """Return changed advantages; NaN stays."""
    return [
        [
            advantage if math.isnan(advantage) else change(advantage)
            for advantage in group_advantages
        ]
        for group_advantages in step.advantages
    ]


def _are_apart(first: Advantages, second: Advantages) -> bool:
    pairs = zip(*map(itertools.chain.from_iterable, (first, second)), strict=True)
    return any(abs(a - b) > ADVANTAGE_TOLERANCE for a, b in pairs)  # NaN is not above it


def _scaled_advantage_causes(
    step: RecordedStep, differences: RunDifferences
) -> Iterator[CandidateCause]:
    """Yield multiples of the advantages that loss or gradients of the step suggest."""
    suggested_factors = [differences.gradient_factor]
    norm, loss = (step.metrics_row.get(name) for name in ("grad_norm", "loss"))
    if isinstance(norm, int | float) and differences.norm:
        suggested_factors.append(norm / differences.norm)
    if isinstance(loss, int | float) and (term := differences.terms.get("policy")):
        suggested_factors.append(1 + (loss - sum(differences.terms.values())) / term)
    rounded_factors = [
        float(f"{factor:.{digits}g}")
        for factor in suggested_factors
        if factor is not None and math.isfinite(factor)
        for digits in (1, 2)
    ]
    for factor in dict.fromkeys((*rounded_factors, *FACTORS)):
        if factor > 0 and factor != 1:
            yield CandidateCause(
                f"advantages times {factor:g}",
                "rl.advantage_std",
                "the advantages of rl.algorithm: they are multiplied by a factor",
                advantages=_map_advantages(step, functools.partial(operator.mul, factor)),
            )


def _truncation_cause(step: RecordedStep, all_advantages: Advantages) -> CandidateCause:
    """Return the advantages where truncated responses are trained on if the settings leave them
    out, and are left out otherwise."""
    if step.config.rl.truncated == "mask":
        return CandidateCause(
            "truncated responses trained on", "rl.truncated", advantages=all_advantages
        )
    trained_advantages = [
        [
            math.nan if g.is_truncated else a
            for a, g in zip(group_advantages, group.responses, strict=True)
        ]
        for group_advantages, group in zip(step.advantages, step.groups, strict=True)
    ]
    return CandidateCause(
        "truncated responses left out", "rl.truncated", advantages=trained_advantages
    )


def _shifted_advantage_causes(step: RecordedStep) -> Iterator[CandidateCause]:
    """Yield advantages of another group, and of another response."""
    for places in range(1, len(step.groups)):
        moved_advantages = [*step.advantages[places:], *step.advantages[:places]]
        if [len(group_advantages) for group_advantages in moved_advantages] == [
            len(group_advantages) for group_advantages in step.advantages
        ]:
            yield CandidateCause(
                f"advantages of another group, {places} places on,",
                "the order of the groups",
                "what assigns advantages to responses: those of one group are given to another",
                advantages=moved_advantages,
            )
    for places in range(1, max(map(len, step.advantages))):
        yield CandidateCause(
            f"advantages of another response of the group, {places} places on,",
            "the order of the responses",
            "what assigns advantages to responses: those of one are given to another",
            advantages=[
                [*group_advantages[places:], *group_advantages[:places]]
                for group_advantages in step.advantages
            ],
        )
