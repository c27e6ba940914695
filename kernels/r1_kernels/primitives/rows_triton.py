"""What the kernels over rows of logits share: a row's softmax arithmetic, and its arguments.

`softmax_triton` has the kernels over all columns of a row, `kept_triton` those over the ids that a
sampler kept. Formulae of both, with z a row of logits, c = 1 / temperature, m = max z,
e_j = exp(c (z_j - m)), y the target:

    total  S = Σ_j e_j       moment  M = Σ_j e_j c (z_j - m)       p_j = e_j / S
    log p_y = c (z_y - m) - log S                  entropy H = log S - M / S
    d z_j   = c g ([j = y] - p_j) - c h p_j (log p_j + H)

where g and h are the upstream gradients of log p_y and H. Parts of a row, with maxima m' and sums
S', M', are joined as in online softmax (arXiv 1805.02867, algorithm 3): with f = exp(c (m' - m)),

    S = Σ f S'       M = Σ f (M' + c (m' - m) S')

Exponentials are base 2 and take (z - peak) · c: the difference first, so that the largest term is
exactly 1 and a log-probability cannot come out positive."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1_kernels.vocabulary import RowUpstream, VocabShard

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
LOAD_BYTES = 16  # the largest load of one thread


@triton.jit
def target_column(targets, row, first_column, end):
    """Return the column of a row's target in this shard, and whether it is one before `end`.

    Args:
        targets: (T,) pointer to ids of the whole vocabulary.
        row: the row's index, from 0.
        first_column: id of the shard's first column.
        end: the column after the last."""
    column = tl.load(targets + row).to(tl.int64) - first_column
    return column, (column >= 0) & (column < end)


@triton.jit
def _softmax_terms(z, base, to_base2):
    """Return e = 2^x and e x of (LANES, VECTOR) logits, x being their distance from `base`."""
    x = (z - base[:, None]) * to_base2
    e = tl.exp2(x)
    # -inf · 0 counts as 0, its limit; e is 0 long before x reaches -1000.
    return e, e * tl.maximum(x, -1000.0)


@triton.jit
def fold_logits(loaded, peak, total, moment, to_base2):
    """Update the running (LANES,) statistics with a tuple of (LANES, VECTOR) logits.

    Args:
        loaded: a tuple of (LANES, VECTOR) logits.
        peak: (LANES,) running largest logits.
        total: (LANES,) running sums of exponentials.
        moment: (LANES,) running sums of exponentials times exponents, in base 2.
        to_base2: c · log2 e."""
    highest = loaded[0]
    for i in tl.static_range(1, len(loaded)):
        highest = tl.maximum(highest, loaded[i])
    new_peak = tl.maximum(peak, tl.max(highest, 1))
    # A lane that has read only -inf has no maximum to subtract and no sums to scale.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shift = tl.where(peak == float("-inf"), 0.0, (peak - base) * to_base2)
    sum_e, sum_ex = _softmax_terms(loaded[0], base, to_base2)
    for i in tl.static_range(1, len(loaded)):
        e, ex = _softmax_terms(loaded[i], base, to_base2)
        sum_e += e
        sum_ex += ex
    fade = tl.exp2(shift)
    # The floor avoids 0 · -inf for a lane of banned tokens (logits at the lowest fp32).
    moment = fade * (moment + tl.maximum(shift, -1000.0) * total) + tl.sum(sum_ex, 1)
    total = fade * total + tl.sum(sum_e, 1)
    return new_peak, total, moment


@triton.jit
def combine_lanes(peak, total, moment, to_base2):
    """Return a row's peak, total and moment from the (LANES,) statistics of its lanes.

    Args:
        peak: (LANES,), as of `fold_logits`.
        total: (LANES,).
        moment: (LANES,).
        to_base2: c · log2 e."""
    row_peak = tl.max(peak, 0)
    base = tl.where(row_peak == float("-inf"), 0.0, row_peak)
    shift = tl.where(peak == float("-inf"), 0.0, (peak - base) * to_base2)
    fade = tl.exp2(shift)
    row_moment = tl.sum(fade * (moment + tl.maximum(shift, -1000.0) * total), 0) * LN2
    row_total = tl.sum(fade * total, 0)
    return row_peak, row_total, row_moment


@triton.jit
def store_statistics(statistics, row, num_rows, peak, total, moment, target_logit):
    """Store a row's `vocabulary.STATISTICS`.

    Args:
        statistics: (4, T) fp32 pointer.
        row: the row's index, from 0.
        num_rows: T.
        peak: the row's largest logit.
        total: the sum of its exponentials.
        moment: the sum of exponentials times exponents.
        target_logit: the target's logit."""
    tl.store(statistics + row, peak)
    tl.store(statistics + num_rows + row, total)
    tl.store(statistics + 2 * num_rows + row, moment)
    tl.store(statistics + 3 * num_rows + row, target_logit)


@triton.jit
def load_row_upstream(
    row, peak, log_total, entropy, grad_logprobs, grad_entropy, scale, HAS_ENTROPY: tl.constexpr
):
    """Load what a row's gradient needs of `RowUpstream`.

    Returned are the peak, log2 of the total, c g, the two factors of `softmax_gradient`, and
    whether the row has an upstream gradient.

    Args:
        row: the row's index, from 0.
        peak: (T,) pointers to the largest logit of each row.
        log_total: (T,) pointers to the logarithm of the sum.
        entropy: (T,) pointers to the entropy, read only with HAS_ENTROPY.
        grad_logprobs: (T,) pointers to the upstream gradient of log p(target).
        grad_entropy: (T,) pointers to that of the entropy, read only with HAS_ENTROPY.
        scale: c.
        HAS_ENTROPY: whether the entropy has a gradient."""
    row_peak = tl.load(peak + row)
    log2_total = tl.load(log_total + row) * LOG2E
    upstream = tl.load(grad_logprobs + row) * scale
    flat = -upstream
    slope = 0.0
    if HAS_ENTROPY:
        # d H / d z = -c p (log p + H)
        slope = -tl.load(grad_entropy + row) * scale
        flat += slope * tl.load(entropy + row)
        slope = slope * LN2
    has_gradient = (flat != 0.0) | (slope != 0.0) | (upstream != 0.0)
    return row_peak, log2_total, upstream, flat, slope, has_gradient


@triton.jit
def softmax_gradient(z, row_peak, to_base2, log2_total, flat, slope, HAS_ENTROPY: tl.constexpr):
    """Return p · (flat + slope · log2 p) at logits z, p being their probabilities.

    Args:
        z: logits.
        row_peak: the row's largest logit.
        to_base2: c · log2 e.
        log2_total: log2 of the row's total.
        flat: the factor of p.
        slope: the factor of p · log2 p.
        HAS_ENTROPY: whether slope counts."""
    log2_p = (z - row_peak) * to_base2 - log2_total
    p = tl.exp2(log2_p)
    return p * (flat + slope * tl.maximum(log2_p, -1000.0)) if HAS_ENTROPY else p * flat


def upstream_arguments(upstream: RowUpstream) -> tuple[Tensor, ...]:
    """Return peak, log_total, entropy, grad_logprobs and grad_entropy as kernels take them.

    For a missing grad_entropy, which they do not read, it is any pointer."""
    # The upstream gradient of a sum is expanded from one number, with stride 0.
    entropy, peak, log_total, grad_logprobs = (part.contiguous() for part in upstream[:4])
    grad_entropy = upstream.grad_entropy
    last = grad_logprobs if grad_entropy is None else grad_entropy.contiguous()
    return peak, log_total, entropy, grad_logprobs, last


def check_rows(matrix: Tensor, targets: Tensor, shard: VocabShard) -> None:
    """Assert (T, V_local) floats with adjacent columns: the kernels get a stride for rows only.

    Args:
        matrix: logits, or their gradient.
        targets: (T,) ids.
        shard: the columns."""
    about = f"{matrix.dtype} {tuple(matrix.shape)}, strides {matrix.stride()}, {shard}"
    assert matrix.is_floating_point() and matrix.dtype != torch.float64, about
    assert matrix.shape == (len(targets), shard.num_columns), about
    assert matrix.stride(1) == 1 or shard.num_columns == 1 or not len(matrix), about


def row_alignment(matrix: Tensor) -> int:
    """Return a power of two up to 16 that divides the start of every row, in elements."""
    if matrix.data_ptr() % LOAD_BYTES:
        return 1
    return math.gcd(16, matrix.stride(0))
