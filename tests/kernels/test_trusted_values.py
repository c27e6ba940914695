"""Checks of values, which wait for the device, can be left out by callers that made them."""

import pytest
import torch
from r1_kernels import SamplingMask, linear_policy_loss, linear_token_logprobs, token_logprobs
from r1_kernels.arguments import check_cu_seqlens, trusted_values


@pytest.fixture(autouse=True)
def no_reading(monkeypatch):
    """Nothing of a tensor becomes a Python number."""

    def refuse(*_):
        raise RuntimeError("the host waits for the device")

    monkeypatch.setattr(torch.Tensor, "tolist", refuse)
    monkeypatch.setattr(torch.Tensor, "item", refuse)


def calls():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
    ones, cu_seqlens = torch.ones(3), torch.tensor([0, 3])
    yield lambda: linear_token_logprobs(hidden, weight, targets)
    yield lambda: token_logprobs(hidden @ weight.t(), targets)
    kept = SamplingMask(targets.int(), torch.tensor([0, 1, 2, 3]))
    yield lambda: token_logprobs(hidden @ weight.t(), targets, sampling_mask=kept)
    yield lambda: linear_policy_loss(
        *(hidden, weight, targets, None, None, ones, ones),
        average="sequence",
        cu_seqlens=cu_seqlens,
        kl_beta=0.0,
    )


def test_trusted_values_are_not_read():
    for call in calls():
        with pytest.raises(RuntimeError, match="waits"):
            call()
        with trusted_values():
            call()
        with pytest.raises(RuntimeError, match="waits"):
            call()


def test_shapes_are_checked_all_the_same():
    with trusted_values():
        with pytest.raises(ValueError, match=r"targets must be \(3,\)"):
            token_logprobs(torch.randn(3, 5), torch.tensor([0]))
        with pytest.raises(ValueError, match="cu_seqlens must be"):
            check_cu_seqlens(torch.zeros(1, 1), 3)
