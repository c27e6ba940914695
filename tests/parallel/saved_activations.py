"""What the layers keep for the backward pass: `saved_activations.py MODEL OUT`.

Bytes of a token, parameters and what the loss head keeps left out, go to OUT/saved.json."""

import json
import sys
from pathlib import Path

import torch

from megatron_r1.config import Config
from megatron_r1.trainer import distributed
from megatron_r1.trainer.training_sample import Sample

SAMPLES, LENGTH = 8, 32


def main() -> None:
    model, out = sys.argv[1:]
    config = Config.model_validate(
        {"model": {"path": model, "init": "random", "dtype": "float32"}}
        | {"parallel": {"threads": 1}}
    )
    grid_position = distributed.initialize(config.parallel, seed=0)
    from megatron_r1.trainer.operations import SUPERVISED
    from megatron_r1.trainer.trainer import Trainer

    trainer = Trainer(config, grid_position)
    sample = Sample.pack([1] * (LENGTH // 2), [2] * (LENGTH // 2), [-1.0] * (LENGTH // 2), 1.0)
    trainer.load([[[sample] * SAMPLES]])
    own = {
        p.untyped_storage().data_ptr() for chunk in trainer.model_chunks for p in chunk.parameters()
    }
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            # Kept alive, so that no address is used twice.
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.update(0, SUPERVISED, None, 1e-3)
    num_bytes = sum(storage.nbytes() for storage in saved.values())
    Path(out, "saved.json").write_text(json.dumps(num_bytes / (SAMPLES * LENGTH)))
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
