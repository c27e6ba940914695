"""Updates on whole trees as a naive fp64 loop over transformers: `tree_oracle.py ORACLE NAME`.

Every sampled turn is computed once, after all that precedes it in its own branch; a tree is one
response of all its sampled tokens. One token at a time from the formulae, torch's Adam. Writes
ORACLE/NAME/trees.pt: metrics of each update, and the weights after all of them.
"""

import sys
from pathlib import Path

import torch
from oracle import checkpoint_names
from transformers import AutoModelForCausalLM
from tree_episodes import (
    BETAS,
    CLIP_HIGH,
    CLIP_LOW,
    EPSILON,
    KL_BETA,
    LIMIT,
    NORM,
    RATE,
    TEMPERATURE,
    UPDATES,
    episodes,
    path,
)


def turn_logprobs(model, turns):
    """{number of a sampled turn: log-probabilities of its tokens}."""
    found = {}
    for number, turn in enumerate(turns):
        if turn.sampled:
            tokens = [token for n in path(turns, number) for token in turns[n].tokens]
            logits = model(torch.tensor([tokens])).logits[0, :-1] / TEMPERATURE
            every = torch.log_softmax(logits, -1).gather(-1, torch.tensor(tokens)[1:, None])
            found[number] = every[-len(turn.tokens) :, 0]
    return found


def branch_of(turns, number):
    """The first answer to which the path of sampled turn `number` leads and that none follows."""
    followed = {n for last, t in enumerate(turns) if t.sampled for n in path(turns, last)[:-1]}
    ends = [last for last, t in enumerate(turns) if t.sampled and last not in followed]
    return next(last for last in ends if number in path(turns, last))


def tree_loss(turns, advantage, new, old, ref, level):
    """The sum of the tokens' losses, and their number."""
    total, count = 0.0, 0
    branches = {}
    for number in new:
        branches.setdefault(branch_of(turns, number), []).append(number)
    for own in branches.values():
        gaps = torch.cat([new[n] - old[n] for n in own])
        ratios = gaps.exp() if level == "token" else gaps.mean().exp().expand(len(gaps))
        back = torch.cat([ref[n] - new[n] for n in own])
        for ratio, g in zip(ratios, back, strict=True):
            held = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
            surrogate = torch.minimum(ratio * advantage, held * advantage)
            total = total - surrogate + KL_BETA * (g.exp() - g - 1)
            count += 1
    return total, count


def main(folder: Path) -> None:
    # The default products of experts know no fp64.
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )
    model = model.double().eval()
    parameters = list(model.parameters())
    adam = torch.optim.AdamW(parameters, RATE, BETAS, EPSILON, weight_decay=0.0)
    trees = [episodes(seed) for seed in range(len(UPDATES))]
    with torch.no_grad():
        ref = [[turn_logprobs(model, turns) for turns, _ in batch] for batch in trees]
    metrics = []
    for update, (average, level) in enumerate(UPDATES):
        if update % 2 == 0:  # a new rollout
            with torch.no_grad():
                old = {
                    u: [turn_logprobs(model, turns) for turns, _ in trees[u]]
                    for u in (update, update + 1)
                }
        model.zero_grad()
        sums = []
        for (turns, advantage), before, reference in zip(
            trees[update], old[update], ref[update], strict=True
        ):
            new = turn_logprobs(model, turns)
            sums.append(tree_loss(turns, advantage, new, before, reference, level))
        num_tokens = sum(count for _, count in sums)
        loss = {
            "sequence": lambda s: sum(total / count for total, count in s) / len(s),
            "token": lambda s: sum(total for total, _ in s) / sum(count for _, count in s),
            "constant": lambda s: sum(total for total, _ in s) / LIMIT / len(s),
        }[average](sums)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, NORM)
        adam.step()
        metrics.append({"loss": loss.item(), "grad_norm": norm.item(), "num_tokens": num_tokens})
    weights = dict(checkpoint_names(model.state_dict()))
    torch.save({"metrics": metrics, "weights": weights}, folder / "trees.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]) / sys.argv[2])
