"""Advantages of other rules, and of other responses: substitutions in a step's updates that need no
model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_r1.why import formulas
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.update.substitution import Substitution, others

Rewards = Sequence[Sequence[float | None]]
Advantages = list[list[float]]


def advantage_substitutions(step: RecordedStep) -> Iterator[Substitution]:
    """Yield advantages of other rules, and of other responses."""
    rl, rewards = step.config.rl, step.training_rewards

    def compute(
        response_rewards: Rewards, std: str = rl.advantage_std, **options: Any
    ) -> Advantages:
        return formulas.advantages(
            response_rewards, rl.algorithm, std, rl.advantage_epsilon, **options
        )

    if rl.algorithm not in formulas.ALGORITHMS or rl.reward_normalization != "sum":
        return
    for std in others(("group", "batch", "none"), rl.advantage_std):
        yield Substitution(
            f"advantages divided by the deviation of: {std}",
            "rl.advantage_std",
            advantages=compute(rewards, std),
        )
    yield Substitution(
        "advantages that are not centred on the mean",
        "the mean of the rewards",
        "the advantages of rl.algorithm: the mean of the group is subtracted",
        advantages=compute(rewards, is_centred=False),
    )
    yield Substitution(
        "a deviation over n - 1 rewards",
        "rl.advantage_std",
        "the advantages of rl.algorithm: the deviation is the population's, over n",
        advantages=compute(rewards, ddof=1),
    )
    yield Substitution(
        "advantages with the other sign",
        "the sign of the advantages",
        "the advantages or the loss of rl.algorithm: a better response becomes more likely",
        advantages=[[-a for a in group_advantages] for group_advantages in step.advantages],
    )
    yield from _shifted_advantage_substitutions(step)
    unpenalized_rewards = [
        [g.reward if g.is_graded else None for g in group.responses] for group in step.groups
    ]
    if rl.overlong_buffer:
        yield Substitution(
            "rewards without the penalty of long responses",
            "rl.overlong_buffer",
            advantages=compute(unpenalized_rewards),
        )
    accuracy = [
        [g.rewards.get("accuracy") if g.is_graded else None for g in group.responses]
        for group in step.groups
    ]
    if accuracy != unpenalized_rewards:
        yield Substitution(
            "rewards of accuracy alone", "rewards.weights", advantages=compute(accuracy)
        )
    if any(graded.is_truncated for graded in step.responses.values()):
        yield _truncated_substitution(step, compute(rewards))


def _truncated_substitution(step: RecordedStep, all_trained: Advantages) -> Substitution:
    """Return the advantages where truncated responses are trained on if the settings leave them
    out, and are left out otherwise.

    Args:
        step: the step.
        all_trained: the advantages with which every response is trained on."""
    if step.config.rl.truncated == "mask":
        return Substitution(
            "truncated responses trained on", "rl.truncated", advantages=all_trained
        )
    trained = [
        [
            math.nan if g.is_truncated else a
            for a, g in zip(group_advantages, group.responses, strict=True)
        ]
        for group_advantages, group in zip(step.advantages, step.groups, strict=True)
    ]
    return Substitution("truncated responses left out", "rl.truncated", advantages=trained)


def _shifted_advantage_substitutions(step: RecordedStep) -> Iterator[Substitution]:
    """Yield advantages of another group, and of another response."""
    for places in range(1, len(step.groups)):
        moved_advantages = [*step.advantages[places:], *step.advantages[:places]]
        if [len(group_advantages) for group_advantages in moved_advantages] == [
            len(group_advantages) for group_advantages in step.advantages
        ]:
            yield Substitution(
                f"advantages of another group, {places} places on,",
                "the order of the groups",
                "what assigns advantages to responses: those of one group are given to another",
                advantages=moved_advantages,
            )
    for places in range(1, max(map(len, step.advantages))):
        yield Substitution(
            f"advantages of another response of the group, {places} places on,",
            "the order of the responses",
            "what assigns advantages to responses: those of one are given to another",
            advantages=[
                [*group_advantages[places:], *group_advantages[:places]]
                for group_advantages in step.advantages
            ],
        )
