"""`tests/parallel/trainer_steps.py` with Transformer Engine's modules on null GPUs, one a rank:
`trainer_on_null_gpu.py MODEL OUT GRID…`, under torchrun.

What Triton's kernels would compute, their counterparts in PyTorch do; permutation is not fused."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import transformer_engine_on_host
from host_compute import compute_everywhere
from r1_kernels import registry

from megatron_r1.config import Config


def main() -> None:
    compute_everywhere()
    transformer_engine_on_host.install()
    transformer_engine_on_host.use_our_attention()
    in_torch = registry.primitives("torch")
    registry.primitives = lambda backend: in_torch
    import trainer_steps

    plain = trainer_steps.config

    def config(model: str, grid: str) -> Config:
        settings = plain(model, grid).model_dump()
        settings["model"]["fusions"] = ["gradient_accumulation"]
        return Config.model_validate(settings)

    trainer_steps.config = config
    trainer_steps.main()


if __name__ == "__main__":
    main()
