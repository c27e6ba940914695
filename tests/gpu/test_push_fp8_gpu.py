"""A trainer's parameters quantized to FP8 on a GPU: the same bits as on the CPU."""

import pytest
import torch

from megatron_r1.models.weights.splits import Piece
from megatron_r1.push.matching.regions import Region
from megatron_r1.push.parameter_regions import EncodedRegions, ParameterRegion


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_and_scales_are_those_of_the_cpu(dtype):
    # A fused parameter: the tensor asked for is its rows from 384 on, and a part of those.
    parameter = torch.randn(384 + 640, 1000) * torch.logspace(-4, 3, 1000)
    parameter = parameter.to(dtype)
    piece, region = Piece("w", 0, 128, 384, 640), Region(256, 768, 128, 1000)

    def encoded(device):
        part = ParameterRegion(parameter.to(device), piece, region)
        values = EncodedRegions([(part, "codes"), (part, "scales")])
        return values[0].cpu().view(torch.uint8), values[1].cpu()

    for ours, expected in zip(encoded("cuda"), encoded("cpu"), strict=True):
        assert torch.equal(ours, expected)
