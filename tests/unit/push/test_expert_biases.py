"""A kernel of experts keeps the bias tensors that it was built with."""

import torch
from torch.nn import Parameter

from megatron_r1.engines.plugin.loader_copies import load_biases


def test_received_biases_are_in_the_tensors_in_use_and_those_left_out_are_zero():
    in_use = {name: Parameter(torch.full((2, 4), 7.0)) for name in ("w13_bias", "w2_bias")}
    buffer = torch.arange(8.0).view(2, 4)
    layer = torch.nn.Module()
    for name in in_use:
        layer.register_parameter(name, Parameter(torch.empty(2, 4, device="meta")))
    load_biases(layer, {"w13_bias": buffer}, in_use)
    buffer.fill_(-1.0)  # the next window
    assert layer.w13_bias is in_use["w13_bias"] and layer.w2_bias is in_use["w2_bias"]
    assert torch.equal(layer.w13_bias, torch.arange(8.0).view(2, 4))
    assert torch.equal(layer.w2_bias, torch.zeros(2, 4))
