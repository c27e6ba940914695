"""Responses with rewards, and a check of an algorithm on them against its formula."""

import math
import random

import algorithm_formulae as formulae
import torch

from megatron_r1.base.user_code import find_function
from megatron_r1.config import Config
from megatron_r1.controller import algorithms
from megatron_r1.controller.corrections import MASK_FUNCTIONS, wrap_loss
from megatron_r1.trainer.loss_head import LossHead
from megatron_r1.trainer.rollout_batches import RolloutBatches
from megatron_r1.trainer.sequence_packing import pack_batch
from megatron_r1.trainer.token_split import TokenSplit
from megatron_r1.trainer.training_sample import Sample

HIDDEN, VOCABULARY, TEMPERATURE, LIMIT = 5, 11, 0.7, 12
REWARDS = [
    [1.0, 0.0, None, 0.3],
    [0.7, 0.7, 0.7, 0.7],
    [None, None, None, 0.4],
    [1.1, None, 0.1, 0.1],
]
EXACT = {"rtol": 1e-9, "atol": 1e-12}


class Problem:
    """16 responses of 4 questions, in two mini-batches of two micro-batches. The policy has moved
    between them: in the second, the old log-probabilities are not the present ones."""

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        draw = random.Random(seed)
        self.weight = torch.randn(VOCABULARY, HIDDEN, generator=g, dtype=torch.float64)
        self.weight.requires_grad_()
        self.rewards = [reward for group in REWARDS for reward in group]
        self.texts = []
        for _ in self.rewards:
            tokens = [draw.randrange(VOCABULARY) for _ in range(draw.randint(2, 13))]
            split = draw.randint(1, min(4, len(tokens) - 1))
            self.texts.append((tokens[:split], tokens[split:]))
        order = list(range(16))
        draw.shuffle(order)
        self.minibatches = [order[:8], order[8:]]

        def states(spread=1.0):
            return [
                spread * torch.randn(len(p) + len(r), HIDDEN, generator=g, dtype=torch.float64)
                for p, r in self.texts
            ]

        self.hidden = [h.requires_grad_() for h in states()]
        moved = states(0.1)
        self.responses = []
        for i, reward in enumerate(self.rewards):
            new = self.logprobs(i, self.hidden[i])
            old = new.detach()
            if i in self.minibatches[1]:
                old = self.logprobs(i, self.hidden[i] + moved[i]).detach()
            ref, teacher = (
                old + 0.5 * torch.randn(len(new), generator=g, dtype=torch.float64)
                for _ in range(2)
            )
            values = torch.randn(len(new), generator=g, dtype=torch.float64)
            self.responses.append(formulae.Response(i // 4, reward, new, old, ref, teacher, values))

    def logprobs(self, i, hidden):
        prompt, response = self.texts[i]
        rows = hidden[len(prompt) - 1 : len(prompt) + len(response) - 1]
        logits = rows @ self.weight.t() / TEMPERATURE
        return torch.log_softmax(logits, -1).gather(-1, torch.tensor(response)[:, None])[:, 0]

    def batch(self, members, numbers, first_old):
        """A packed micro-batch of `members`, and its hidden states."""
        made = [
            Sample.pack(*self.texts[i], [0.0] * len(self.texts[i][1]), numbers[i]) for i in members
        ]
        batch = pack_batch(made, TokenSplit(tensor_size=4), torch.device("cpu"))
        hidden = [self.hidden[i] for i in members]
        filler = batch.input_ids.shape[1] - sum(map(len, hidden))
        padding = torch.full((filler, HIDDEN), 7.0, dtype=torch.float64)

        def spread(tensors):
            whole = torch.zeros(batch.input_ids.shape[1], dtype=torch.float64)
            whole[batch.is_response] = torch.cat(tensors)
            return whole

        trained = [i for i in members if not math.isnan(numbers[i])]
        own = [self.responses[i] for i in trained]
        batch.outcome_advantages = batch.advantages = spread(
            [
                torch.full((len(o),), numbers[i], dtype=torch.float64)
                for i, o in zip(trained, own, strict=True)
            ]
        )
        batch.logprobs["ref"] = spread([o.ref for o in own])
        batch.logprobs["teacher"] = spread([o.teacher for o in own])
        # Whatever a critic says outside of responses must not be asked.
        batch.values = spread([o.values for o in own]).where(batch.is_response, 7.0)
        if first_old or members[0] in self.minibatches[1]:
            batch.logprobs["old"] = spread([o.old for o in own])
        return batch, torch.cat([*hidden, padding])

    def gradients(self):
        found = [torch.zeros_like(h) if h.grad is None else h.grad for h in self.hidden]
        found.append(self.weight.grad)
        for tensor in (*self.hidden, self.weight):
            tensor.grad = None
        return torch.cat([g.flatten() for g in found])


def unchanged(given):
    return given


def ours(problem, name, settings, form=unchanged, corrected=unchanged, metrics=None):
    """The loss, gradients, metrics and batches of each mini-batch.

    They are as controller and trainer make them. form: makes what the trainer's functions get of
    their settings. corrected: what a correction makes of the algorithm's advantages. metrics: gets
    those of a mask."""
    rl = {"group_size": 4, "prompts_per_rollout": 4, "minibatches": 2, **settings}
    config = Config(rl={"algorithm": name, **rl}, rollout={"max_response_tokens": LIMIT})
    algorithm = algorithms.find_algorithm(name)
    by_group = corrected(algorithm.outcome_advantages(REWARDS, config.rl))
    numbers = [number for group in by_group for number in group]
    mask = MASK_FUNCTIONS.get(config.rl.engine_mask)
    first_old = algorithm.token_advantages is not None or mask is not None
    steps = [
        [problem.batch(members[a : a + 4], numbers, first_old) for a in (0, 4)]
        for members in problem.minibatches
    ]
    every = [batch for step in steps for batch, _ in step]
    if algorithm.token_advantages is not None:
        function = find_function(algorithm.token_advantages)
        rollout = RolloutBatches(every)
        rollout.store_targets(function(rollout, form(config.rl.token_advantage_settings)))
    if mask is not None:
        rollout = RolloutBatches(every)
        masked = rollout.mask_advantages(
            find_function(mask)(rollout, config.rl.engine_mask_settings)
        )
        (metrics if metrics is not None else {}).update(masked)
    loss, settings = wrap_loss(algorithm.loss, config.rl.loss_settings(LIMIT))
    settings = form(settings)
    for step in steps:
        terms = []
        for batch, hidden in step:
            head = LossHead(batch, hidden, problem.weight, TEMPERATURE, None, VOCABULARY)
            terms.append(find_function(loss)(batch, head, settings))
        total = sum(t.loss for t in terms) / sum(t.denominator for t in terms)
        total.backward()
        yield total.detach(), problem.gradients(), terms, [batch for batch, _ in step]


def check(
    name,
    settings,
    make_advantages,
    term,
    average,
    clips=None,
    problem=None,
    near=EXACT,
    corrected=unchanged,
    left_out=(),
):
    """left_out: responses, by number, that no sum and no denominator has."""
    problem = problem or Problem()
    advantages = make_advantages(problem.responses)
    made = ours(problem, name, settings, corrected=corrected)
    for step, (loss, gradient, terms, _) in enumerate(made):
        members = [i for i in problem.minibatches[step] if i not in left_out]
        if not algorithms.find_algorithm(
            name
        ).rules.teacher:  # else ungraded responses are left out
            members = [i for i in members if problem.rewards[i] is not None]
        responses = [problem.responses[i] for i in members]
        own = [advantages[i].detach() for i in members]
        expected = formulae.loss(responses, own, term, average, LIMIT)
        expected.backward(retain_graph=True)
        wanted = problem.gradients()
        assert wanted.abs().max() > 1e-4, "a problem that teaches nothing"
        torch.testing.assert_close(gradient, wanted, **near)
        torch.testing.assert_close(loss, expected.detach(), **near)
        clipped = sum(t.metrics["clip_fraction"].total for t in terms).item()
        if clips and step == 1:
            assert formulae.is_clipped_on_both_sides(responses, own, *clips) and clipped > 0
        elif not clips:
            assert clipped == 0


def plain(low, high):
    return lambda o, a: formulae.clipped(o, a, low, high)


def with_kl(low, high, beta):
    return lambda o, a: formulae.clipped(o, a, low, high) - beta * formulae.k3(o)


def weighted_by_the_ratio(o, a):
    return (o.new - o.old).exp() * a
