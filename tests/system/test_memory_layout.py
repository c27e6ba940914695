"""Where parameters lie in the receive buffer: a view shows what was written by the table."""

import pytest
import torch

from megatron_r1.engines.plugin.loader_copies import CheckpointParameter, LoaderCopy
from megatron_r1.engines.plugin.memory_layout import (
    GAP_BYTES,
    lay_out,
    with_gaps,
)
from megatron_r1.push.slots import slot_view

TENSORS = {
    "gate": torch.randn(4, 8).bfloat16(),
    "up": torch.randn(4, 8).bfloat16(),
    "left": torch.randn(3, 6),
    "right": torch.randn(3, 2),
    "folded": torch.randn(8, 4),
    "norm": torch.randn(8, 1),
}


def parameter(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> CheckpointParameter:
    strides = torch.empty(shape, device="meta").stride()
    return CheckpointParameter(torch.nn.Identity(), name, name, shape, strides, dtype, False)


FUSED = parameter("fused", (8, 8), torch.bfloat16)
BESIDE = parameter("beside", (3, 8), torch.float32)
FOLDED = parameter("folded", (4, 8), torch.float32)
NORM = parameter("norm", (8,), torch.float32)
COPIES = {
    FUSED: [LoaderCopy("gate", (0, 4, 0, 8), 0, 8), LoaderCopy("up", (0, 4, 0, 8), 32, 8)],
    BESIDE: [LoaderCopy("left", (0, 3, 0, 6), 0, 8), LoaderCopy("right", (0, 3, 0, 2), 6, 8)],
    FOLDED: [LoaderCopy("folded", (0, 8, 0, 4), 0, 4)],  # two rows in one
    NORM: [LoaderCopy("norm", (0, 8, 0, 1), 0, 1)],
}
EXPECTED = {
    "fused": torch.cat([TENSORS["gate"], TENSORS["up"]]),
    "beside": torch.cat([TENSORS["left"], TENSORS["right"]], 1),
    "folded": TENSORS["folded"].reshape(4, 8),
    "norm": TENSORS["norm"][:, 0],
}


@pytest.mark.parametrize("apart", [(), ("beside",), ("fused", "beside", "folded", "norm")])
def test_received_slots_are_the_parameters_with_gaps_and_without(apart):
    copies = with_gaps(COPIES, lambda at: at.name in apart)
    placed, table = lay_out(copies)
    memory = torch.full((table.num_bytes,), 77, dtype=torch.uint8)
    for slot in table.slots:
        slot_view(memory, slot).copy_(TENSORS[slot.name])
    for at in placed:
        value, name = at.value(memory), at.parameter.name
        assert torch.equal(value, EXPECTED[name]), name
        has_gaps = name in apart and name in ("fused", "beside")
        gap = GAP_BYTES // value.itemsize if has_gaps else 0
        assert value.dim() == 1 or value.stride() == (8 + gap, 1)
    kept = sum(value.numel() * value.itemsize for value in EXPECTED.values())
    rows = sum(len(EXPECTED[name]) for name in ("fused", "beside") if name in apart)
    written = kept + GAP_BYTES * rows
    assert kept <= table.num_bytes <= written + 64 * len(placed)
