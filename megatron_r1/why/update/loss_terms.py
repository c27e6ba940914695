"""The terms of a step's loss whose gradients are computed by themselves.

They are the policy's, KL's and the entropy's, and those of the responses that are cut off or left
out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_r1.why import formulas
from megatron_r1.why.policy.token_rows import TokenRow
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.update.loss_formulas import LossRules

POLICY_REMEDY = "the loss of rl.algorithm: its policy term, and the advantages"
TRUNCATED_REMEDY = "rl.truncated, and the mask of the loss"
UNGRADED_REMEDY = "the mask of the loss: a response without a grade is not trained on"


@dataclass(frozen=True)
class LossTerm:
    """A part of the loss whose gradient is computed by itself.

    Attributes:
        name: what it is, in words.
        part: which entry of `loss_formulas.row_terms` it belongs to.
        remedy: the settings that it depends on.
        rows: the numbers of the rows that it is summed over.
        expected_coefficient: the coefficient of its gradient in the loss's: 1 normally, 0 for a
            term that the settings leave out.
        left_out_rows: the rows that are left out of the loss, with the advantage that they would
            have, by update."""

    name: str
    part: str
    remedy: str
    rows: frozenset[int]
    expected_coefficient: float = 1.0
    left_out_rows: Sequence[Mapping[int, TokenRow]] = field(default=(), repr=False)


def loss_terms(step: RecordedStep, rows: Sequence[TokenRow], loss: LossRules) -> list[LossTerm]:
    """Return the terms of the loss whose weight is not 0; the policy's term of responses that are
    cut off is one of them.

    Args:
        step: what the run recorded of it.
        rows: those of `step.sequences`.
        loss: the loss of the step's settings."""
    trained = frozenset(index for index, row in enumerate(rows) if row.is_trained)
    truncated = frozenset(index for index in trained if _is_truncated(step, index))
    terms = [
        LossTerm("the policy term", "policy", POLICY_REMEDY, trained - truncated),
        LossTerm(
            "the truncated responses' policy term",
            "policy",
            f"{TRUNCATED_REMEDY}; {POLICY_REMEDY}",
            truncated,
        ),
    ]
    if loss.kl_beta:
        remedy = "rl.kl_beta, and the KL term in the loss of rl.algorithm"
        terms.append(LossTerm("the KL term", "kl", remedy, trained))
    if loss.entropy_coef:
        remedy = "rl.entropy_coef, and the entropy term in the loss of rl.algorithm"
        terms.append(LossTerm("the entropy term", "entropy", remedy, trained))
    return [term for term in terms if term.rows]


def left_out_terms(
    step: RecordedStep,
    with_advantages: Callable[[list[TokenRow]], list[TokenRow]],
    minibatches: Callable[[Sequence[TokenRow]], list[list[int]]],
    rows: Sequence[TokenRow],
) -> list[LossTerm]:
    """Return the policy's terms that responses left out of the loss would have. They are cut off
    under `rl.truncated: mask`, or have no grade and count as if their reward were 0.

    Args:
        step: what the run recorded of it.
        with_advantages: returns rows with the advantages of their tokens.
        minibatches: returns the rows of each mini-batch.
        rows: those of `step.sequences`."""
    if not step.has_response_advantages or all(row.is_trained for row in rows):
        return []
    rl = step.config.rl
    rewards = step.training_rewards
    rewards_with_zeros = [[reward or 0.0 for reward in group] for group in rewards]
    graded_advantages, all_advantages = (
        formulas.recomputed_advantages(values, step.rules, rl.advantage_std, rl.advantage_epsilon)
        for values in (rewards, rewards_with_zeros)
    )
    all_rows = list(rows)
    for index, sequence in enumerate(step.sequences):
        if not rows[index].is_trained and rows[index].num_sampled:
            group_index, response_index = sequence.response
            advantages = all_advantages if _is_ungraded(step, index) else graded_advantages
            all_rows[index] = replace(
                rows[index], advantage=advantages[group_index][response_index]
            )
    all_rows, order = with_advantages(all_rows), minibatches(all_rows)
    terms = []
    for name, remedy, is_ungraded in (
        ("the masked truncated responses' policy term", TRUNCATED_REMEDY, False),
        ("the ungraded responses' policy term", UNGRADED_REMEDY, True),
    ):
        members = frozenset(
            index
            for index, row in enumerate(all_rows)
            if row.is_trained
            and not rows[index].is_trained
            and _is_ungraded(step, index) == is_ungraded
        )
        by_update = [
            {index: all_rows[index] for index in batch if index in members} for batch in order
        ]
        if members:
            terms.append(LossTerm(name, "policy", remedy, members, 0.0, by_update))
    return terms


def num_left_out(step: RecordedStep) -> int:
    """Return how many responses of a step are left out of its loss."""
    return sum(math.isnan(advantage) for group in step.advantages for advantage in group)


def _is_truncated(step: RecordedStep, row_index: int) -> bool:
    return step.responses[step.sequences[row_index].response].is_truncated


def _is_ungraded(step: RecordedStep, row_index: int) -> bool:
    return not step.responses[step.sequences[row_index].response].is_graded
