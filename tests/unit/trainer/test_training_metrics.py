"""Metrics of micro-batches of different sizes, against the numbers of the tokens themselves."""

import math

import pytest
import torch

from megatron_r1.trainer.metrics import Maximum, Mean, merge_reports


def test_a_merged_mean_is_over_all_tokens_not_over_micro_batches():
    batches = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([10.0]), torch.empty(0)]
    reports = [{"kl": Mean(batch.sum(), len(batch))} for batch in batches]
    merged = merge_reports(reports)["kl"]
    assert merged == Mean(19.0, 4.0)
    assert merged.total / merged.count == pytest.approx(torch.cat(batches).mean().item())


def test_a_merged_maximum_is_the_largest_and_may_be_negative():
    reports = [{"ratio/max": Maximum(torch.tensor(value))} for value in (-3.0, -0.5, -2.0)]
    assert merge_reports(reports) == {"ratio/max": Maximum(-0.5)}


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan)])
def test_a_maximum_does_not_lose_a_nan(values):
    merged = merge_reports({"ratio/max": Maximum(torch.tensor(value))} for value in values)
    assert math.isnan(merged["ratio/max"].value)


def test_sums_over_many_micro_batches_do_not_lose_small_parts():
    # 2^24 + 1 is not a number in fp32; the sums are in fp64.
    reports = [{"loss": Mean(torch.tensor(value), 1)} for value in (2.0**24, 1.0, 1.0)]
    assert merge_reports(reports) == {"loss": Mean(2.0**24 + 2, 3.0)}


def test_a_metric_of_some_micro_batches_only_is_over_those():
    assert merge_reports([{}, {"a": Mean(1.0, 2)}, {"b": Maximum(3.0)}]) == {
        "a": Mean(1.0, 2.0),
        "b": Maximum(3.0),
    }
