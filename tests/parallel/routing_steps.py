"""The trainer with routing replay on these ranks: `routing_steps.py MODEL OUT GRID…`.

Computes log-probabilities of OUT/samples.json, whose own stand for the engine's, and makes one
update. A grid may end in +full or +moe, for what is recomputed. "own" instead of a grid: whether
replaying the trainer's own choice changes a bit. Metrics go to OUT/GRID.json, weights to
OUT/GRID.safetensors.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from grids import parallel_settings

from megatron_r1.config import Config
from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.models import weights
from megatron_r1.trainer import distributed
from megatron_r1.trainer.training_sample import Sample

LOSS = "megatron_r1.trainer.losses:supervised_loss"
RECOMPUTE = {
    "": {},
    "full": {"recompute": "full"},
    "moe": {"recompute": "selective", "recompute_modules": ["moe"]},
}


def config(model: str, grid: str, replay: bool = True) -> Config:
    grid, _, recompute = grid.partition("+")
    parallel = {**parallel_settings(grid), **RECOMPUTE[recompute], "threads": 1}
    return Config.model_validate(
        {
            "model": {"path": model, "dtype": "float32"},
            "rl": {"routing_replay": replay},
            "optimizer": {"epsilon": 1.0, "weight_decay": 0.0, "clip_grad": 1e9},
            "parallel": {**parallel, "tokens_per_microbatch": 50},
        }
    )


def make_sample(entry: dict) -> Sample:
    ids, length = entry["ids"], entry["prompt_length"]
    flat = torch.tensor(entry["routing"], dtype=torch.uint8).flatten().tolist()
    return Sample.pack(ids[:length], ids[length:], entry["logprobs"], routing=bytes(flat))


def record_own(model: str, samples: list[Sample]) -> list[Sample]:
    """The samples with what a trainer without replay routes them to, as Megatron records it."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    from megatron_r1.trainer.trainer import Trainer

    trainer = Trainer(config(model, "one", replay=False), POSITION)
    recorders = []
    for layer in trainer.model_chunks[0].decoder.layers:
        if hasattr(layer.mlp, "router"):
            recorders.append(RouterReplay())
            recorders[-1].set_router_replay_action(RouterReplayAction.RECORD)
            layer.mlp.router.router_replay = recorders[-1]
    trainer.load([[samples]])
    trainer.compute_logprobs(1.0, with_reference=False)
    chosen = torch.stack([r.get_recorded_indices() for r in recorders], 1).to(torch.uint8)
    made, start = [], 0
    for sample in samples:
        rows = chosen[start : start + len(sample) - 1].flatten().tolist()
        made.append(
            Sample(sample.token_ids, sample.prompt_length, sample.rollout_logprobs, 0, bytes(rows))
        )
        start += len(sample)
    return made, trainer.rollout.minibatches[0][0].logprobs["old"]


def replay_own(model: str, samples: list[Sample]) -> dict:
    from megatron_r1.trainer.trainer import Trainer

    recorded, without = record_own(model, samples)
    trainer = Trainer(config(model, "one"), POSITION)
    trainer.load([[recorded]])
    metrics = trainer.compute_logprobs(1.0, with_reference=False)
    same = torch.equal(trainer.rollout.minibatches[0][0].logprobs["old"], without)
    return {"same": same, "agreement": metrics["routing/agreement"]}


def steps(model: str, grid: str, samples: list[Sample], out: Path) -> dict:
    from megatron_r1.trainer.trainer import Trainer

    trainer = Trainer(config(model, grid), POSITION)
    plan = pack_samples([len(s) for s in samples], POSITION.data_parallel_size, 50).shares[
        POSITION.data_rank
    ]
    trainer.load([[[samples[i] for i in members] for members in plan]])
    trainer.refresh_reference()
    report = trainer.compute_logprobs(1.0, with_reference=True) | trainer.measure_logprob_diff()
    report["microbatches"] = len(plan)
    for batch in trainer.rollout.minibatches[0] if POSITION.is_last_stage else []:
        gap = (batch.logprobs["ref"] - batch.logprobs["old"]).abs().max()
        report["reference_gap"] = max(report.get("reference_gap", 0.0), gap.item())
    report |= trainer.update(0, LOSS, None, 0.1)
    weights.write_hf(
        trainer.model_chunks, trainer.hf_config, out / f"{grid}.safetensors", dtype=torch.float32
    )
    return report


def main() -> None:
    global POSITION
    model, folder, *grids = sys.argv[1:]
    out = Path(folder)
    samples = [make_sample(s) for s in json.loads((out / "samples.json").read_text())["samples"]]
    for grid in grids:
        settings = config(model, "one" if grid == "own" else grid)
        POSITION = distributed.initialize(settings.parallel, seed=0)
        from megatron.core import parallel_state

        is_own = grid == "own"
        report = replay_own(model, samples) if is_own else steps(model, grid, samples, out)
        is_first_context = parallel_state.get_context_parallel_rank() == 0
        if (
            POSITION.is_last_stage
            and POSITION.data_rank == POSITION.tensor_rank == 0
            and is_first_context
        ):
            (out / f"{grid}.json").write_text(json.dumps(report))
        dist.barrier()
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
