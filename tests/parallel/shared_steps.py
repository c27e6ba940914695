"""Updates with prompts computed once, and again with each sample's own, on these ranks:
`shared_steps.py ORACLE GRID NAME…`. Prints the largest differences of each model; fails on one that
is too large."""

import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from trainer_steps import SETTINGS, TEMPERATURE, config

from megatron_r1.controller.trainer_calls.packing import pack_by_prompt
from megatron_r1.models import platform
from megatron_r1.trainer import distributed
from megatron_r1.trainer.training_sample import Sample

LOSS = "megatron_r1.controller.algorithms.grpo:loss"
# fp32 sums in another order, through two updates with a large learning rate.
TOLERANCE = 2e-4


def samples() -> list[Sample]:
    """Three prompts with five responses each, one of its own, and two episodes, in random order.

    An episode has two branches, of which the second goes on after a turn of the first."""
    draw = random.Random(4)
    made = []
    for prompt, count in ((20, 5), (2, 5), (11, 5), (7, 1)):
        tokens = [draw.randrange(67) for _ in range(prompt)]
        for _ in range(count):
            response = [draw.randrange(67) for _ in range(draw.randrange(1, 20))]
            logprobs = [-draw.uniform(3, 6) for _ in response]
            made.append(Sample.pack(tokens, response, logprobs, draw.uniform(-2, 2)))

    def tokens(count: int) -> list[int]:
        return [draw.randrange(67) for _ in range(count)]

    prompt = tokens(20)
    for _ in range(2):
        turn = tokens(8)
        for known in (0, 8):
            given, answer = tokens(3), tokens(6)
            whole = [*prompt, *turn, *given, *answer]
            mask = bytes(20 + known) + bytes([1]) * (8 - known) + bytes(3) + bytes([1]) * 6
            logprobs = [-draw.uniform(3, 6) for _ in whole]
            sampled = 6 + 8 - known
            share = {"weight": sampled / 20, "num_responses": int(not known)}
            made.append(Sample.pack_branch(whole, mask, logprobs, draw.uniform(-2, 2), **share))
    draw.shuffle(made)
    return made


def play(settings, grid_position, shares: bool):
    from megatron_r1.trainer.trainer import Trainer

    parallel = settings.parallel.model_copy(update={"share_prompts": shares})
    trainer = Trainer(settings.model_copy(update={"parallel": parallel}), grid_position)
    trainer.refresh_reference()
    made = samples()
    plan = pack_by_prompt(made, grid_position.data_parallel_size, 80, float).shares[
        grid_position.data_rank
    ]
    loaded = trainer.load([[[made[i] for i in members] for members in plan]] * 2)
    assert not shares or not grid_position.is_last_stage or loaded["packing/shared"] > 0.3
    trainer.compute_logprobs(TEMPERATURE, with_reference=True)
    updates = [trainer.update(i, LOSS, SETTINGS, 0.1, TEMPERATURE) for i in (0, 1)]
    return updates, torch.cat(
        [p.detach().flatten() for c in trainer.model_chunks for p in c.parameters()]
    )


def main() -> None:
    oracle, grid, *names = sys.argv[1:]
    for name in names:
        settings = config(str(Path(oracle) / name), grid)
        grid_position = distributed.initialize(settings.parallel, seed=0)
        from megatron.core import parallel_state

        (own, weights), (shared, same) = (play(settings, grid_position, s) for s in (False, True))
        gaps = [abs(a[key] - b[key]) for a, b in zip(own, shared, strict=True) for key in a]
        gaps.append((weights - same).abs().max().item())
        worst = torch.tensor(max(gaps), device=platform.device())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            print(f"{name} {grid}: {worst.item():.1e}", flush=True)
        assert worst <= TOLERANCE, f"{name} at {grid}: {worst.item():.1e}"
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
