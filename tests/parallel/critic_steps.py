"""A critic next to a policy on these ranks: `critic_steps.py POLICIES SCORED OUT NAME GRID…`.

On every grid: its values and updates equal those of critic_oracle.py; then a checkpoint, two more
updates of both models, and the same from the checkpoint by fresh ones, bit for bit.
"""

import hashlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from critic_samples import CLIP, EPSILON, NORM, RATE, STEPS, rollout
from grids import parallel_settings
from safetensors.torch import load_file

from megatron_r1.config import Config
from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.models import read_hf_config, weights
from megatron_r1.trainer import distributed
from megatron_r1.trainer.training_sample import Sample

TOLERANCE = 2e-5
POLICY_LOSS = "megatron_r1.trainer.losses:supervised_loss"


def config(policy: Path, scored: Path, grid: str) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(policy), "dtype": "float32"},
            "rl": {"algorithm": "ppo"},
            "critic": {"path": str(scored), "learning_rate": RATE, "value_clip": CLIP},
            "optimizer": {"epsilon": EPSILON, "weight_decay": 0.0, "clip_grad": NORM},
            "parallel": {**parallel_settings(grid, False), "threads": 1},
        }
    )


def load(trainer, grid_position) -> list[list[int]]:
    """The rollout, with returns; which samples this rank's micro-batches are of."""
    samples = [Sample.pack(p, r, outcome_advantage=target) for p, r, target in rollout()]
    plan = pack_samples([len(s) for s in samples], grid_position.data_parallel_size, 60).shares[
        grid_position.data_rank
    ]
    trainer.load([[[samples[i] for i in members] for members in plan]])
    trainer.compute_values()
    for batch in trainer.rollout.minibatches[0]:
        batch.returns = batch.advantages.clone()
    return plan


def gap_of_values(trainer, grid_position, plan, expected) -> float:
    """Largest difference of this rank's values from the oracle's, matched by sample and token."""
    if not grid_position.is_last_stage:
        return 0.0
    from megatron.core import parallel_state

    worst, seen = 0.0, 0
    for batch, members in zip(trainer.rollout.minibatches[0], plan, strict=False):
        assert not batch.values[~batch.is_response].any(), "no value outside responses"
        held = batch.values[batch.is_response]
        expected_values = torch.cat([expected[i] for i in members])
        if parallel_state.get_context_parallel_world_size() > 1:
            # A rank holds some of the tokens: each is one of the oracle's values.
            gaps = (held[:, None] - expected_values[None]).abs().min(1).values
        else:
            gaps = (held - expected_values).abs()
        worst, seen = max(worst, gaps.max().item() if len(gaps) else 0.0), seen + len(held)
    total = torch.tensor(seen)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    assert total == sum(len(response) for _, response, _ in rollout())
    return worst


def digest(trainer) -> str:
    """Of this rank's weights, master weights and moments, the policy's and the critic's."""
    hasher = hashlib.sha256()
    for part in (trainer, trainer.critic):
        for chunk in part.model_chunks:
            for tensor in chunk.parameters():
                hasher.update(tensor.detach().contiguous().numpy().tobytes())
        for optimizer in getattr(part.optimizer, "chained_optimizers", [part.optimizer]):
            for state in optimizer.optimizer.state.values():
                for name in ("exp_avg", "exp_avg_sq", "step"):
                    hasher.update(state[name].numpy().tobytes())
    return hasher.hexdigest()


def both_updates(trainer, grid_position) -> list[dict]:
    load(trainer, grid_position)
    return [trainer.update_critic(0, RATE), trainer.update(0, POLICY_LOSS, None, 0.1)]


def close(name: str, grid: str, what: str, gap: float, tolerance: float) -> None:
    worst = torch.tensor(float(gap))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(f"{name} {grid} {what}: {worst.item():.1e}", flush=True)
    assert worst <= tolerance, f"{name} at {grid}: {what} differs by {worst.item():.1e}"


def play(name: str, grid: str, policy: Path, scored: Path, out: Path) -> None:
    settings = config(policy, scored, grid)
    grid_position = distributed.initialize(settings.parallel, seed=0)
    from megatron_r1.trainer.checkpoint_manager import CheckpointManager
    from megatron_r1.trainer.trainer import Trainer

    trainer, expected = Trainer(settings, grid_position), torch.load(scored / "critic.pt")
    plan = load(trainer, grid_position)
    close(
        name,
        grid,
        "values",
        gap_of_values(trainer, grid_position, plan, expected["old"]),
        TOLERANCE,
    )
    for step in range(STEPS):
        metrics = trainer.update_critic(0, RATE)
        expected_values = expected["metrics"][step]
        gaps = (
            [abs(metrics[key] - expected_values[key]) for key in expected_values]
            if grid_position.is_last_stage
            else [0.0]
        )
        close(name, grid, f"metrics of update {step}", max(gaps), 5 * TOLERANCE)
    assert 0 < expected["metrics"][-1]["value/clip_fraction"] < 1, "clipping was to be tried"
    trainer.compute_values()
    close(
        name, grid, "new values", gap_of_values(trainer, grid_position, plan, expected["new"]), 1e-4
    )
    hf_config = read_hf_config(scored, None)
    weights.write_hf(
        trainer.critic.model_chunks, hf_config, out / "critic.safetensors", dtype=torch.float32
    )
    found = load_file(out / "critic.safetensors")
    gaps = [(found[key] - expected["weights"][key]).abs().max() for key in found]
    close(name, grid, "weights", max(gaps), 1e-4)

    folders = CheckpointManager(trainer)
    folders.save_checkpoint(str(out / f"{name}_{grid}"), {})
    after = [
        both_updates(trainer, grid_position),
        both_updates(trainer, grid_position),
        digest(trainer),
    ]
    assert folders.checkpoint_progress(wait=True)["error"] is None
    fresh = Trainer(settings, grid_position)
    loaded = CheckpointManager(fresh).load_checkpoint(
        str(out / f"{name}_{grid}"), with_reference=False
    )
    assert loaded["is_same_layout"]
    again = [both_updates(fresh, grid_position), both_updates(fresh, grid_position), digest(fresh)]
    assert again == after, f"{name} at {grid}: the continued run differs"
    if dist.get_rank() == 0:
        print(f"{name} {grid} continues bit for bit", flush=True)


def main() -> None:
    policies, scored, out, name, *names = sys.argv[1:]
    for grid in names:
        play(name, grid, Path(policies) / name, Path(scored) / name, Path(out))
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
