"""Settings of the policy loss, problems for it and the loss of whole logits, in fp64."""

import math

import formulae
import torch

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
