"""Computes the gradient of each term of a step's loss by itself. The terms are the policy's, KL's
and the entropy's, and those of the responses that are cut off or left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_r1.why import formulas
from megatron_r1.why.policy.token_rows import TokenRow
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.update.adam import Moments
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


class TermGradients:
    """Collects the gradient of each term over the updates of a step, as Adam's first moments do.

    Args:
        terms: those of the loss.
        coefficients: how often the gradient of each is added, by name; one that is missing: as
            `LossTerm.expected_coefficient` says.

    Attributes:
        columns: by term, what the first moments of each parameter have of its gradient after the
            updates: (1 - β1) Σ β1^(n-1-i) s_i g_i, where clipping multiplies by s_i.
        products: (terms, terms) float64 of each update: the inner products of the terms'
            gradients before clipping."""

    def __init__(
        self, terms: Sequence[LossTerm], coefficients: Mapping[str, float] | None = None
    ) -> None:
        self.terms = tuple(terms)
        expected_coefficients = {term.name: term.expected_coefficient for term in terms}
        self.coefficients = expected_coefficients | dict(coefficients or {})
        self.columns: dict[str, Moments] = {term.name: {} for term in terms}
        self.products: list[Tensor] = []
        self._gradients: dict[str, Moments] = {term.name: {} for term in terms}

    def left_out_rows(self, index: int) -> dict[int, TokenRow]:
        """Return the rows that are left out of the loss and would be in an update.

        Args:
            index: the number of the update."""
        return {
            row_index: row
            for term in self.terms
            if term.left_out_rows
            for row_index, row in term.left_out_rows[index].items()
        }

    def backward(
        self,
        terms_by_row: Mapping[int, Mapping[str, Tensor]],
        parameters: Moments,
        *,
        keeps_graph: bool = False,
    ) -> None:
        """Add the gradients of some rows.

        Args:
            terms_by_row: the terms of each, of one pass.
            parameters: those that have gradients, by name.
            keeps_graph: whether the graph of the pass is used again."""
        sums: dict[str, Tensor] = {}
        for row_index, row_parts in terms_by_row.items():
            for term in self.terms:
                if row_index in term.rows and row_parts[term.part].requires_grad:
                    value = row_parts[term.part]
                    sums[term.name] = sums[term.name] + value if term.name in sums else value
        for number, (name, loss_part) in enumerate(sums.items(), 1):
            is_used_again = keeps_graph or number < len(sums)
            add_gradients(self._gradients[name], loss_part, parameters, keeps_graph=is_used_again)

    def add(self, by_term: Mapping[str, Moments]) -> None:
        """Add the gradients of an update as they were computed before.

        Args:
            by_term: what `copy_gradients` returned."""
        for name, gradients in by_term.items():
            self._gradients[name] = {key: values.clone() for key, values in gradients.items()}

    def copy_gradients(self) -> dict[str, Moments]:
        """Return a copy of the gradients of the present update, by term."""
        return {
            name: {key: values.clone() for key, values in gradients.items()}
            for name, gradients in self._gradients.items()
        }

    def loss_gradient(self) -> Moments:
        """Return the gradient of the loss in this update."""
        sums: Moments = {}
        for term_name, gradients in self._gradients.items():
            coefficient = self.coefficients[term_name]
            for name, values in gradients.items():
                if coefficient:
                    scaled = values * coefficient
                    sums[name] = sums[name].add_(scaled) if name in sums else scaled
        return sums

    @torch.no_grad()
    def end_update(self, scale: float, beta1: float) -> None:
        """Add the gradients of an update to the columns.

        Args:
            scale: what clipping multiplied the gradient by.
            beta1: Adam's decay of the first moments."""
        by_term = list(self._gradients.values())
        products = torch.zeros(len(by_term), len(by_term), dtype=torch.float64)
        for row, first in enumerate(by_term):
            for column, second in enumerate(by_term[: row + 1]):
                shared = first.keys() & second.keys()
                product = sum(float((first[k].double() * second[k].double()).sum()) for k in shared)
                products[row, column] = products[column, row] = product
        self.products.append(products)
        for name, gradients in self._gradients.items():
            columns = self.columns[name]
            for values in columns.values():
                values.mul_(beta1)
            for key, values in gradients.items():
                added = values.mul_((1 - beta1) * scale)
                columns[key] = columns[key].add_(added) if key in columns else added
        self._gradients = {term.name: {} for term in self.terms}

    @property
    def norms(self) -> dict[str, float]:
        """The norm of each term's gradient before clipping, mean over the updates."""
        by_update = torch.stack([products.diagonal().sqrt() for products in self.products])
        means = by_update.mean(0).tolist()
        return {term.name: norm for term, norm in zip(self.terms, means, strict=True)}


def add_gradients(
    gradients: Moments, loss_part: Tensor, parameters: Moments, *, keeps_graph: bool
) -> None:
    """Add the gradient of a part of the loss to gradients.

    Args:
        gradients: by parameter, which are changed.
        loss_part: the part, a sum over rows.
        parameters: those that it is of, by name.
        keeps_graph: whether the graph of the part is used again."""
    term_gradients = torch.autograd.grad(
        loss_part, list(parameters.values()), retain_graph=keeps_graph, allow_unused=True
    )
    for name, values in zip(parameters, term_gradients, strict=True):
        if values is not None:
            gradients[name] = gradients[name].add_(values) if name in gradients else values.clone()


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
