"""FP8 made of a trainer's parameters on a GPU, on their way: the same bits as on the CPU."""

import pytest
import torch

from megatron_r1.weight_sync.plan.region import Region
from megatron_r1.weight_sync.send.source import Outgoing, Source
from megatron_r1.weights.rules import Piece

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_and_scales_are_those_of_the_cpu(dtype):
    # A fused parameter: the tensor asked for is its rows from 384 on, and a part of those.
    parameter = torch.randn(384 + 640, 1000) * torch.logspace(-4, 3, 1000)
    parameter = parameter.to(dtype)
    piece, region = Piece("w", 0, 128, 384, 640), Region(256, 768, 128, 1000)

    def made(device):
        source = Source(parameter.to(device), piece, region)
        values = Outgoing([(source, "codes"), (source, "scales")])
        return values[0].cpu().view(torch.uint8), values[1].cpu()

    for ours, expected in zip(made("cuda"), made("cpu"), strict=True):
        assert torch.equal(ours, expected)
