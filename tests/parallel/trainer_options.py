"""Settings that change nothing, and one that must: `trainer_options.py MODEL OUT GRID…`

On "one", tp2 and cp2: the gradients of a supervised step with MTP layers trained, with each way of
recomputing activations against none. On every grid: the router's bias after a step with an update
rate, on every rank against one process's (the grid "one" writes it to OUT/bias.safetensors),
exported and through a checkpoint. Fails on the first expectation that does not hold.
"""

import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from grids import parallel_settings, positions
from safetensors.torch import load_file, save_file

from megatron_r1.config import Config
from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.models import weights
from megatron_r1.trainer.training_sample import Sample

LOSS = "megatron_r1.trainer.losses:supervised_loss"
BIAS = "e_score_correction_bias"
RATE = 0.01
RECOMPUTED = [
    {"recompute": "selective"},
    {"recompute": "selective", "recompute_modules": ["layernorm", "mla_up_proj", "mlp", "moe"]},
    {"recompute": "selective", "recompute_modules": ["core_attn", "shared_experts"]},
    {"recompute": "full", "optimizer_offload": 1.0},
]


def config(model: str, grid: str, rate: float = 0.0, **parallel) -> Config:
    return Config.model_validate(
        {
            "model": {
                "path": model,
                "dtype": "float32",
                "mtp": "train",
                "expert_bias_update_rate": rate,
            },
            # No clipping: it would hide a gradient that is wrong by a factor.
            "optimizer": {"learning_rate": 0.01, "epsilon": 1.0, "clip_grad": 1e9},
            "parallel": {**parallel_settings(grid), "threads": 1, **parallel},
        }
    )


def trained(settings: Config, grid_position):
    """A trainer after one update. Lengths need no padding on any grid: routers would count it."""
    from megatron_r1.trainer.trainer import Trainer

    trainer = Trainer(settings, grid_position)
    draw = random.Random(5)
    made = [
        Sample.pack([1], [draw.randrange(67) for _ in range(length - 1)])
        for length in (8, 16, 40, 24, 8, 64, 32, 16)
    ]
    plan = pack_samples([len(s) for s in made], grid_position.data_parallel_size, 80).shares[
        grid_position.data_rank
    ]
    trainer.load([[[made[i] for i in members] for members in plan]])
    metrics = trainer.update(0, LOSS, None, 0.01)
    return trainer, metrics


def gradients(trainer) -> dict[str, torch.Tensor]:
    return {
        f"chunk {index} {name}": parameter.main_grad.clone()
        for index, chunk in enumerate(trainer.model_chunks)
        for name, parameter in chunk.named_parameters()
    }


def recomputing_changes_no_gradient(model: str, grid: str, grid_position) -> None:
    expected = gradients(trained(config(model, grid), grid_position)[0])
    of_mtp = [gradient.abs().max() > 0 for name, gradient in expected.items() if "mtp." in name]
    assert not of_mtp or any(of_mtp), f"{grid}: no MTP layer was trained"
    for settings in RECOMPUTED:
        got = gradients(trained(config(model, grid, **settings), grid_position)[0])
        for name, gradient in expected.items():
            # The same operations in the same order; but for shared inputs, whose parts add up in
            # another.
            scale = gradient.abs().max().item()
            torch.testing.assert_close(
                got[name], gradient, rtol=0, atol=1e-5 * scale, msg=f"{grid} {settings} {name}"
            )


def the_bias_is_one_process_s_on_every_rank(
    model: str, grid: str, grid_position, out: Path
) -> None:
    from megatron_r1.models.weights.loading import local_entries
    from megatron_r1.trainer.checkpoint_manager import CheckpointManager
    from megatron_r1.trainer.trainer import Trainer

    settings = config(model, grid, RATE)
    trainer, _ = trained(settings, grid_position)
    weights.write_hf(
        trainer.model_chunks, trainer.hf_config, out / "all.safetensors", dtype=torch.bfloat16
    )
    exported = {n: t for n, t in load_file(out / "all.safetensors").items() if n.endswith(BIAS)}
    start = load_file(Path(model) / "model.safetensors")
    if grid == "one":
        save_file(exported, out / "bias.safetensors")
    for name, bias in load_file(out / "bias.safetensors").items():
        moved = (bias - start[name]).abs()
        assert ((moved - RATE).abs() < 1e-6).any(), f"{name} did not move by the rate: {moved}"
        assert torch.equal(exported[name], bias), f"{grid} {name}: {exported[name] - bias}"
    folder = str(out / f"checkpoint-{grid}")
    folders = CheckpointManager(trainer)
    folders.save_checkpoint(folder, {})
    assert folders.checkpoint_progress(wait=True)["error"] is None
    dist.barrier()
    fresh = Trainer(settings, grid_position)
    CheckpointManager(fresh).load_checkpoint(folder, with_reference=False)
    for one in (trainer, fresh):
        for tensor, entry in local_entries(one.model_chunks, one.hf_config):
            for piece in entry.pieces:
                if piece.hf_name.endswith(BIAS):
                    assert torch.equal(tensor, exported[piece.hf_name]), f"{grid} {piece.hf_name}"
    dist.barrier()


def main() -> None:
    model, out, *grids = sys.argv[1:]
    for grid, grid_position in positions(grids, lambda grid: config(model, grid).parallel):
        if grid in ("one", "tp2", "cp2"):
            recomputing_changes_no_gradient(model, grid, grid_position)
        the_bias_is_one_process_s_on_every_rank(model, grid, grid_position, Path(out))


if __name__ == "__main__":
    main()
