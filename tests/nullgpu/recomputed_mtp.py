"""Gradients of MTP layers in FP8 blocks, with and without recomputed layers, on a null GPU:
`recomputed_mtp.py MODEL`, under torchrun. It prints {recompute: {parameter: norm}}."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import json
import random
import sys

from megatron.core.utils import unwrap_model
from trainer_on_null_gpu import compute_on_host
from waits_of_training import LOSS, SETTINGS, sample

from megatron_r1.config import Config


def settings(model: str, recompute: str) -> Config:
    return Config.model_validate(
        {
            "model": {
                "path": model,
                "dtype": "bfloat16",
                "mtp": "train",
                "fusions": ["gradient_accumulation"],
            },
            "fp8": {"recipe": "blockwise", "scales": "float32"},
            "parallel": {"recompute": recompute, "tokens_per_microbatch": 80, "threads": 1},
        }
    )


def main() -> None:
    compute_on_host()
    from megatron_r1.models.routing_shape import routing_shape
    from megatron_r1.trainer import distributed
    from megatron_r1.trainer.trainer import Trainer

    grid_position = None
    norms: dict[str, dict[str, float]] = {}
    for recompute in ("none", "full"):
        config = settings(sys.argv[1], recompute)
        grid_position = grid_position or distributed.initialize(config.parallel, seed=0)
        trainer = Trainer(config, grid_position)
        trainer.refresh_reference()
        draw = random.Random(0)
        shape = routing_shape(trainer.hf_config)
        trainer.load([[[sample(draw, shape) for _ in range(3)]]])
        trainer.compute_logprobs(1.0, with_reference=True)
        trainer.update(0, LOSS, SETTINGS, 1e-3)
        mtp = unwrap_model(trainer.model_chunks[0]).mtp
        norms[recompute] = {
            name: float(parameter.main_grad.double().norm())
            for name, parameter in mtp.named_parameters()
        }
    print(json.dumps(norms))
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
