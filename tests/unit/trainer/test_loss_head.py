"""Losses on a packed batch, from hidden states, against fp64 on each sample alone."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from r1_kernels import PolicySettings

from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.controller.algorithms.grpo import loss as grpo_loss
from megatron_r1.models.sampling_mask import encode_mask
from megatron_r1.trainer.loss_head import LossHead, TokenAveraging
from megatron_r1.trainer.losses import supervised_loss
from megatron_r1.trainer.sequence_packing import pack_batch
from megatron_r1.trainer.token_split import TokenSplit
from megatron_r1.trainer.training_sample import Sample

HIDDEN, VOCABULARY, PADDED = 6, 13, 16
SAMPLES = [
    ([7, 8, 9], [10, 11], 2.0),
    ([5], [6, 1, 2], -1.0),
    ([3, 4], [12], 0.5),
]
GRPO = LossSettings(loss_average="sequence", clip_low=0.2, clip_high=0.3, kl_beta=0.1)


def micro_batch(samples=SAMPLES, seed=0, kept=None):
    g = torch.Generator().manual_seed(seed)
    masks = kept or [b""] * len(samples)
    made = [
        Sample.pack(p, r, [-2.0] * len(r), outcome_advantage=a, sampling_mask=mask)
        for (p, r, a), mask in zip(samples, masks, strict=True)
    ]
    batch = pack_batch(made, TokenSplit(tensor_size=4), torch.device("cpu"))
    tokens = batch.input_ids.shape[1]
    hidden = torch.randn(tokens, HIDDEN, generator=g, requires_grad=True)
    weight = torch.randn(PADDED, HIDDEN, generator=g)
    for name in ("old", "ref"):
        batch.logprobs[name] = -2.5 + 0.3 * torch.randn(tokens, generator=g)
    return batch, LossHead(batch, hidden, weight, 0.8, None, VOCABULARY)


def responses(samples=SAMPLES):
    """Each response's positions in the packed batch, and its tokens."""
    start = 0
    for prompt, response, advantage in samples:
        first = start + len(prompt) - 1
        yield slice(first, first + len(response)), torch.tensor(response), advantage
        start += len(prompt) + len(response)


def logprobs_of(head, rows, tokens):
    logits = head.hidden.double()[rows] @ head.weight[:VOCABULARY].double().t() / 0.8
    return torch.log_softmax(logits, -1).gather(-1, tokens[:, None])[:, 0]


def test_logprobs_are_those_of_each_response_and_0_elsewhere():
    batch, head = micro_batch()
    got, entropy = head.logprobs()
    expected = torch.zeros(len(got), dtype=torch.float64)
    for rows, tokens, _ in responses():
        expected[rows] = logprobs_of(head, rows, tokens)
    # fp32 sums of 13 terms of order 1
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    assert (entropy[~batch.is_response] == 0).all() and (entropy[batch.is_response] > 0).all()


def test_log_probabilities_and_loss_are_of_the_tokens_that_the_sampler_kept():
    sets = [[[2, 10], [11]], [[0, 6, 9], [1, 2, 3, 4], [2, 12]], [[0, 3, 5, 12]]]
    batch, head = micro_batch(kept=[encode_mask(each) for each in sets])
    got, entropy = head.logprobs()
    no_clip = PolicySettings(clip_low=1e6, clip_high=1e6, kl_beta=0.0)
    loss = head.policy_loss(
        no_clip, TokenAveraging(batch.is_response, denominator=int(batch.is_response.sum()))
    )
    expected = torch.zeros(len(got), dtype=torch.float64)
    of_entropy = torch.zeros_like(expected)
    logits = head.hidden.double() @ head.weight[:VOCABULARY].double().t() / 0.8
    for (rows, tokens, _), own in zip(responses(), sets, strict=True):
        for row, token, ids in zip(range(rows.start, rows.stop), tokens, own, strict=True):
            log_p = logits[row, ids].log_softmax(0)
            expected[row] = log_p[ids.index(int(token))]
            of_entropy[row] = -(log_p.exp() * log_p).sum()
    torch.testing.assert_close(got.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), of_entropy.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.logprobs, got.detach())
    ratio = (expected - batch.logprobs["old"].double())[batch.is_response].exp()
    surrogate = ratio * batch.advantages[batch.is_response].double()
    torch.testing.assert_close(loss.loss.double(), -surrogate.mean(), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss.loss, head.hidden)
    (wanted,) = torch.autograd.grad(-surrogate.mean(), head.hidden)
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


def test_an_update_that_asks_for_log_probabilities_alone_leaves_those_of_the_old_policy():
    """As a loss of a user's may: step 1 compares them with the engine's."""
    batch, head = micro_batch()
    for _ in range(2):
        expected = batch.logprobs["old"].clone()
        assert replace(head, stores_old_logprobs=True).logprobs()[0].requires_grad
        torch.testing.assert_close(batch.logprobs["old"], expected)  # those that are there stay
        del batch.logprobs["old"]
        head.logprobs()
        assert "old" not in batch.logprobs
        made = replace(head, stores_old_logprobs=True).logprobs()[0]
        assert torch.equal(batch.logprobs["old"], made) and not batch.logprobs["old"].requires_grad


def test_supervised_loss_is_the_negative_log_likelihood_of_the_responses():
    batch, head = micro_batch()
    terms = supervised_loss(batch, head)
    expected = -sum(logprobs_of(head, rows, tokens).sum() for rows, tokens, _ in responses())
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms.denominator.item() == 6


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_grpo_s_loss_and_gradient_are_equation_1_of_each_response(average):
    batch, head = micro_batch()
    terms = grpo_loss(batch, head, replace(GRPO, loss_average=average))
    terms.loss.backward()
    got, head.hidden.grad = head.hidden.grad, None
    expected = 0.0
    for rows, tokens, advantage in responses():
        new = logprobs_of(head, rows, tokens)
        ratio = (new - batch.logprobs["old"][rows].double()).exp()
        objective = torch.min(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
        gap = batch.logprobs["ref"][rows].double() - new
        loss = -objective + 0.1 * (gap.exp() - gap - 1)
        expected = expected + (loss.mean() if average == "sequence" else loss.sum())
    expected.backward()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms.denominator.item() == (3 if average == "sequence" else 6)
    torch.testing.assert_close(got, head.hidden.grad, atol=1e-5, rtol=1e-4)


def test_the_branches_of_an_episode_share_one_mean():
    def branch(tokens, num_sampled, of, num_responses):
        mask = bytes([0] * (len(tokens) - num_sampled) + [1] * num_sampled)
        logprobs, fields = [-2.0] * len(tokens), {"weight": num_sampled / of}
        return Sample.pack_branch(
            tokens, mask, logprobs, 2.0, num_responses=num_responses, **fields
        )

    first = branch([7, 8, 9], 2, of=3, num_responses=1)
    second = branch([5, 6], 1, of=3, num_responses=0)
    whole = Sample.pack([3, 4], [12, 11], [-2.0, -2.0], outcome_advantage=-1.0)
    batch = pack_batch([first, second, whole], TokenSplit(), torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(batch.targets), HIDDEN, generator=g)
    weight = torch.randn(PADDED, HIDDEN, generator=g)
    batch.logprobs["old"] = torch.full((len(hidden),), -2.5)
    head = LossHead(batch, hidden, weight, 0.8, None, VOCABULARY)
    terms = grpo_loss(batch, head, replace(GRPO, kl_beta=0.0))
    rows = batch.response_positions
    new = logprobs_of(head, rows, batch.targets[rows])
    ratio, advantages = (new + 2.5).exp(), batch.advantages[rows]
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    expected = (losses[:3].mean() + losses[3:].mean()).item()
    assert terms.loss.item() == pytest.approx(expected, rel=1e-5)  # fp32, as above
    assert terms.denominator.item() == 2


def test_the_engine_s_log_probabilities_weigh_the_loss_when_asked():
    batch, head = micro_batch()
    terms = grpo_loss(batch, head, replace(GRPO, importance_cap=0.7, kl_beta=0.0))
    gaps = (batch.logprobs["old"] - batch.rollout_logprobs)[batch.is_response]
    expected = gaps.exp().clamp(max=0.7).sum()
    assert terms.metrics["importance"].total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_micro_batch_without_samples_has_a_loss_and_gradient_of_zero():
    for loss, settings in ((supervised_loss, None), (grpo_loss, GRPO)):
        batch, head = micro_batch(samples=[])
        terms = loss(batch, head, settings)
        terms.loss.backward()
        assert terms.loss.item() == 0.0 and head.hidden.grad.abs().sum() == 0


@pytest.mark.more
def test_losses_are_imported_without_megatron():
    program = (
        "import sys; import megatron_r1.trainer.losses, megatron_r1.controller.algorithms.grpo; "
        "print(*(name for name in sys.modules if name.startswith('megatron.')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == [], done.stderr
    assert done.returncode == 0, done.stderr
