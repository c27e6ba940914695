"""Run by every rank: every kernel on shards of the vocabulary against fp64 on the whole of it."""

import formulae
import torch
import torch.distributed as dist
from policy_loss_cases import SETTINGS, drawn_sets, expected, listed, whole_problem
from r1_kernels import linear_policy_loss, linear_token_logprobs, token_logprobs, vocabulary

VOCABULARY = 26  # of 28 columns: on four ranks of 7, the last one's last two are padding
COLUMNS = 28
TEMPERATURE = 0.8
FP32 = {"atol": 1e-5, "rtol": 1e-5}


def check() -> None:
    """Check on all ranks of the default group."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(range(ranks))
    mine = slice(COLUMNS // ranks * rank, COLUMNS // ranks * (rank + 1))
    for backend in ("torch", "triton"):
        options = {"group": group, "vocab_size": VOCABULARY, "backend": backend}
        results = [*logits_in(mine, options)]
        results += kept_logits_in(mine, options)
        for reduce_hidden_grad in (True, False):
            results += logprobs_of_a_head(mine, options, reduce_hidden_grad)
        for level in ("token", "sequence"):
            for name in ("dual clip", "k3", "entropy", "importance"):
                results += policy_loss_of_a_head(mine, options, name, level)
                if name == "entropy":
                    results += policy_loss_of_a_head(mine, options, name, level, cut=True)
        same_bits_on_every_rank(results)
    targets_beyond_the_vocabulary_are_refused(group, ranks)
    a_rank_with_padding_only(group)
    a_rank_with_banned_tokens_only(group)
    unequal_shards_are_refused(group)
    equal_shards_are_asked_about_once(group)


def shard(tensor, mine):
    """The rank's rows of (V, …), padding rows made of numbers that would show."""
    padding = torch.full((COLUMNS - VOCABULARY, *tensor.shape[1:]), torch.nan)
    return torch.cat([tensor.float(), padding])[mine]


def real(mine):
    """The rank's part of the vocabulary, without padding."""
    return slice(min(mine.start, VOCABULARY), min(mine.stop, VOCABULARY))


def logits_in(mine, options):
    g = torch.Generator().manual_seed(3)
    z = 3 * torch.randn(9, VOCABULARY, generator=g, dtype=torch.float64)
    y = torch.randint(VOCABULARY, (9,), generator=g)
    z[2, : VOCABULARY // 2] = -torch.inf  # whole shards without any probability
    y[2] = VOCABULARY - 1
    z.requires_grad_()
    want = formulae.logprobs_and_entropy(z, y, TEMPERATURE)
    local = shard(z.detach().t(), mine).t().requires_grad_()
    got = token_logprobs(local, y, temperature=TEMPERATURE, **options)
    torch.testing.assert_close(got[0].double(), want[0], **FP32)
    rows = torch.arange(9) != 2  # fp64's own 0 · -inf: NaN
    torch.testing.assert_close(got[1][rows].double(), want[1][rows], **FP32)
    (want[0] + torch.where(rows, want[1], 0)).sum().backward()
    (got[0] + torch.where(rows, got[1], 0)).sum().backward()
    whole = torch.where(rows[:, None], z.grad, 0.0)[:, real(mine)]
    grad = torch.where(rows[:, None], local.grad, 0.0)
    torch.testing.assert_close(grad[:, : whole.shape[1]].double(), whole, **FP32)
    assert grad[:, whole.shape[1] :].abs().sum() == 0
    return got


def kept_logits_in(mine, options):
    """Sets spread over the shards, and sets that whole shards have no part of."""
    g = torch.Generator().manual_seed(4)
    z = 3 * torch.randn(9, VOCABULARY, generator=g, dtype=torch.float64)
    y = torch.randint(VOCABULARY, (9,), generator=g)
    kept = torch.rand(9, VOCABULARY, generator=g) < 0.4
    kept[:3], y[1:3] = False, torch.tensor([0, VOCABULARY - 1])
    kept[1, :3], kept[2, -3:] = True, True
    kept.scatter_(1, y[:, None], True)
    z.requires_grad_()
    want = formulae.cut_logprobs_and_entropy(z, y, kept, TEMPERATURE)
    (want[0] + 0.5 * want[1]).sum().backward()
    local = shard(z.detach().t(), mine).t().requires_grad_()
    got = token_logprobs(local, y, temperature=TEMPERATURE, sampling_mask=listed(kept), **options)
    (got[0] + 0.5 * got[1]).sum().backward()
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs.detach(), **FP32)
    whole = z.grad[:, real(mine)]
    torch.testing.assert_close(local.grad[:, : whole.shape[1]].double(), whole, **FP32)
    assert local.grad[:, whole.shape[1] :].abs().sum() == 0
    return got


def logprobs_of_a_head(mine, options, reduce_hidden_grad):
    h, w, y = formulae.problem(tokens=11, vocab=VOCABULARY)
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    want = formulae.logprobs_and_entropy(a @ b.t(), y, TEMPERATURE)
    (want[0] + 0.5 * want[1]).sum().backward()
    c, d = h.float().requires_grad_(), shard(w, mine).requires_grad_()
    # As Megatron calls it.
    total = None if reduce_hidden_grad else torch.zeros(d.shape)
    got = linear_token_logprobs(
        c,
        d,
        y,
        temperature=TEMPERATURE,
        chunk_tokens=4,
        reduce_hidden_grad=reduce_hidden_grad,
        main_grad=total,
        **options,
    )
    (got[0] + 0.5 * got[1]).sum().backward()
    if not reduce_hidden_grad:
        dist.all_reduce(c.grad, group=options["group"])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs.detach(), **FP32)
    torch.testing.assert_close(c.grad.double(), a.grad, atol=1e-4, rtol=1e-4)
    check_weight_gradient(d.grad if total is None else total, b.grad, mine)
    return *got, c.grad


def policy_loss_of_a_head(mine, options, name, level, cut=False):
    settings = {"kl_beta": 0.0, **SETTINGS[name]}
    h, w, y, p = whole_problem(tokens=21, vocab=VOCABULARY, temperature=TEMPERATURE)
    kept = drawn_sets(21, VOCABULARY, y) if cut else None
    loss, *_, grad_hidden, grad_weight = expected(
        h, w, y, p, SETTINGS[name], TEMPERATURE, kept=kept, ratio_level=level
    )
    c, d = h.float().requires_grad_(), shard(w, mine).requires_grad_()
    q = {k: v.float() if v.is_floating_point() else v for k, v in p.items()}
    total = torch.zeros(d.shape) if name == "k3" else None
    out = linear_policy_loss(
        c,
        d,
        y,
        q["old"],
        q["ref"] if settings["kl_beta"] else None,
        q["advantages"],
        q["mask"],
        temperature=TEMPERATURE,
        rollout_logprobs=q["rollout"] if "importance_cap" in settings else None,
        ratio_level=level,
        cu_seqlens=q["cu_seqlens"],
        chunk_tokens=4,
        main_grad=total,
        sampling_mask=listed(kept) if cut else None,
        **settings,
        **options,
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss.double(), loss, **FP32)
    torch.testing.assert_close(c.grad.double(), grad_hidden, **FP32)
    check_weight_gradient(d.grad if total is None else total, grad_weight, mine)
    return *(t.detach() for t in out), c.grad


def check_weight_gradient(got, whole, mine):
    kept = whole[real(mine)]
    torch.testing.assert_close(got[: len(kept)].double(), kept, atol=1e-4, rtol=1e-4)
    assert got[len(kept) :].abs().sum() == 0


def same_bits_on_every_rank(results):
    flat = torch.cat([r.detach().float().flatten() for r in results])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    assert all(flat.view(torch.int32).equal(other.view(torch.int32)) for other in everyone)


def targets_beyond_the_vocabulary_are_refused(group, ranks):
    beyond = torch.tensor([7 * ranks])
    try:
        token_logprobs(torch.zeros(1, 7), beyond, group=group)
    except ValueError as error:
        assert f"{7 * ranks}," in str(error), error
    else:
        raise AssertionError("a target outside the vocabulary was taken")


def a_rank_with_padding_only(group):
    """A vocabulary of 3 in shards of 3: every rank but the first holds padding."""
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 2])
    want = formulae.logprobs_and_entropy(z.double(), y)
    for backend in ("torch", "triton"):
        local = (z if dist.get_rank() == 0 else torch.full((2, 3), torch.nan)).clone()
        local.requires_grad_()
        got = token_logprobs(local, y, group=group, vocab_size=3, backend=backend)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours.double(), theirs, **FP32)
        got[0].sum().backward()
        assert torch.isfinite(local.grad).all()
        assert dist.get_rank() == 0 or local.grad.abs().sum() == 0


def a_rank_with_banned_tokens_only(group):
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    want = formulae.logprobs_and_entropy(z.double(), torch.tensor([0, 2]))
    for backend in ("torch", "triton"):
        banned = torch.full((2, 3), torch.finfo(torch.float32).min)
        local = z if dist.get_rank() == 0 else banned
        got = token_logprobs(local, torch.tensor([0, 2]), group=group, backend=backend)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours.double(), theirs, **FP32)


def unequal_shards_are_refused(group):
    if dist.get_world_size() == 1:
        return
    columns = 7 if dist.get_rank() == 0 else 6
    try:
        token_logprobs(torch.zeros(1, columns), torch.tensor([0]), group=group, vocab_size=12)
    except ValueError as error:
        assert "columns" in str(error), error
    else:
        raise AssertionError("unequal shards were taken")


def equal_shards_are_asked_about_once(group):
    asked = []
    real = vocabulary.all_gather
    vocabulary.all_gather = lambda *a, **k: asked.append(1) or real(*a, **k)
    try:
        for size in (5 * dist.get_world_size(), 5 * dist.get_world_size() - 1):
            for _ in range(3):
                vocabulary.VocabShard.from_columns(torch.zeros(1), 5, group, size)
    finally:
        vocabulary.all_gather = real
    assert len(asked) == (2 if dist.get_world_size() > 1 else 0), asked
