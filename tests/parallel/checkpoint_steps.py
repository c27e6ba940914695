"""Checkpoints of the real trainer on these ranks: `checkpoint_steps.py SCENE MODEL GRID OUT`.

    straight   four updates without a stop; a checkpoint of the second is written meanwhile
    continued  a fresh trainer loads that checkpoint and makes the last two
    both       the one after the other in one process, for every grid of GRID+GRID…
    full       no file may grow beyond LIMIT bytes on the last rank
    killed     the last rank is killed with signal 9 while it writes
    refused    what all ranks find in a checkpoint of which the last byte of each file was flipped,
               and in one that was written without a reference policy and is read with one
What came of it goes to OUT/SCENE.json.
"""

import hashlib
import json
import os
import random
import resource
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from trainer_steps import LOSS, SETTINGS, config, load

from megatron_r1.trainer import distributed
from megatron_r1.trainer.checkpoints import contents, optimizer_gathering

LIMIT = 10_000
contents_own_part = contents._own_part
optimizer_gathering.GATHERED_ELEMENTS = 10_000  # a bucket takes several slices


def update(trainer, grid_position, seed: int) -> dict:
    load(trainer, grid_position, (seed,))
    metrics = trainer.update(0, LOSS, SETTINGS, 0.1) | trainer.measure_logprob_diff()
    # Streams that training may draw from: each draw has to go on where the last one stopped.
    metrics["draws"] = [torch.rand(1).item(), random.random(), forked_draw()]
    return metrics


def forked_draw() -> float:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        return torch.rand(1).item()


def digest(trainer) -> str:
    """Of this rank's weights, buffers, master weights, moments and reference, bit for bit."""
    hasher = hashlib.sha256()
    for chunk in trainer.model_chunks:
        for _, tensor in sorted(chunk.state_dict(keep_vars=True).items()):
            if torch.is_tensor(tensor):
                hasher.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    with trainer.reference.swapped_in():
        for chunk in trainer.model_chunks:
            for parameter in chunk.parameters():
                hasher.update(parameter.detach().numpy().tobytes())
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                for tensor in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"]):
                    hasher.update(tensor.numpy().tobytes())
    return hasher.hexdigest()


def report(out: Path, scene: str, mine: dict) -> None:
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        (out / f"{scene}.json").write_text(json.dumps(everyone))


def straight(trainer, folders, grid_position, out: Path) -> dict:
    trainer.refresh_reference()
    update(trainer, grid_position, 1)
    trainer.refresh_reference()
    update(trainer, grid_position, 2)
    folders.save_checkpoint(str(out / "step_00000002"), {"step": 2})
    memory = folders._writer._memory
    gathered = memory.filled.num_bytes
    copied = sum(buffer.nbytes for buffers in memory._copies.values() for buffer in buffers)
    steps = [update(trainer, grid_position, 3), update(trainer, grid_position, 4)]
    progress = folders.checkpoint_progress(wait=True)
    again = []
    try:
        folders.save_checkpoint(str(out / "step_00000002"), {"step": 2})
    except ValueError as error:
        again = [str(error)]
    found = {"steps": steps, "digest": digest(trainer), "error": progress["error"]}
    return {**found, "again": again, "gathered": gathered, "staged": gathered + copied}


def continued(trainer, folders, grid_position, out: Path) -> dict:
    random.seed(99)
    asked = []

    def own_part(part, state):
        own = contents_own_part(part, state)
        asked.extend(own.values())
        return own

    with patch.object(contents, "_own_part", own_part):
        answer = folders.load_checkpoint(str(out / "step_00000002"), with_reference=True)
    steps = [update(trainer, grid_position, 3), update(trainer, grid_position, 4)]
    own = sum(entry.data.nbytes for entries in asked for entry in entries.values())
    return {"steps": steps, "digest": digest(trainer), "asked": own, **answer}


def full(trainer, folders, grid_position, out: Path) -> dict:
    trainer.refresh_reference()
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
    folders.save_checkpoint(str(out / "step_00000005"), {"step": 5})
    update(trainer, grid_position, 1)
    error = folders.checkpoint_progress(wait=True)["error"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    left = sorted(path.name for path in out.iterdir())
    try:
        folders.save_checkpoint(str(out / "step_00000006"), {"step": 6})
        next_save = None
    except ValueError as refusal:
        next_save = str(refusal)
    return {"error": error, "left": left, "next": next_save}


def killed(trainer, folders, grid_position, out: Path) -> dict:
    from megatron_r1.trainer.checkpoints.writer import HashedFile

    write = HashedFile.write

    def die(self, piece):
        if self.tell() > LIMIT:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, piece)

    trainer.refresh_reference()
    if dist.get_rank() == dist.get_world_size() - 1:
        HashedFile.write = die
    folders.save_checkpoint(str(out / "step_00000007"), {"step": 7})
    error = folders.checkpoint_progress(wait=True)["error"]
    (out / f"killed_{dist.get_rank()}.json").write_text(json.dumps(error))
    sys.exit(1)


def refused(trainer, folders, grid_position, out: Path) -> dict:
    bare = out / "without_reference"
    folders.save_checkpoint(str(bare), {"step": 1})
    assert folders.checkpoint_progress(wait=True)["error"] is None
    found = folders.verify_checkpoint(str(out / "flipped"))["faults"]
    refusals = {folder.name: refusal(folders, folder) for folder in (out / "flipped", bare)}
    return {"damage": found, "refusals": refusals}


def refusal(folders, folder: Path) -> str | None:
    try:
        folders.load_checkpoint(str(folder), with_reference=True)
    except ValueError as error:
        return str(error)
    return None


def both(model: str, grid: str, out: Path) -> dict:
    from megatron.core import parallel_state

    out = out / grid
    settings, grid_position = initialized(model, grid)
    result = {"straight": straight(*new(settings, grid_position), grid_position, out)}
    torch.manual_seed(1)
    result["continued"] = continued(*new(settings, grid_position), grid_position, out)
    parallel_state.destroy_model_parallel()
    return result


def initialized(model: str, grid: str):
    settings = config(model, grid)
    return settings, distributed.initialize(settings.parallel, seed=0)


def new(settings, grid_position):
    from megatron_r1.trainer.checkpoint_manager import CheckpointManager
    from megatron_r1.trainer.trainer import Trainer

    add_extra_state()
    trainer = Trainer(settings, grid_position)
    return trainer, CheckpointManager(trainer)


def add_extra_state() -> None:
    """Give norms what every Transformer Engine module has: an entry that a strict load asks for."""
    from megatron_r1.models.layers import RMSNorm

    RMSNorm.get_extra_state = lambda self: torch.empty(0, dtype=torch.uint8)
    RMSNorm.set_extra_state = lambda self, state: None


def main() -> None:
    scene, model, grids, out = sys.argv[1:]
    if scene == "both":
        found = {grid: both(model, grid, Path(out)) for grid in grids.split("+")}
    else:
        scenes = (straight, continued, full, killed, refused)
        play = {one.__name__: one for one in scenes}[scene]
        settings, grid_position = initialized(model, grids)
        found = play(*new(settings, grid_position), grid_position, Path(out))
    report(Path(out), scene, found)
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
