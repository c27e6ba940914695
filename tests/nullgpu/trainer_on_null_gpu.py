"""`tests/parallel/trainer_steps.py` with Transformer Engine's modules on null GPUs, one a rank:
`trainer_on_null_gpu.py MODEL OUT GRID…`, under torchrun.

What Triton's kernels would compute, their counterparts in PyTorch do; permutation is not fused."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"

from collections.abc import Callable

import transformer_engine_on_host
from host_compute import compute_everywhere
from r1_kernels import registry

from megatron_r1.config import Config


def compute_on_host(*, our_attention: bool = True) -> None:
    """Let torch, Transformer Engine and the kernels compute, which they do not on a null GPU.

    Args:
        our_attention: whether attention is ours for CPUs; False: Transformer Engine's own plain
            products."""
    compute_everywhere()
    transformer_engine_on_host.install()
    if our_attention:
        transformer_engine_on_host.use_our_attention()
    in_torch = registry.load_primitives("torch")
    registry.load_primitives = lambda backend: in_torch


def accumulating(make: Callable[..., Config]) -> Callable[..., Config]:
    """Return `make` whose configurations fuse the accumulation of gradients, and nothing else."""

    def config(*arguments: object) -> Config:
        settings = make(*arguments).model_dump()
        settings["model"]["fusions"] = ["gradient_accumulation"]
        return Config.model_validate(settings)

    return config


def main() -> None:
    compute_on_host()
    import trainer_steps

    trainer_steps.config = accumulating(trainer_steps.config)
    trainer_steps.main()


if __name__ == "__main__":
    main()
