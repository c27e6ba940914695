"""Settings of the policy loss, problems for it and the loss of whole logits, in fp64."""

import math

import formulae
import torch
from r1_kernels import SamplingMask

SETTINGS = {
    "ppo": {"clip_low": 0.2, "clip_high": 0.2},
    "r1": {"clip_low": 10.0, "clip_high": 10.0, "kl_beta": 0.001},
    "dapo, asymmetric": {"clip_low": 0.2, "clip_high": 0.28},
    "dual clip": {"clip_low": 0.1, "clip_high": 0.1, "dual_clip": 1.3},
    "k1": {"clip_low": 0.2, "clip_high": 0.2, "kl_beta": 0.3, "kl_estimator": "k1"},
    "k2": {"clip_low": 0.2, "clip_high": 0.2, "kl_beta": 0.3, "kl_estimator": "k2"},
    "k3": {"clip_low": 0.2, "clip_high": 0.2, "kl_beta": 0.3, "kl_estimator": "k3"},
    "importance": {"clip_low": 0.2, "clip_high": 0.2, "importance_cap": 1.1},
    "importance, no cap": {"clip_low": 0.2, "clip_high": 0.2, "importance_cap": math.inf},
    "entropy": {"clip_low": 0.2, "clip_high": 0.2, "entropy_coef": 0.07},
    "cispo": {"clip_low": 0.2, "clip_high": 0.3, "kl_beta": 0.3, "objective": "cispo"},
    "cispo, no lower bound": {"clip_low": 10.0, "clip_high": 0.3, "objective": "cispo"},
    "cispo, importance": {
        "clip_low": 0.2,
        "clip_high": 0.3,
        "importance_cap": 1.1,
        "objective": "cispo",
    },
}


def whole_problem(tokens=37, vocab=29, temperature=0.8):
    """A head whose log-probabilities are near old, reference and rollout ones."""
    h, w, y = formulae.problem(tokens, vocab=vocab, spread=0.3)
    p = formulae.policy_problem(tokens)
    new, _ = formulae.logprobs_and_entropy(h @ w.t(), y, temperature)
    for name in ("old", "ref", "rollout"):
        p[name] += new - p["new"]
    return h, w, y, p


def drawn_sets(tokens, vocab, targets, seed=0):
    """(T, V) booleans: of one token only the target, of one everything, of the others a part."""
    g = torch.Generator().manual_seed(seed)
    shares = torch.rand(tokens, 1, generator=g)
    kept = torch.rand(tokens, vocab, generator=g) < shares
    kept[0], kept[-1] = False, True
    return kept.scatter(1, targets.clamp(min=0)[:, None], True)


def listed(kept):
    """The mask of (T, V) booleans."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    return SamplingMask(kept.nonzero()[:, 1].int(), offsets)


def expected(h, w, y, p, settings, temperature=0.8, kept=None, **levels):
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    if kept is None:
        kept = torch.ones(len(h), len(w), dtype=torch.bool)
    new, entropy = formulae.cut_logprobs_and_entropy(a @ b.t(), y, kept, temperature)
    loss = formulae.policy_loss(
        new,
        p["old"],
        p["ref"],
        p["advantages"],
        p["mask"],
        rollout=p["rollout"] if "importance_cap" in settings else None,
        entropy=entropy,
        cu_seqlens=p["cu_seqlens"],
        **settings,
        **levels,
    )
    loss.backward()
    return loss.detach(), new.detach(), entropy.detach(), a.grad, b.grad
