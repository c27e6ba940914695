"""Fits how often a run added the gradient of each loss term, by least squares.

Adam's first moments before and after a step are linear in the gradients,

    m_after - β1^n m_before = (1 - β1) Σ_i β1^(n-1-i) s_i Σ_k c_k g_ik

for n updates, terms k and clipping by s_i."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.update.adam import Moments
from megatron_r1.why.update.loss_terms import LossTerm
from megatron_r1.why.update.term_gradients import TermGradients

MAX_UNCERTAINTY = 0.25
"""The largest uncertainty of a coefficient that tells 0, 1 and 2 apart."""
MOMENT_ROUNDING = 2.0**-20
"""Relative to the moments: what is left of their rounding in fp32, of a few updates."""
CHUNK_VALUES = 2**22
"""Values of a tensor that are in float64 at once."""
MIN_EIGENVALUE = 1e-14
"""The smallest eigenvalue of a matrix of correlations; those below it are rounding."""
MAX_ROUNDS, MIN_CHANGE, MIN_CHANGE_OF_ROUNDING = 6, 1e-3, 0.125
"""Rounds in which updates are made with the coefficients of the round before, and the change of
these that ends them, absolute and of what rounding may be."""
MAX_RESIDUAL_RATIO = 0.7
"""Of what the terms do not explain, the share above which another round would not help."""


@dataclass(frozen=True)
class Coefficient:
    """How often the gradient of a term is in the run's.

    Attributes:
        term: the term.
        norm: the norm of its gradient before clipping, mean over the updates.
        value: the coefficient; NaN where the term has no gradient.
        rounding_error: how far rounding may have moved it.
        uncertainty: how far rounding, and what the terms do not explain, may have moved it."""

    term: LossTerm
    norm: float
    value: float
    rounding_error: float
    uncertainty: float

    @property
    def is_identifiable(self) -> bool:
        """Whether the gradients say what the coefficient is."""
        return self.uncertainty <= MAX_UNCERTAINTY


@dataclass(frozen=True)
class TermFit:
    """The run's gradient as a combination of the terms'.

    Attributes:
        coefficients: how often each term is in it.
        residual: what no combination of the terms gives, of the run's gradient; infinite where that
            is 0.
        error: the uncertainty of the run's gradient, of its size."""

    coefficients: tuple[Coefficient, ...]
    residual: float
    error: float

    def departing_coefficients(self, tolerance: float) -> list[Coefficient]:
        """Return the coefficients that are known and not what they should be.

        Args:
            tolerance: their largest distance, unless they are known less well."""
        return [
            coefficient
            for coefficient in self.coefficients
            if coefficient.is_identifiable
            and abs(coefficient.value - coefficient.term.expected_coefficient)
            > max(tolerance, coefficient.uncertainty)
        ]


@dataclass(frozen=True)
class FirstMoments:
    """Adam's first moments around a step.

    Attributes:
        before_step: the moments before it, by parameter; one that is missing has zeros.
        after_step: those after it.
        decay: β1^n of the step's n updates."""

    before_step: Moments
    after_step: Moments
    decay: float


@torch.no_grad()
def fit_coefficients(
    gradients: TermGradients, moments: FirstMoments, relative_error: float
) -> TermFit:
    """Return the coefficients for which the terms' gradients are nearest to the run's.

    A coefficient is uncertain by the error of the run's gradient over the length of the part of
    the term's gradient that is orthogonal to all others, so that it is not known of a term that is
    as small as rounding, nor of one that is like others.

    Args:
        gradients: those of the terms, of all updates.
        moments: the run's.
        relative_error: the relative error of the run's gradient, and of the recomputed ones.

    Raises:
        CannotRecompute: the gradients are not finite."""
    gram, products, square, moments_norm = _inner_products(gradients, moments)
    sizes = gram.diagonal().sqrt()
    size = math.sqrt(square)
    if not bool(torch.isfinite(gram).all()) or not math.isfinite(size):
        raise CannotRecompute("gradients, or Adam's moments, are not finite")
    nonzero = torch.where(sizes > 0, sizes, 1.0)
    correlations = gram / torch.outer(nonzero, nonzero)
    correlations.diagonal().fill_(1.0)
    eigenvalues, vectors = torch.linalg.eigh(correlations)
    inverse = (vectors / eigenvalues.clamp(min=MIN_EIGENVALUE)) @ vectors.T
    values = inverse @ (products / nonzero) / nonzero
    lengths = sizes / inverse.diagonal().sqrt()
    residual = math.sqrt(max(0.0, square + float(values @ (gram @ values - 2 * products))))
    error = relative_error * (size + float(sizes.sum())) + MOMENT_ROUNDING * moments_norm
    coefficients = tuple(
        Coefficient(
            term,
            gradients.norms[term.name],
            float(value) if length else math.nan,
            *(part / length if length else math.inf for part in (error, error + residual)),
        )
        for term, value, length in zip(gradients.terms, values, lengths.tolist(), strict=True)
    )
    return TermFit(coefficients, *(part / size if size else math.inf for part in (residual, error)))


def _inner_products(
    gradients: TermGradients, moments: FirstMoments
) -> tuple[Tensor, Tensor, float, float]:
    """Return the inner products of the terms' columns with each other and with the run's gradient,
    its square, and the norm of its moments. All are float64; the gradient is the difference of the
    moments."""
    count = len(gradients.terms)
    gram, products = (torch.zeros(count, n, dtype=torch.float64) for n in (count, 1))
    square = squared_moments = 0.0
    for name, after in moments.after_step.items():
        before = moments.before_step.get(name, torch.zeros_like(after))
        columns = [
            column.get(name, torch.zeros_like(after)) for column in gradients.columns.values()
        ]
        parts = [values.flatten().split(CHUNK_VALUES) for values in (after, before, *columns)]
        for chunk in zip(*parts, strict=True):
            last, first, *terms = (values.double() for values in chunk)
            target, matrix = last - moments.decay * first, torch.stack(terms)
            gram += matrix @ matrix.T
            products += (matrix @ target)[:, None]
            square += float(target.square().sum())
            squared_moments += float(last.square().sum() + (moments.decay * first).square().sum())
    return gram, products[:, 0], square, math.sqrt(squared_moments)


def fit_run(
    first_gradients: TermGradients,
    make_updates: Callable[[Mapping[str, float], tuple[float, ...]], TermGradients],
    moments: FirstMoments,
    relative_error: float,
    grad_norm: float,
    max_rounds: int = MAX_ROUNDS,
) -> TermFit:
    """Return how often the run added each term of the loss, the coefficients of its gradient. Where
    they are not what they should be, the updates are recomputed with them: later gradients, and how
    each was clipped, depend on them.

    Args:
        first_gradients: the gradients of updates as the settings say.
        make_updates: makes updates, given how often each term is added, and the norm of each
            update's gradient.
        moments: the run's.
        relative_error: as of `fit_coefficients`.
        grad_norm: the logged norm, mean over the updates.
        max_rounds: how often updates are recomputed at most."""
    gradients, fit = first_gradients, fit_coefficients(first_gradients, moments, relative_error)
    for _ in range(max_rounds):
        known_coefficients = [
            coefficient
            for coefficient in fit.coefficients
            if coefficient.rounding_error <= MAX_UNCERTAINTY
        ]
        if all(
            abs(coefficient.value - gradients.coefficients[coefficient.term.name])
            <= max(MIN_CHANGE, coefficient.rounding_error * MIN_CHANGE_OF_ROUNDING)
            for coefficient in known_coefficients
        ):
            break
        coefficients = {term.name: term.expected_coefficient for term in gradients.terms}
        coefficients |= {
            coefficient.term.name: coefficient.value for coefficient in known_coefficients
        }
        weights = torch.tensor(list(coefficients.values()), dtype=torch.float64)
        norms = [math.sqrt(max(0.0, float(weights @ p @ weights))) for p in gradients.products]
        mean_norm = sum(norms) / len(norms)
        factor = grad_norm / mean_norm if mean_norm else 1.0
        gradients = make_updates(coefficients, tuple(norm * factor for norm in norms))
        next_fit = fit_coefficients(gradients, moments, relative_error)
        is_nearer = next_fit.residual <= max(next_fit.error, fit.residual * MAX_RESIDUAL_RATIO)
        if not is_nearer:
            return fit if fit.residual < next_fit.residual * MAX_RESIDUAL_RATIO else next_fit
        fit = next_fit
    return fit
