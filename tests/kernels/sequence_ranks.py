"""Run by every rank: policy losses of sequences spread over ranks against the whole of them."""

from itertools import pairwise

import formulae
import torch
import torch.distributed as dist
from r1_kernels import linear_policy_loss, policy_loss

LEVELS = [(ratio, average) for ratio in ("token", "sequence") for average in ("token", "sequence")]
SETTINGS = {"clip_low": 0.2, "clip_high": 0.3, "kl_beta": 0.1, "importance_cap": 1.1}
PER_TOKEN = ("old", "ref", "advantages", "mask", "rollout")


def share(problem, rank, ranks):
    """Every `ranks`-th token of each sequence: which they are, and their borders."""
    borders = problem["cu_seqlens"].tolist()
    held = [range(a + rank, b, ranks) for a, b in pairwise(borders)]
    ends = torch.tensor([0, *map(len, held)]).cumsum(0)
    return torch.tensor([t for tokens in held for t in tokens]), ends


def check() -> None:
    """Check on all ranks of the default group."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(range(ranks))
    problem = formulae.policy_problem()
    mine, ends = share(problem, rank, ranks)
    part = {name: problem[name][mine] for name in PER_TOKEN}
    for backend in ("torch", "triton"):
        for ratio_level, average in LEVELS:
            levels = {"ratio_level": ratio_level, "average": average}
            options = {**SETTINGS, **levels, "denominator": 3.0, "backend": backend}
            local = {**options, "cu_seqlens": ends, "sequence_group": group}
            whole = {**options, "cu_seqlens": problem["cu_seqlens"]}
            from_logprobs(problem, part, mine, whole, local)
            from_a_head(problem, part, mine, whole, local)
    without_a_denominator_it_is_refused(part, ends, group)


def tensors(given):
    given = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    names = ("old", "ref", "advantages", "mask")
    return [given[name] for name in names], {"rollout_logprobs": given["rollout"]}


def from_logprobs(problem, part, mine, whole, local):
    a = problem["new"].float().requires_grad_()
    b = a.detach()[mine].requires_grad_()
    results = []
    for new, given, options in ((a, problem, whole), (b, part, local)):
        positional, named = tensors(given)
        results.append(policy_loss(new, *positional, **named, **options))
        results[-1].loss.backward()
    compare(*results, a.grad[mine], b.grad, mine, local)


def from_a_head(problem, part, mine, whole, local):
    hidden, weight, targets = formulae.problem(len(problem["new"]))
    a = hidden.float().requires_grad_()
    b = a.detach()[mine].requires_grad_()
    results = []
    for states, y, given, options in (
        (a, targets, problem, whole),
        (b, targets[mine], part, local),
    ):
        positional, named = tensors(given)
        head = weight.float().requires_grad_()
        results.append(linear_policy_loss(states, head, y, *positional, **named, **options))
        results[-1].loss.backward()
    compare(*results, a.grad[mine], b.grad, mine, local)


def compare(expected, got, expected_grad, got_grad, mine, local):
    total = got.loss.detach().clone()
    dist.all_reduce(total)
    close = {"atol": 1e-5, "rtol": 1e-5, "msg": lambda text: f"{local}: {text}"}
    torch.testing.assert_close(total, expected.loss.detach(), **close)
    torch.testing.assert_close(got_grad, expected_grad, **close)
    torch.testing.assert_close(got.ratio, expected.ratio[mine], **close)


def without_a_denominator_it_is_refused(part, ends, group):
    if dist.get_world_size() == 1:
        return
    positional, named = tensors(part)
    options = {**named, "importance_cap": 2.0, "cu_seqlens": ends, "sequence_group": group}
    try:
        policy_loss(positional[0], *positional, **options)
    except ValueError as error:
        assert "denominator" in str(error), error
    else:
        raise AssertionError("a mean over tokens of other ranks was taken")
