"""The policy that is sampled with a cut is the policy that is trained: by exact enumeration.

Vocabulary 8, three tokens, a logit for each prefix and token. The sampler keeps a nucleus, the k
largest, or what min-p leaves. Every sequence is enumerated with its probability under this
masked policy, so that the expectation of the gradient has no sampling error."""

from itertools import product

import pytest
import torch
from r1_kernels import SamplingMask, linear_policy_loss, token_logprobs

from megatron_r1.config import RLConfig
from megatron_r1.controller.algorithms import grpo
from megatron_r1.trainer.token_advantages import discounted_sums

VOCABULARY, LENGTH, TEMPERATURE = 8, 3, 0.9
EXACT = 1e-12
CUTS = {
    "top_p 0.8": lambda p: p.sort(descending=True)[0].cumsum(0) - p.sort(descending=True)[0] < 0.8,
    "top_k 3": lambda p: torch.arange(len(p)) < 3,
    "min_p 0.2": lambda p: p.sort(descending=True)[0] >= 0.2 * p.max(),
    "top_k 5, top_p 0.9": lambda p: (
        (p.sort(descending=True)[0].cumsum(0) - p.sort(descending=True)[0] < 0.9)
        & (torch.arange(len(p)) < 5)
    ),
}
SEQUENCES = torch.tensor(list(product(range(VOCABULARY), repeat=LENGTH)))


def prefixes(sequences):
    """(N, LENGTH) numbers of the prefixes: 0, then 1 to 8, then 9 to 72."""
    first, second = sequences[:, 0], sequences[:, 1]
    zeros = torch.zeros_like(first)
    return torch.stack([zeros, 1 + first, 1 + VOCABULARY + VOCABULARY * first + second], 1)


class MaskedPolicy:
    """A table of logits, and what a cut keeps of each row. The kept sets are constants."""

    def __init__(self, cut):
        g = torch.Generator().manual_seed(7)
        rows = 1 + VOCABULARY + VOCABULARY**2
        self.logits = 1.5 * torch.randn(rows, VOCABULARY, generator=g, dtype=torch.float64)
        self.rewards = torch.randn(len(SEQUENCES), generator=g, dtype=torch.float64)
        self.kept = torch.zeros(rows, VOCABULARY, dtype=torch.bool)
        for row, p in enumerate((self.logits / TEMPERATURE).softmax(-1)):
            self.kept[row, p.argsort(descending=True)] = CUTS[cut](p)

    def probabilities(self, logits):
        """Of all sequences: the definition, in plain differentiable PyTorch."""
        p = torch.where(self.kept, logits / TEMPERATURE, -torch.inf).softmax(-1)
        return p[prefixes(SEQUENCES), SEQUENCES].prod(1)

    def possible(self):
        return self.probabilities(self.logits) > 0

    def gradient_of_expected_reward(self):
        leaf = self.logits.clone().requires_grad_()
        (self.probabilities(leaf) @ self.rewards).backward()
        return leaf.grad

    def mask(self, rows):
        """What an engine returns for these rows of the table."""
        kept = self.kept[rows]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
        return SamplingMask(kept.nonzero()[:, 1].int(), offsets)


@pytest.mark.parametrize("cut", CUTS)
def test_reinforce_has_the_masked_policys_gradient(cut):
    policy = MaskedPolicy(cut)
    possible = policy.possible()
    sampled, rows = SEQUENCES[possible], prefixes(SEQUENCES)[possible]
    probability = policy.probabilities(policy.logits)[possible]
    assert len(sampled) < len(SEQUENCES) and abs(probability.sum() - 1) < EXACT
    want = policy.gradient_of_expected_reward()

    def expectation(mask):
        leaf = policy.logits.clone().requires_grad_()
        logprobs, _ = token_logprobs(
            leaf[rows.flatten()],
            sampled.flatten(),
            temperature=TEMPERATURE,
            sampling_mask=mask,
            backend="torch",
        )
        terms = logprobs.view(-1, LENGTH).sum(1)
        (probability * policy.rewards[possible] @ terms).backward()
        return leaf.grad, terms

    got, logprobs = expectation(policy.mask(rows.flatten()))
    torch.testing.assert_close(logprobs.exp(), probability, atol=EXACT, rtol=0)
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)
    without, _ = expectation(None)
    assert (without - want).abs().max() > 0.01, "the cut makes no difference"


@pytest.mark.parametrize("cut", CUTS)
def test_grpo_over_every_group_has_the_masked_policys_gradient(cut):
    """Groups of two. The mean of a group has the response's own reward in it, so without a division
    by the deviation the expected gradient is (G - 1) / G of the policy's."""
    policy = MaskedPolicy(cut)
    possible = policy.possible().nonzero()[:, 0]
    probability = policy.probabilities(policy.logits)[possible]
    likeliest = probability.argsort(descending=True)[:24]  # 576 groups are enough of them
    policy.rewards = policy.rewards.index_fill(0, possible, 0.0).index_copy(
        0, possible[likeliest], policy.rewards[possible[likeliest]]
    )
    pairs = torch.tensor(list(product(range(len(possible)), repeat=2)))
    rewards = policy.rewards[possible]
    groups = rewards[pairs].tolist()
    advantages = torch.tensor(
        grpo.advantages(groups, RLConfig(advantage_std="none")), dtype=torch.float64
    )
    # A response's terms in all groups are one weight: Σ over the other one of p(other) A.
    weights = torch.zeros(len(possible), dtype=torch.float64)
    for member in range(2):
        share = probability[pairs].prod(1) * advantages[:, member]
        weights.index_add_(0, pairs[:, member], share / 2)
    rows = prefixes(SEQUENCES)[possible].flatten()
    targets = SEQUENCES[possible].flatten()
    weight = policy.logits.t().contiguous().requires_grad_()  # of one-hot hidden states: the table
    hidden = torch.eye(len(policy.logits), dtype=torch.float64)[rows]
    loss = linear_policy_loss(
        *(hidden, weight, targets, None, None),
        weights.repeat_interleave(LENGTH),
        torch.ones(len(targets), dtype=torch.float64),
        temperature=TEMPERATURE,
        sampling_mask=policy.mask(rows),
        kl_beta=0.0,
        denominator=1.0,
        backend="torch",
    )
    loss.loss.backward()
    want = policy.gradient_of_expected_reward() / 2
    torch.testing.assert_close(-weight.grad.t(), want, atol=EXACT, rtol=0)
    torch.testing.assert_close(
        loss.logprobs.view(-1, LENGTH).sum(1).exp(), probability, atol=EXACT, rtol=0
    )


@pytest.mark.parametrize("cut", CUTS)
def test_distillation_has_the_gradient_of_the_masked_policys_divergence(cut):
    """KL(masked student ‖ teacher over the whole vocabulary), of whole responses."""
    policy = MaskedPolicy(cut)
    possible = policy.possible()
    sampled, rows = SEQUENCES[possible], prefixes(SEQUENCES)[possible]
    g = torch.Generator().manual_seed(8)
    table = torch.randn(policy.logits.shape, generator=g, dtype=torch.float64).log_softmax(-1)
    teacher = table[rows, sampled]

    leaf = policy.logits.clone().requires_grad_()
    probability = policy.probabilities(leaf)[possible]
    (probability * (probability.log() - teacher.sum(1))).sum().backward()

    old, _ = token_logprobs(
        policy.logits[rows.flatten()],
        sampled.flatten(),
        temperature=TEMPERATURE,
        sampling_mask=policy.mask(rows.flatten()),
        backend="torch",
    )
    is_response = torch.ones(len(old), dtype=torch.bool)
    last = torch.arange(len(old)) // LENGTH * LENGTH + LENGTH - 1
    advantages = discounted_sums(teacher.flatten() - old, 1.0, is_response, last)
    weight = policy.logits.t().contiguous().requires_grad_()
    loss = linear_policy_loss(
        torch.eye(len(policy.logits), dtype=torch.float64)[rows.flatten()],
        weight,
        sampled.flatten(),
        None,
        None,
        advantages,
        probability.detach().repeat_interleave(LENGTH),
        temperature=TEMPERATURE,
        sampling_mask=policy.mask(rows.flatten()),
        kl_beta=0.0,
        denominator=1.0,
        backend="torch",
    )
    loss.loss.backward()
    torch.testing.assert_close(weight.grad.t(), leaf.grad, atol=EXACT, rtol=0)
