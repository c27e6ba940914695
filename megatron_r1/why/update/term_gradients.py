"""Computes the gradient of each term of a step's loss by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_r1.why.policy.token_rows import TokenRow
from megatron_r1.why.update.adam import Moments
from megatron_r1.why.update.loss_terms import LossTerm


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
