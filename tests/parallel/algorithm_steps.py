"""Algorithms that give every token its own advantage, and masks of tokens, on these ranks:
`algorithm_steps.py MODEL OUT GRID…`.

Every grid sees the same rollouts, one for each algorithm, spread as the controller spreads them, of
a policy that has moved away from its reference. OUT/GRID.json: of each algorithm every token's
advantage (and return) by sample and position, gathered from all ranks, and the metrics of two
updates; OUT/GRID.safetensors: the weights after all of them."""

import json
import math
import random
import sys
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from trainer_steps import config

from megatron_r1.config import Config
from megatron_r1.controller import algorithms
from megatron_r1.controller.corrections import MASK_FUNCTIONS, wrap_loss
from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.models import weights
from megatron_r1.trainer import distributed
from megatron_r1.trainer.training_sample import Sample


def mask(method: str, low: float, high: float) -> dict[str, float | str]:
    return {"engine_mask": method, "engine_mask_low": low, "engine_mask_high": high}


SETTINGS = {
    "rloo": {"kl_beta": 0.5} | mask("token", 0.6, 2.0),
    "reinforce_pp": {"kl_beta": 0.5, "discount": 0.9} | mask("divergence", 0.01, 0.01),
    "ppo": {"kl_beta": 0.5, "discount": 0.97, "gae_lambda": 0.9},
    "on_policy_distillation": {
        **{"discount": 0.5, "kl_beta": 0.5, "kl_estimator": "unbiased"},
        "loss_average": "sequence",
        **mask("sequence", 0.9, 1.7),
    },
}
TEMPERATURE, RATE, LIMIT = 0.8, 0.05, 40


def samples(seed: int) -> list[Sample]:
    """Twelve, one of them ungraded, with a teacher's log-probabilities. Of the long responses every
    third token was given; two of them are branches of one episode."""
    draw = random.Random(seed)
    made = []
    for i in range(12):
        prompt = [draw.randrange(67) for _ in range(draw.randrange(1, 6))]
        response = [draw.randrange(67) for _ in range(draw.choice((1, 7, 20, LIMIT)))]
        logprobs, teacher = ([-draw.uniform(3, 6) for _ in response] for _ in range(2))
        reward = math.nan if i == 5 else draw.uniform(-1, 1)
        sample = Sample.pack(prompt, response, logprobs, reward, teacher_logprobs=teacher)
        if len(response) >= 20:
            sample = msgspec.structs.replace(
                sample, is_sampled=bytes(t % 3 < 2 for t in range(len(response)))
            )
        made.append(sample)
    several = [i for i, sample in enumerate(made) if sample.is_sampled and i != 5][:2]
    for number, i in enumerate(several):
        made[i] = msgspec.structs.replace(made[i], weight=0.5, num_responses=int(number == 0))
    assert len(several) == 2
    return made


def load(trainer, grid_position, seeds) -> list[list[list[str]]]:
    """Names of the samples of each micro-batch of each update of this rank."""
    steps, names = [], []
    for seed in seeds:
        made = samples(seed)
        plan = pack_samples([len(s) for s in made], grid_position.data_parallel_size, 80).shares[
            grid_position.data_rank
        ]
        steps.append([[made[i] for i in members] for members in plan])
        names.append([[f"{seed}.{i}" for i in members] for members in plan])
    trainer.load(steps)
    return names


def by_position(batch, names: list[str]) -> dict[str, list[float]]:
    """Advantage, and return if any, of the response tokens this rank holds."""
    cu_seqlens, found = batch.cu_seqlens.tolist(), {}
    for name, start, end in zip(names, cu_seqlens, cu_seqlens[1:], strict=False):
        for t in range(start, end):
            if batch.is_response[t]:
                numbers = [batch.advantages, *([] if batch.returns is None else [batch.returns])]
                position = int(batch.position_ids[0, t])
                found[f"{name}:{position}"] = [float(n[t]) for n in numbers]
    return found


def advantages_of(trainer, grid_position, name: str, rl, names):
    """Those of every token, and the metrics of the mask."""
    batches = [batch for step in trainer.rollout.minibatches for batch in step]
    for batch in batches:
        guess = (0.3 * batch.targets + 0.11 * batch.position_ids[0]).sin()
        batch.values = torch.where(batch.is_response, guess, 0.0)
    trainer.compute_token_advantages(
        algorithms.find_algorithm(name).token_advantages, rl.token_advantage_settings
    )
    metrics = {}
    if function := MASK_FUNCTIONS.get(rl.engine_mask):
        metrics = trainer.mask_advantages(function, rl.engine_mask_settings)
    found: dict[str, list[float]] = {}
    if grid_position.is_last_stage:
        for batch, own in zip(batches, [own for step in names for own in step], strict=False):
            found |= by_position(batch, own)
    everybody = [{} for _ in range(grid_position.world_size)]
    dist.all_gather_object(everybody, found)
    return {key: numbers for part in everybody for key, numbers in part.items()}, metrics


def main() -> None:
    model, out, *grids = sys.argv[1:]
    out = Path(out)
    for grid in grids:
        recipe = config(model, grid)
        grid_position = distributed.initialize(recipe.parallel, seed=0)
        from megatron.core import parallel_state

        from megatron_r1.trainer.trainer import Trainer

        trainer, report = Trainer(recipe, grid_position), {}
        trainer.refresh_reference()
        for turn, (name, chosen) in enumerate(SETTINGS.items()):
            rl = Config(rl={"algorithm": name, **chosen}).rl
            names = load(trainer, grid_position, (10 * turn + 1, 10 * turn + 2))
            trainer.compute_logprobs(TEMPERATURE, with_reference=True)
            advantages, masked = advantages_of(trainer, grid_position, name, rl, names)
            loss, settings = wrap_loss(
                algorithms.find_algorithm(name).loss, rl.loss_settings(LIMIT)
            )
            updates = [trainer.update(i, loss, settings, RATE, TEMPERATURE) for i in (0, 1)]
            report[name] = {"advantages": advantages, "updates": [masked, *updates]}
        weights.write_hf(
            trainer.model_chunks,
            trainer.hf_config,
            out / f"{grid}.safetensors",
            dtype=torch.float32,
        )
        first = grid_position.data_rank == grid_position.tensor_rank == 0
        if (
            grid_position.is_last_stage
            and first
            and parallel_state.get_context_parallel_rank() == 0
        ):
            (out / f"{grid}.json").write_text(json.dumps(report))
        dist.barrier()
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
