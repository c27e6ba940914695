"""Every algorithm as its source writes it, on sequences that are not packed, in fp64 PyTorch.

Losses are loops over responses and tokens; autograd makes the gradients. megatron_r1 is not used.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class Response:
    """One response: its group, its reward, and log-probabilities per response token.

    reward: None where nobody could grade it; new (differentiable), old, ref, teacher:
    log-probabilities; values: the critic's; engine: what the engine that sampled it says, in tests
    of masks."""

    group: int
    reward: float | None
    new: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    teacher: torch.Tensor
    values: torch.Tensor
    engine: torch.Tensor | None = None

    def __len__(self):
        return len(self.new)


def rewards_of(responses, group=None):
    chosen = [o for o in responses if group is None or o.group == group]
    return torch.tensor([o.reward for o in chosen if o.reward is not None], dtype=torch.float64)


def same_for_all_tokens(responses, advantage):
    return [
        torch.zeros(len(o)).double()
        if o.reward is None
        else torch.full((len(o),), advantage(o), dtype=torch.float64)
        for o in responses
    ]


def group_relative(responses, by_std=True, eps=1e-6):
    def advantage(o):
        r = rewards_of(responses, o.group)
        # A reward apart from the mean by rounding only is no difference.
        if r.max() == r.min():
            return 0.0
        return float((o.reward - r.mean()) / (r.std(correction=0) + eps if by_std else 1.0))

    return same_for_all_tokens(responses, advantage)


def over_rollout(responses, advantages, eps=1e-6):
    """Divided by the standard deviation over responses."""
    firsts = [a[0] for o, a in zip(responses, advantages, strict=True) if o.reward is not None]
    std = torch.stack(firsts).std(correction=0)
    return [a / (std + eps) for a in advantages]


def less_the_rollouts_mean(responses):
    mean = rewards_of(responses).mean()
    return same_for_all_tokens(responses, lambda o: float(o.reward - mean))


def penalized(o, beta):
    """Each token's reward: the KL penalty, and the response's reward with the last."""
    r = [-beta * (o.old[t] - o.ref[t]) for t in range(len(o))]
    r[-1] = r[-1] + o.reward
    return r


def to_go(rewards, discount):
    """Σ_{s≥t} discount^(s-t) r_s, by the double loop."""
    n = len(rewards)
    return torch.stack(
        [sum(discount ** (s - t) * rewards[s] for s in range(t, n)) for t in range(n)]
    )


def leave_one_out_and_kl(responses, beta):
    """The reward of RLOO is r - β Σ_t k1, the baseline that of the others' r; a token has no part
    in the penalties before it."""
    made = []
    for o in responses:
        if o.reward is None:
            made.append(torch.zeros(len(o)).double())
            continue
        others = [
            p for p in responses if p.group == o.group and p is not o and p.reward is not None
        ]
        mean = sum(p.reward for p in others) / len(others) if others else o.reward
        penalties = [-beta * (o.old[t] - o.ref[t]) for t in range(len(o))]
        made.append(o.reward - mean + to_go(penalties, 1.0))
    return made


def normalized_over_tokens(responses, advantages, eps=1e-6):
    known = [a for o, a in zip(responses, advantages, strict=True) if o.reward is not None]
    every = torch.cat(known)
    mean, std = every.mean(), every.std(correction=0)
    return [
        torch.zeros(len(o)).double() if o.reward is None else (a - mean) / (std + eps)
        for o, a in zip(responses, advantages, strict=True)
    ]


def reinforce_pp(responses, beta, discount=1.0):
    made = [
        torch.zeros(len(o)).double() if o.reward is None else to_go(penalized(o, beta), discount)
        for o in responses
    ]
    return normalized_over_tokens(responses, made)


def gae(responses, beta, discount, lam):
    """Advantages and returns; without a grade 0 and the values themselves."""
    advantages, returns = [], []
    for o in responses:
        if o.reward is None:
            advantages.append(torch.zeros(len(o)).double())
        else:
            r, v = penalized(o, beta), [*o.values, 0.0]
            deltas = [r[t] + discount * v[t + 1] - v[t] for t in range(len(o))]
            advantages.append(to_go(deltas, discount * lam))
        returns.append(advantages[-1] + o.values)
    return advantages, returns


def distillation(responses, discount):
    return [to_go(list(o.teacher - o.old), discount) for o in responses]


def clipped(o, a, low, high, ratio=None):
    """min(ρ A, clip(ρ) A) of each token."""
    ratio = (o.new - o.old).exp() if ratio is None else ratio
    return torch.min(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def sequence_ratio(o):
    return (o.new.sum() - o.old.sum()).div(len(o)).exp()


def k3(o):
    gap = o.ref - o.new
    return gap.exp() - gap - 1


def loss(responses, advantages, term, average, limit):
    """-J: `term(response, its advantages)` of each token, averaged."""
    terms = [term(o, a) for o, a in zip(responses, advantages, strict=True)]
    if average == "sequence":
        return -sum(t.mean() for t in terms) / len(terms)
    total = sum(t.sum() for t in terms)
    return -total / (sum(map(len, responses)) if average == "token" else len(responses) * limit)


def is_clipped_on_both_sides(responses, advantages, low, high):
    held = [False, False]
    for o, a in zip(responses, advantages, strict=True):
        ratio = (o.new - o.old).exp()
        held[0] |= bool(((ratio < 1 - low) & (a < 0)).any())
        held[1] |= bool(((ratio > 1 + high) & (a > 0)).any())
    return all(held)


def naive_sums(values, discount):
    """x_t = values_t + discount x_{t+1}, one after the other."""
    out, running = [0.0] * len(values), 0.0
    for t in reversed(range(len(values))):
        running = values[t] + discount * running
        out[t] = running
    assert all(map(math.isfinite, out))
    return out
