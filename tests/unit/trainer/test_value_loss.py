"""The critic's loss and its explained variance, token by token in fp64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_r1.trainer.metrics import merge_reports
from megatron_r1.trainer.value_loss import explained_variance, value_loss

ROWS = [1, 2, 4, 6, 7]


def micro_batch(seed=0, size=9):
    g = torch.Generator().manual_seed(seed)
    old, returns, new = torch.randn(3, size, generator=g)
    return SimpleNamespace(response_positions=torch.tensor(ROWS), values=old, returns=returns), new


@pytest.mark.parametrize("clip", [None, 0.2])
def test_each_token_has_the_larger_of_the_plain_and_the_clipped_error(clip):
    batch, new = micro_batch()
    total, clipped = 0.0, 0
    for row in ROWS:
        v, v_old, r = (float(x[row]) for x in (new, batch.values, batch.returns))
        near = v if clip is None else min(max(v, v_old - clip), v_old + clip)
        total += 0.5 * max((v - r) ** 2, (near - r) ** 2)
        clipped += (near - r) ** 2 > (v - r) ** 2
    terms = value_loss(batch, new[None], clip)
    assert terms.loss.item() == pytest.approx(total, rel=1e-6)
    assert terms.denominator.item() == len(ROWS)
    metrics = {name: float(m.total) / float(m.count) for name, m in terms.metrics.items()}
    assert metrics["value/clip_fraction"] == clipped / len(ROWS)
    assert metrics["value/mean"] == pytest.approx(new[ROWS].mean().item())


def test_the_variance_that_values_explain_is_over_all_micro_batches():
    parts = [micro_batch(seed) for seed in (0, 1)]
    merged = merge_reports([value_loss(batch, new[None], None).metrics for batch, new in parts])
    metrics = {name: float(m.total) / float(m.count) for name, m in merged.items()}
    returns = np.concatenate([batch.returns[ROWS].double() for batch, _ in parts])
    values = np.concatenate([batch.values[ROWS].double() for batch, _ in parts])
    wanted = 1 - np.var(returns - values) / np.var(returns)
    assert explained_variance(metrics) == pytest.approx(wanted)
    assert set(metrics) == {"value/loss", "value/clip_fraction", "value/mean"}


def test_equal_returns_have_no_variance_to_explain():
    moments = {"return": 2.0, "return_squared": 4.0, "error": 1.0, "error_squared": 3.0}
    assert explained_variance(moments) == 0.0
    # Returns of an advantage and a value whose sum is 0.1, but for fp32's rounding.
    values = torch.linspace(-3, 3, 1001)
    returns, errors = ((0.1 - values) + values).double(), 0.1 - values.double()
    assert returns.std() > 0
    both = {"return": returns, "error": errors}
    moments = {name: x.mean().item() for name, x in both.items()}
    moments |= {f"{name}_squared": x.square().mean().item() for name, x in both.items()}
    assert explained_variance(moments) == 0.0
