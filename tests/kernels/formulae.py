"""Independent definitions, in ordinary differentiable PyTorch; give them fp64."""

import torch


def near(got, want, *, atol, rtol, **parameters):
    """assert_close in fp64, of results of any dtype; a failure prints the parameters."""
    torch.testing.assert_close(
        got.double(),
        want.double(),
        atol=atol,
        rtol=rtol,
        msg=lambda text: f"{parameters}: {text}",
    )


def problem(tokens=37, hidden=16, vocab=29, spread=1.0, seed=0):
    """Random hidden states, head and targets, fp64."""
    g = torch.Generator().manual_seed(seed)
    h = spread * torch.randn(tokens, hidden, generator=g, dtype=torch.float64)
    w = torch.randn(vocab, hidden, generator=g, dtype=torch.float64)
    return h, w, torch.randint(vocab, (tokens,), generator=g)


def policy_problem(tokens=37, seed=0):
    """Log-probabilities near one another, advantages, float weights with zeros, cu_seqlens.

    Sequences: one of a single token, one empty, one fully hidden, and the rest."""
    g = torch.Generator().manual_seed(seed)
    new = -3 * torch.rand(tokens, generator=g, dtype=torch.float64)
    old, ref, rollout = (
        new + 0.5 * torch.randn(tokens, generator=g, dtype=torch.float64) for _ in range(3)
    )
    advantages = torch.randn(tokens, generator=g, dtype=torch.float64)
    mask = torch.rand(tokens, generator=g, dtype=torch.float64)
    mask[mask < 0.3] = 0.0
    mask[0] = 0.5
    mask[1 : tokens // 3] = 0.0
    cu_seqlens = torch.tensor([0, 1, 1, tokens // 3, tokens // 2, tokens])
    return {
        "new": new,
        "old": old,
        "ref": ref,
        "rollout": rollout,
        "advantages": advantages,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
    }


def logprobs_and_entropy(logits, targets, temperature=1.0):
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def cut_logprobs_and_entropy(logits, targets, kept, temperature=1.0):
    """Of the softmax over the tokens that `kept` (T, V) marks."""
    log_p = torch.log_softmax(torch.where(kept, logits / temperature, -torch.inf), -1)
    of_kept = torch.where(kept, log_p, 0.0)
    entropy = -torch.where(kept, of_kept.exp() * of_kept, 0.0).sum(-1)
    return of_kept.gather(-1, targets[:, None])[:, 0], entropy


def policy_loss(
    new,
    old,
    ref,
    advantages,
    mask,
    *,
    clip_low,
    clip_high,
    dual_clip=None,
    kl_beta=0.0,
    kl_estimator="k3",
    rollout=None,
    importance_cap=None,
    objective="ppo",
    entropy=None,
    entropy_coef=0.0,
    ratio_level="token",
    average="token",
    cu_seqlens=None,
):
    """The loss sequence by sequence, as the papers write it (and TRL's GRPOTrainer computes it):
    autograd through min and clamp."""
    seen = mask > 0
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, len(new)])
    sequences = [
        slice(a, b) for a, b in zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True)
    ]
    averages, weighted, weight = [], 0.0, 0.0
    for tokens in sequences:
        kept = seen[tokens]
        if not kept.any():
            continue
        x = (new - old)[tokens][kept]
        if ratio_level == "sequence":
            x = x.mean().expand(len(x))
        ratio, a = x.exp(), advantages[tokens][kept]
        limited = ratio.clamp(1 - clip_low, 1 + clip_high)
        surrogate = torch.min(ratio * a, limited * a)
        if objective == "cispo":
            surrogate = limited.detach() * a * new[tokens][kept]
        if dual_clip is not None:
            surrogate = torch.where(a < 0, torch.max(surrogate, dual_clip * a), surrogate)
        if rollout is not None:
            trust = (old - rollout)[tokens][kept].exp()
            surrogate = surrogate * trust.clamp(max=importance_cap)
        loss = -surrogate
        if kl_beta:
            g = (ref - new)[tokens][kept]
            kl = {"k1": -g, "k2": g * g / 2, "k3": g.exp() - g - 1}[kl_estimator]
            loss = loss + kl_beta * kl
        if entropy_coef:
            loss = loss - entropy_coef * entropy[tokens][kept]
        w = mask[tokens][kept]
        averages.append((loss * w).sum() / w.sum())
        weighted, weight = weighted + (loss * w).sum(), weight + w.sum()
    if not averages:
        return 0 * new.sum()
    return sum(averages) / len(averages) if average == "sequence" else weighted / weight
