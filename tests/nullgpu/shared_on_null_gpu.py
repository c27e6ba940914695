"""`tests/parallel/shared_steps.py` with Transformer Engine's modules, its attention among them, on
null GPUs, one a rank: `shared_on_null_gpu.py FOLDER GRID NAME…`, under torchrun.

Attention is Transformer Engine's own plain products with its own masks; its kernels run nowhere."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import transformer_engine_on_host
from host_compute import compute_everywhere
from r1_kernels import registry

from megatron_r1.config import Config


def main() -> None:
    compute_everywhere()
    transformer_engine_on_host.install()
    in_torch = registry.primitives("torch")
    registry.primitives = lambda backend: in_torch
    import shared_steps

    plain = shared_steps.config

    def config(model: str, grid: str) -> Config:
        settings = plain(model, grid).model_dump()
        settings["model"] |= {
            "fusions": ["gradient_accumulation"],
            "attention_backend": "unfused",
        }
        return Config.model_validate(settings)

    shared_steps.config = config
    shared_steps.main()


if __name__ == "__main__":
    main()
