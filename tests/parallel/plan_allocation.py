"""What this rank's trainer really holds in memory: `plan_allocation.py MODEL OUT GRID…`.

For every grid, bytes of parameters, gradients and optimizer state after one optimizer step go to
OUT/GRID_RANK.json. A grid is sizes and a dtype, such as tp2_bfloat16; of ppo_tp2_bfloat16 also the
critic's, all together.
"""

import json
import re
import sys
from pathlib import Path

import torch

from megatron_r1.config import Config
from megatron_r1.trainer import distributed


def config(model: str, grid: str) -> Config:
    sizes = {k: int(n) for k, n in re.findall(r"(tp|pp|ep|vp)(\d)", grid)}
    parallel = {
        "tensor": sizes.get("tp", 1),
        "pipeline": sizes.get("pp", 1),
        "expert": sizes.get("ep", 1),
        "virtual_pipeline": sizes.get("vp", 1),
        "threads": 1,
    }
    dtype = grid.rpartition("_")[2]
    mtp = "train" if "mtp" in grid else "frozen"
    return Config.model_validate(
        {"model": {"path": model, "init": "random", "dtype": dtype, "mtp": mtp}}
        | {"parallel": parallel, "rl": {"algorithm": "ppo"} if "ppo" in grid else {}}
    )


def storages(tensors) -> dict[int, int]:
    """Bytes of each piece of memory under `tensors`, by its address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def measure(trainer) -> dict[str, int]:
    """trainer: or its critic, which is built alike."""
    for chunk in trainer.ddp_chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.step()
    bare = [t for chunk in trainer.model_chunks for t in chunk.parameters()]
    bare += [
        b
        for chunk in trainer.model_chunks
        for n, b in chunk.named_buffers()
        if n.endswith("expert_bias")
    ]
    parameters = storages(bare)
    buffers = [b for c in trainer.ddp_chunks for b in c.buffers + c.expert_parallel_buffers]
    gradients = storages([buffer.grad_data for buffer in buffers])
    optimizers = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    states = [o.optimizer for o in optimizers if o.optimizer is not None]
    held = [t for o in states for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
    held += [p for o in states for group in o.param_groups for p in group["params"]]
    # An fp32 parameter is its own master copy: its memory is counted already.
    state = {at: size for at, size in storages(held).items() if at not in parameters}
    return {
        "parameters": sum(parameters.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(state.values()),
    }


def main() -> None:
    model, out, *grids = sys.argv[1:]
    for grid in grids:
        settings = config(model, grid)
        grid_position = distributed.initialize(settings.parallel, seed=0)
        from megatron.core import parallel_state

        from megatron_r1.trainer.trainer import Trainer

        trainer = Trainer(settings, grid_position)
        report = {"pipeline_rank": grid_position.pipeline_rank} | measure(trainer)
        if trainer.critic is not None:
            report["critic"] = sum(measure(trainer.critic).values())
        Path(out, f"{grid}_{grid_position.rank}.json").write_text(json.dumps(report))
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
