"""Saves a checkpoint of the trainer and loads it into another one, with Transformer Engine's layers
on the null GPU: `checkpoint_round_trip.py MODEL DTYPE RECIPE MOMENTS [DEFECT] [lora] [engine]`.

Before saving, the weights and the optimizer's state are filled with random numbers, because kernels
do not run; afterwards they must be equal, bit for bit. DEFECT: a name in DEFECTS, installed
before; lora: adapters are trained, the model's weights are not compared; engine: while it saves,
the GPU has room for half of the reference, as next to an engine that is awake."""

import os
import sys
from pathlib import Path

import torch
from host_compute import HostCompute, on_host
from trainer_steps import LOSS, SETTINGS, load

from megatron_r1.base.processes import children
from megatron_r1.config import Config
from megatron_r1.trainer import distributed


def load_strictly() -> None:
    """Want every module's `_extra_state` in a checkpoint, which has none."""
    from megatron_r1.trainer.checkpoints import contents

    contents.load_weights = lambda module, weights: module.load_state_dict(weights)


def store_remainders() -> None:
    """Keep master weights as the remainders of the bf16 parameters."""
    from megatron_r1.trainer import optimizer

    optimizer._PRECISION_AWARE["store_param_remainders"] = True


def save_the_reference_from_the_gpu() -> None:
    """Bring the reference to the GPU, as a second set of weights, to save it."""
    from megatron_r1.trainer.reference_policy import ReferencePolicy

    kept = ReferencePolicy.stored_value
    ReferencePolicy.stored_value = lambda self, live: kept(self, live).to(live.device)


DEFECTS = {
    defect.__name__: defect
    for defect in (
        load_strictly,
        store_remainders,
        save_the_reference_from_the_gpu,
    )
}


def attention_without_cudnn() -> None:
    """Replace Transformer Engine's attention, whose cuDNN does not start on the null GPU, by a
    function of the same shapes."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    def forward(self, query, key, value, *args, **kwargs):
        groups = query.shape[-2] // value.shape[-2]
        out = value.repeat_interleave(groups, -2) + 0 * (query.sum() + key.sum())
        return out.flatten(-2)

    TEDotProductAttention.forward = forward


def state(trainer) -> dict[str, torch.Tensor]:
    """This rank's weights, master weights and moments, as CPU tensors over the same memory."""
    found = {}
    for number, chunk in enumerate(trainer.model_chunks):
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad:
                found[f"{number}.{name}"] = on_host(parameter.data)
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    for number, part in enumerate(parts):
        for group in part.optimizer.param_groups:
            for index, parameter in enumerate(group["params"]):
                kept = {"master": parameter.data, **part.optimizer.state[parameter]}
                for name, tensor in kept.items():
                    if torch.is_tensor(tensor) and tensor.dim():
                        found[f"optimizer {number}.{index}.{name}"] = on_host(tensor)
    return found


def as_an_engine(trainer) -> torch.Tensor:
    """Take the GPU's memory but half of what the reference would need there."""
    trained = [p for chunk in trainer.model_chunks for p in chunk.parameters() if p.requires_grad]
    free, _ = torch.cuda.mem_get_info()
    size = free - sum(parameter.nbytes for parameter in trained) // 2
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def main() -> None:
    model, dtype, recipe, moments, *defects = sys.argv[1:]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(children.free_port())
    lora = {"rank": 16} if "lora" in defects else None
    settings = Config.model_validate(
        {
            "model": {"path": model, "dtype": dtype, "lora": lora},
            "optimizer": {"learning_rate": 0.1, "moments": moments},
            "parallel": {"tokens_per_microbatch": 256, "threads": 1},
            "fp8": {"recipe": recipe},
        }
    )
    grid_position = distributed.initialize(settings.parallel, seed=0)
    from megatron_r1.trainer.checkpoint_manager import CheckpointManager
    from megatron_r1.trainer.trainer import Trainer

    for defect in DEFECTS.keys() & defects:
        DEFECTS[defect]()
    attention_without_cudnn()
    folder = Path(model) / "-".join(["checkpoint", dtype, recipe, moments, *defects])
    with HostCompute():
        trainer = Trainer(settings, grid_position)
        trainer.refresh_reference()
        load(trainer, grid_position, (1,))
        trainer.update(0, LOSS, SETTINGS, 0.1)
        expected = state(trainer)
        torch.manual_seed(1)
        for tensor in expected.values():
            tensor.copy_(torch.randn(tensor.shape))
        engine = as_an_engine(trainer) if "engine" in defects else None
        folders = CheckpointManager(trainer)
        folders.save_checkpoint(str(folder), {"step": 1})
        assert (error := folders.checkpoint_progress(wait=True)["error"]) is None, error
        del engine
        other = Trainer(settings, grid_position)
        CheckpointManager(other).load_checkpoint(str(folder), with_reference=True)
    found = state(other)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    different = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert not different, f"{len(different)} of {len(found)}: {different[:5]}"
    distributed.leave_process_groups()
    print(f"equal: {len(found)} tensors")


if __name__ == "__main__":
    main()
