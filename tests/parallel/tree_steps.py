"""Updates on trees of turns on these ranks: `tree_steps.py MODEL OUT GRID…`.

Every grid gets the branches of the same trees, spread as the controller spreads them; GRID+shared
with `parallel.share_prompts`. Metrics go to OUT/GRID.json, the weights after all updates to
OUT/GRID.safetensors.
"""

import json
import sys
from array import array
from pathlib import Path

import torch
import torch.distributed as dist
from grids import parallel_settings
from tree_episodes import (
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
)

from megatron_r1.agents.token_tree import TokenTree
from megatron_r1.config import Config
from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.controller.rollouts.training_samples import training_samples
from megatron_r1.controller.trainer_calls.packing import pack_by_prompt, pack_samples
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.episodes import Episode
from megatron_r1.engines.server.responses import Response
from megatron_r1.models import weights
from megatron_r1.trainer import distributed, prefix_matching

prefix_matching.MIN_SHARED_TOKENS = 1  # the turns of these trees are short
LOSS = "megatron_r1.controller.algorithms.grpo:loss"


def samples(seed: int):
    """The samples of all branches, made from the episodes as the controller makes them."""
    responses, advantages = [], []
    for turns, advantage in episodes(seed):
        tree, numbers = TokenTree(), []
        for turn in turns:
            parent = None if turn.parent is None else numbers[turn.parent]
            if turn.sampled:
                count = len(turn.tokens)
                floats, versions = array("f", [-4.0] * count), array("i", [0] * count)
                response = Response(array("i", turn.tokens), floats, versions, "stop")
                numbers.append(tree.add_sampled(parent, response, {"role": "assistant"}))
            else:
                numbers.append(tree.add_prompt(parent, turn.tokens, [{"role": str(len(numbers))}]))
        episode = Episode("done", [], tree.branches())
        responses.append(GradedResponse(episode.response(), "", {}, 0.0, "", episode=episode))
        advantages.append(advantage)
    group = Group(make_prompt("?", "math", "2", {}), [1], responses)
    return [branch for branches in training_samples([group], [advantages]) for branch in branches]


def config(model: str, grid: str) -> Config:
    grid, _, shared = grid.partition("+")
    return Config.model_validate(
        {
            "model": {"path": model, "dtype": "float32"},
            "optimizer": {"epsilon": EPSILON, "weight_decay": 0.0, "clip_grad": NORM},
            "parallel": {
                **parallel_settings(grid),
                "tokens_per_microbatch": 60,
                "threads": 1,
                "share_prompts": bool(shared),
            },
        }
    )


def load(trainer, grid_position, seeds) -> None:
    steps = []
    for seed in seeds:
        made = samples(seed)
        if shares := trainer.config.parallel.share_prompts:
            packing = pack_by_prompt(made, grid_position.data_parallel_size, 60, float)
        else:
            packing = pack_samples([len(s) for s in made], grid_position.data_parallel_size, 60)
        plan = packing.shares[grid_position.data_rank]
        steps.append([[made[i] for i in members] for members in plan])
    loaded = trainer.load(steps)
    assert not shares or not grid_position.is_last_stage or loaded["packing/shared"] > 0.05
    trainer.compute_logprobs(TEMPERATURE, with_reference=True)


def main() -> None:
    model, out, *grids = sys.argv[1:]
    for grid in grids:
        settings = config(model, grid)
        grid_position = distributed.initialize(settings.parallel, seed=0)
        from megatron.core import parallel_state

        from megatron_r1.trainer.trainer import Trainer

        trainer, metrics = Trainer(settings, grid_position), []
        trainer.refresh_reference()
        for update, (average, level) in enumerate(UPDATES):
            if update % 2 == 0:
                load(trainer, grid_position, (update, update + 1))
            of_loss = LossSettings(
                loss_average=average,
                clip_low=CLIP_LOW,
                clip_high=CLIP_HIGH,
                max_response_tokens=LIMIT,
                ratio_level=level,
                kl_beta=KL_BETA,
            )
            metrics.append(trainer.update(update % 2, LOSS, of_loss, RATE, TEMPERATURE))
        file = Path(out) / f"{grid}.safetensors"
        weights.write_hf(trainer.model_chunks, trainer.hf_config, file, dtype=torch.float32)
        first = grid_position.data_rank == grid_position.tensor_rank == 0
        if (
            grid_position.is_last_stage
            and first
            and parallel_state.get_context_parallel_rank() == 0
        ):
            (Path(out) / f"{grid}.json").write_text(json.dumps(metrics))
        dist.barrier()
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
