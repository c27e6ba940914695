"""`tests/parallel/optimizer_offload.py` on a null GPU, with memory of two kinds and Transformer
Engine's layers and Adam: `offload_on_null_gpu.py MODEL OUT GRID`, under torchrun.

Its Adam is imitated in another order than torch's, which updates what is on the host: weights in
bf16 may be rounded to a neighbor."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import optimizer_offload
import pytest
import torch
import transformer_engine_on_host
from host_compute import compute_everywhere
from r1_kernels import registry

from megatron_r1.config import Config


def assert_near(found: tuple, expected: tuple, where: str) -> None:
    metrics = [each[0] if isinstance(each[0], list) else [each[0]] for each in (found, expected)]
    for mine, theirs in zip(*metrics, strict=True):
        assert mine == pytest.approx(theirs, rel=2**-7), where
    got, wanted = (torch.cat([w.flatten() for w in each[1]]).float() for each in (found, expected))
    far, differ = (got - wanted).abs().max().item(), (got != wanted).float().mean().item()
    print(f"{where}: {differ:.1e} of the weights differ, by at most {far:.1e}", flush=True)
    # A gradient near 0 may change its sign, and with it a whole step of 1e-3.
    assert far < 4e-3 and differ < 0.02, where


def main() -> None:
    compute_everywhere()
    transformer_engine_on_host.install()
    transformer_engine_on_host.use_our_attention()
    in_torch = registry.primitives("torch")
    registry.primitives = lambda backend: in_torch
    plain = optimizer_offload.config

    def config(model: str, grid: str, share: float) -> Config:
        settings = plain(model, grid, share).model_dump()
        settings["model"]["fusions"] = ["gradient_accumulation"]
        return Config.model_validate(settings)

    optimizer_offload.config = config
    optimizer_offload.assert_equal = assert_near
    optimizer_offload.pretend_to_have_a_gpu = lambda: None
    optimizer_offload.main()


if __name__ == "__main__":
    main()
