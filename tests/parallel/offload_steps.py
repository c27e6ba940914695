"""A trainer whose parameters and optimizer state are away between its phases against one that keeps
them: `offload_steps.py MODEL OUT GRID…`, GRIDs as name-of-a-grid:dtype:lora|whole.

Three steps of RL's order: update, memory away, log-probabilities, update, checkpoint. Fails on the
first expectation that does not hold."""

import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from grids import parallel_settings, positions

from megatron_r1.config import Config
from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.models import platform
from megatron_r1.trainer import offload_stores
from megatron_r1.trainer.training_sample import Sample

LOSS = "megatron_r1.trainer.losses:supervised_loss"
TEXT = Sample.pack([3], [5, 8, 13, 21, 34], [-4.0] * 5)


def config(model: str, grid: str, place: str, folder: str | None = None) -> Config:
    name, dtype, trained = grid.split(":")
    recipe = {
        "model": {
            "path": model,
            "dtype": dtype,
            "lora": {"rank": 4} if trained == "lora" else None,
        },
        "rollout": {"colocated": True},
        "optimizer": {"clip_grad": 1.0, "weight_decay": 0.1},
        "parallel": {
            **parallel_settings(name),
            "threads": 1,
            "offload_between_phases": place,
            "offload_folder": folder if place == "disk" else None,
        },
    }
    return Config.model_validate(recipe)


def load(trainer, grid_position, seed: int) -> None:
    draw = random.Random(seed)
    made = [
        Sample.pack([1], [draw.randrange(67) for _ in range(length - 1)], [-1.0] * (length - 1))
        for length in (8, 16, 40, 24, 8, 64, 32, 16)
    ]
    plan = pack_samples([len(s) for s in made], grid_position.data_parallel_size, 80).shares[
        grid_position.data_rank
    ]
    trainer.load([[[made[i] for i in members] for members in plan]])


def device_tensors(trainer) -> list[torch.Tensor]:
    """All that is to be away, found without `trainer.offload`: Megatron's own lists."""
    buffers = [b for c in trainer.ddp_chunks for b in c.buffers + c.expert_parallel_buffers]
    found = [buffer.param_data for buffer in buffers]
    found += [p for chunk in trainer.model_chunks for p in chunk.parameters()]
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        if getattr(part, "buffers", None):
            for groups in (part.shard_fp32_from_float16_groups, part.shard_fp32_groups):
                found += [t for group in groups for t in group]
            for state in part.optimizer.state.values():
                found += [state["exp_avg"], state["exp_avg_sq"]]
    return found


def held_bytes(tensors: list[torch.Tensor]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def assert_views(trainer) -> None:
    """What the optimizer writes is what the model reads."""
    for chunk in trainer.ddp_chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            start = buffer.param_data.untyped_storage().data_ptr()
            for parameter in buffer.params:
                assert parameter.untyped_storage().data_ptr() == start != 0
            for bucket in buffer.buckets:
                assert bucket.param_data.untyped_storage().data_ptr() == start
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        if not getattr(part, "buffers", None):
            continue
        # Megatron's map of a parameter to its shard: of an fp32 model both are one memory.
        for models, shards in (
            (part.model_fp32_groups, part.shard_fp32_groups),
            (part.model_float16_groups, part.shard_float16_groups),
        ):
            for parameter, shard in zip(sum(models, []), sum(shards, []), strict=True):
                begin = parameter.data_ptr()
                end = parameter.data_ptr() + parameter.numel() * parameter.element_size()
                assert begin <= shard.data_ptr() < end


def steps(trainer, grid_position, out: Path, name: str, *, yields: bool) -> list:
    """Return all metrics, and every value of the model and the optimizer after the last step."""
    from megatron_r1.trainer.checkpoint_manager import CheckpointManager
    from megatron_r1.trainer.evaluation_passes import EvaluationPasses

    folders, evaluation, seen = CheckpointManager(trainer), EvaluationPasses(trainer), []
    trainer.refresh_reference()
    for step in range(3):
        if yields:
            offload_all(trainer)
            trainer.offload.prepare("load")
            away = trainer.offload.offloaded_bytes
            trainer.offload.prepare("compute_logprobs")
            assert trainer.offload.offloaded_bytes < away
            assert step == 0 or trainer.offload.offloaded_bytes, (
                "Adam's state comes with the update"
            )
            trainer.offload.prepare("update")
            assert trainer.offload.offloaded_bytes == 0
            assert_views(trainer)
        load(trainer, grid_position, step)
        seen.append(trainer.compute_logprobs(1.0, with_reference=True))
        seen.append(trainer.update(0, LOSS, None, 1e-2))
        seen.append(trainer.measure_logprob_diff())
        seen.append(evaluation.probe([TEXT]))
    folders.export(str(out / "hf"))  # and NumPy has seen the parameters, as in a push
    if yields:
        evaluation.prepare_probe([TEXT])
        offload_all(trainer)
        assert evaluation.compare_probe([TEXT]) == seen[-1], "the kept log-probabilities are others"
        trainer.offload.prepare("save_checkpoint")
    folders.save_checkpoint(str(out / name), {})
    assert folders.checkpoint_progress(wait=True)["error"] is None
    return [seen, [t.detach().clone() for t in device_tensors(trainer)]]


def offload_all(trainer) -> None:
    tensors = device_tensors(trainer)
    before = held_bytes(tensors)
    parameters = [p for chunk in trainer.model_chunks for p in chunk.parameters()]
    ours = held_bytes(parameters)
    trainer.free_memory(free_parameters=False)
    assert held_bytes(tensors) == held_bytes(parameters) == ours, "Adam's state is still here"
    trainer.free_memory(free_parameters=True)
    assert trainer.offload.offloaded_bytes == before
    left = [t for t in tensors if t.untyped_storage().nbytes()]
    assert not any(t.untyped_storage().resizable() for t in left), "some of it is still here"
    assert not any(t.any() for t in left), "its pages are still here"


def offload_changes_nothing(model: str, grid: str, grid_position, out: Path) -> None:
    from megatron_r1.trainer.checkpoint_manager import CheckpointManager
    from megatron_r1.trainer.trainer import Trainer

    results, plain = {}, Trainer(config(model, grid, "none"), grid_position)
    assert plain.offload is None
    results["none"] = steps(
        plain, grid_position, out, f"{grid}-none".replace(":", "-"), yields=False
    )
    for place in ("host", "disk"):
        trainer = Trainer(config(model, grid, place, str(out)), grid_position)
        name = f"{grid}-{place}".replace(":", "-")
        results[place] = steps(trainer, grid_position, out, name, yields=True)
    assert not list(out.glob("tmp*")), "the file has a name"
    for place in ("host", "disk"):
        metrics, values = results[place]
        assert metrics == results["none"][0], f"{grid}, {place}: {metrics}, {results['none'][0]}"
        for got, want in zip(values, results["none"][1], strict=True):
            assert torch.equal(got, want), f"{grid}, {place}: {(got - want).abs().max()}"
    # A checkpoint of a trainer with offload, into one whose state is away.
    trainer = Trainer(config(model, grid, "host"), grid_position)
    trainer.free_memory(free_parameters=True)
    trainer.offload.prepare("load_checkpoint")
    folder = out / f"{grid}-disk".replace(":", "-")
    CheckpointManager(trainer).load_checkpoint(str(folder), with_reference=True)
    for got, want in zip(device_tensors(trainer), results["none"][1], strict=True):
        assert torch.equal(got, want), f"{grid}: the checkpoint has other values"
    dist.barrier()


def main() -> None:
    model, out, *grids = sys.argv[1:]
    platform.prepare_process()
    offload_stores.BUFFER_BYTES = 10_007  # many pieces, and none ends where a storage does
    for grid, grid_position in positions(grids, lambda grid: config(model, grid, "none").parallel):
        offload_changes_nothing(model, grid, grid_position, Path(out))


if __name__ == "__main__":
    main()
