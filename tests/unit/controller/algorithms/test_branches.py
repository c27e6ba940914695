"""Every algorithm on episodes of several turns and branches: loss and gradient are those of one
unbranched response that has the sampled tokens alone."""

import math
import random

import algorithm_formulae as formulae
import pytest
import torch
from algorithm_problem import (
    HIDDEN,
    REWARDS,
    VOCABULARY,
    Problem,
    check,
    plain,
    weighted_by_the_ratio,
    with_kl,
)

from megatron_r1.trainer.sequence_packing import pack_batch
from megatron_r1.trainer.token_split import TokenSplit
from megatron_r1.trainer.training_sample import Sample

# The weights of an average per response are fp32.
NEAR = {"rtol": 1e-6, "atol": 1e-9}
SEEDS = (1, pytest.param(2, marks=pytest.mark.slow))


class Episodes(Problem):
    """As `Problem`, but every response consists of up to `most` branches, whose sampled turns have
    given tokens between and behind them."""

    def __init__(self, seed, most):
        g, draw = torch.Generator().manual_seed(seed), random.Random(seed)
        self.weight = torch.randn(VOCABULARY, HIDDEN, generator=g, dtype=torch.float64)
        self.weight.requires_grad_()
        self.rewards = [reward for group in REWARDS for reward in group]
        self.branches = [[branch(draw) for _ in range(draw.randint(1, most))] for _ in self.rewards]
        order = list(range(16))
        draw.shuffle(order)
        self.minibatches = [order[:8], order[8:]]
        self.hidden, self.first, self.responses = [], [], []
        for i, reward in enumerate(self.rewards):
            own = [torch.randn(len(t), HIDDEN, generator=g).double() for t, _ in self.branches[i]]
            self.first.append(len(self.hidden))
            self.hidden += [h.requires_grad_() for h in own]
            new = self.logprobs(i, own)
            old = new.detach()
            if i in self.minibatches[1]:
                moved = [h + 0.2 * torch.randn(h.shape, generator=g) for h in own]
                old = self.logprobs(i, moved).detach()
            noise = torch.randn(3, len(new), generator=g, dtype=torch.float64)
            ref, teacher = old + 0.5 * noise[:2]
            self.responses.append(
                formulae.Response(i // 4, reward, new, old, ref, teacher, noise[2])
            )

    def logprobs(self, i, hidden):
        """Of the sampled tokens of all branches, one after the other."""
        made = []
        for (tokens, mask), states in zip(self.branches[i], hidden, strict=True):
            logits = states[:-1] @ self.weight.t() / 0.7
            every = torch.log_softmax(logits, -1).gather(-1, torch.tensor(tokens)[1:, None])[:, 0]
            made.append(every[torch.tensor(mask[1:])])
        return torch.cat(made)

    def lengths(self, i):
        return [sum(mask) for _, mask in self.branches[i]]

    def batch(self, members, numbers, first_old):
        made, hidden = [], []
        for i in members:
            lengths = self.lengths(i)
            for number, (tokens, mask) in enumerate(self.branches[i]):
                sample = Sample.pack_branch(
                    tokens,
                    bytes(mask),
                    [0.0] * len(tokens),
                    numbers[i],
                    weight=lengths[number] / sum(lengths),
                    num_responses=int(number == 0),
                )
                made.append(sample)
                hidden.append(self.hidden[self.first[i] + number][: len(sample)])
        batch = pack_batch(made, TokenSplit(tensor_size=4), torch.device("cpu"))
        trained = [i for i in members if not math.isnan(numbers[i])]
        num_tokens = batch.input_ids.shape[1]
        filler = num_tokens - sum(map(len, hidden))
        hidden = torch.cat([*hidden, torch.full((filler, HIDDEN), 7.0, dtype=torch.float64)])

        def spread(name, outside=0.0):
            whole = torch.full((num_tokens,), outside, dtype=torch.float64)
            whole[batch.is_response] = torch.cat(
                [getattr(self.responses[i], name) for i in trained]
            )
            return whole

        exact = torch.cat([torch.full_like(self.responses[i].old, numbers[i]) for i in trained])
        batch.outcome_advantages = batch.outcome_advantages.double()
        batch.outcome_advantages[batch.is_response] = exact
        batch.logprobs |= {"ref": spread("ref"), "teacher": spread("teacher")}
        batch.values = spread("values", outside=7.0)
        if first_old or members[0] in self.minibatches[1]:
            batch.logprobs["old"] = spread("old")
        return batch, hidden


def branch(draw):
    """Tokens and, for each, whether it was sampled: a prompt, then turns with given tokens between
    them; the last turn may be followed by given tokens."""
    mask = [False] * draw.randint(1, 4)
    for _ in range(draw.randint(1, 3)):
        mask += [True] * draw.randint(1, 5) + [False] * draw.randint(0, 3)
    return [draw.randrange(VOCABULARY) for _ in mask], mask


@pytest.mark.parametrize("seed", SEEDS)
def test_branches_weigh_as_one_response(seed):
    def same(*arguments):
        check(*arguments, problem=Episodes(seed, 3), near=NEAR)

    same("grpo", {"kl_beta": 0.1}, formulae.group_relative, with_kl(10, 10, 0.1), "sequence")
    same("dapo", {}, formulae.group_relative, plain(0.2, 0.28), "token", (0.2, 0.28))
    by_mean = {"make_advantages": lambda r: formulae.group_relative(r, by_std=False)}
    same("dr_grpo", {}, by_mean["make_advantages"], plain(0.2, 0.2), "constant", (0.2, 0.2))
    same("reinforce", {}, formulae.less_the_rollouts_mean, weighted_by_the_ratio, "constant")


@pytest.mark.parametrize("seed", SEEDS)
def test_the_reward_of_an_episode_reaches_all_its_branches(seed):
    """Without discount and penalty, where returns do not depend on the way to the end."""

    def same(name, settings, *arguments):
        settings = {"kl_beta": 0.0, **settings}
        check(name, settings, *arguments, problem=Episodes(seed, 3), near=NEAR)

    same(
        *("rloo", {}, lambda r: formulae.leave_one_out_and_kl(r, 0.0)),
        *(weighted_by_the_ratio, "constant"),
    )
    same(
        *("reinforce_pp", {}, lambda r: formulae.reinforce_pp(r, 0.0)),
        *(plain(0.2, 0.2), "token", (0.2, 0.2)),
    )

    def advantages(responses):
        made, _ = formulae.gae(responses, 0.0, 1.0, 1.0)
        return formulae.normalized_over_tokens(responses, made)

    same("ppo", {}, advantages, plain(0.2, 0.2), "sequence", (0.2, 0.2))


@pytest.mark.parametrize("seed", SEEDS)
def test_returns_pass_over_given_tokens(seed):
    def same(*arguments):
        check(*arguments, problem=Episodes(seed, 1), near=NEAR)

    same(
        *("rloo", {"kl_beta": 0.1}, lambda r: formulae.leave_one_out_and_kl(r, 0.1)),
        *(weighted_by_the_ratio, "constant"),
    )
    same(
        *("reinforce_pp", {"discount": 0.9}, lambda r: formulae.reinforce_pp(r, 0.01, 0.9)),
        *(plain(0.2, 0.2), "token", (0.2, 0.2)),
    )
    same(
        *("on_policy_distillation", {"discount": 0.5}, lambda r: formulae.distillation(r, 0.5)),
        *(weighted_by_the_ratio, "token"),
    )

    def advantages(responses):
        made, _ = formulae.gae(responses, 0.1, 0.95, 0.9)
        return formulae.normalized_over_tokens(responses, made)

    settings = {"kl_beta": 0.1, "gae_lambda": 0.9, "discount": 0.95}
    same("ppo", settings, advantages, plain(0.2, 0.2), "sequence", (0.2, 0.2))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sequence_ratio_is_that_of_a_branch_s_sampled_tokens(seed):
    problem = Episodes(seed, 3)
    lengths = {id(o): problem.lengths(i) for i, o in enumerate(problem.responses)}

    def term(o, a):
        gaps = (o.new - o.old).split(lengths[id(o)])
        ratio = torch.cat([gap.mean().exp().expand(len(gap)) for gap in gaps])
        return formulae.clipped(o, a, 3e-4, 4e-4, ratio)

    arguments = formulae.group_relative, term, "sequence", (3e-4, 4e-4)
    check("gspo", {}, *arguments, problem=problem, near=NEAR)
