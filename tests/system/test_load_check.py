"""What is noticed of a load that does not do what it should, on a layer without vLLM's kernels."""

import pytest
import torch

from megatron_r1.engines.plugin import load_check
from megatron_r1.engines.plugin.loader_copies import CheckpointParameter
from megatron_r1.engines.plugin.memory_layout import PlacedParameter
from megatron_r1.push.control_messages import UnusedPush

NAMES = ["small", "large", "larger", "live"]


class World:
    """Four layers of a tensor each, two of them above `SMALL_BYTES`, and what has arrived."""

    def __init__(self):
        rows = {"small": 2, "large": 8, "larger": 16, "live": 2}
        self.layers = {name: torch.nn.Module() for name in NAMES}
        self.placed = []
        for number, (name, layer) in enumerate(self.layers.items()):
            tensor = torch.zeros(rows[name], 4)
            layer.register_buffer("weight", tensor)
            is_live = name == "live"
            shape, stride = tuple(tensor.shape), tensor.stride()
            at = CheckpointParameter(layer, "weight", name, shape, stride, tensor.dtype, is_live)
            self.placed.append(PlacedParameter(at, 256 * number, rows[name]))
        self.memory = torch.zeros(1024, dtype=torch.uint8)
        # Two copies into `large`: slots 1 and 2.
        self.owners = [self.placed[0], self.placed[1], *self.placed[1:]]
        self.check = load_check.LoadCheck(self.owners)

    def push(self, number, changed, loaded):
        """Slots whose values are others than before, and names that the engine loads."""
        for slot in changed:
            self.owners[slot].value(self.memory).add_(1)
        self.check.before_load(set(changed))
        for at in self.placed:
            if at.parameter.title in loaded:
                value = at.value(self.memory)
                # As a kernel's form may be: other rows first.
                at.parameter.layer.weight.copy_(value if at.parameter.is_live else value.flip(0))
        self.check.after_load(number, self.placed, self.memory)


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(load_check, "SMALL_BYTES", 64)
    monkeypatch.setattr(load_check, "CPU_BYTES", 256)
    return World()


def test_a_load_of_what_changed_passes(world):
    for number in range(1, 6):
        world.push(number, [0, 1, 3, 4], NAMES)
    world.push(6, [], [])  # nothing has changed, as while a critic warms up


@pytest.mark.parametrize("old", ["small", "live"])
def test_a_small_tensor_that_stays_old_is_named_at_once(world, old):
    world.push(1, [0, 1, 2, 3, 4], NAMES)
    with pytest.raises(UnusedPush, match=f"push 2: 1 tensors .* with: {old}$"):
        world.push(2, [0, 4], {"small", "live"} - {old})


def test_a_live_tensor_with_other_values_is_named(world):
    world.layers["live"].weight.fill_(0.5)
    with pytest.raises(UnusedPush, match="with: live$"):
        world.push(1, [0], NAMES[:3])


def test_large_tensors_take_turns(world):
    """256 bytes: one of 128 and one of 256 do not fit into one push."""
    world.push(1, [1, 3], NAMES)
    world.push(2, [1, 3], {"larger"})  # which has its turn
    with pytest.raises(UnusedPush, match="with: large$"):
        world.push(3, [1, 3], {"larger"})


class Blocks:
    """A layer of FP8 codes with the scales of their blocks, as a kernel holds them.

    Args:
        as_they_arrive: whether the kernel keeps scales so; else it has their negatives."""

    def __init__(self, as_they_arrive):
        self.sign = 1 if as_they_arrive else -1
        self.layer, self.placed = torch.nn.Module(), []
        for number, (name, dtype) in enumerate(
            (("weight", torch.float8_e4m3fn), ("weight_scale_inv", torch.float32))
        ):
            tensor = torch.ones(2, 4).to(dtype)
            self.layer.register_buffer(name, tensor)
            shape, stride = tuple(tensor.shape), tensor.stride()
            at = CheckpointParameter(self.layer, name, name, shape, stride, dtype, is_live=False)
            self.placed.append(PlacedParameter(at, 256 * number, 2))
        self.memory = torch.zeros(1024, dtype=torch.uint8)
        self.check = load_check.LoadCheck(self.placed)

    def push(self, number, code, scale, *, loads_scales=True):
        """Codes and scales that are others than before; the engine always loads the codes."""
        codes, scales = (at.value(self.memory) for at in self.placed)
        codes.copy_(torch.full((2, 4), code))
        scales.fill_(scale)
        self.check.before_load({0, 1})
        self.layer.weight.copy_(codes)
        if loads_scales:
            self.layer.weight_scale_inv.copy_(self.sign * scales)
        self.check.after_load(number, self.placed, self.memory)


@pytest.mark.parametrize("as_they_arrive", [True, False])
def test_scales_of_the_push_before_are_named_where_the_codes_are_new(as_they_arrive):
    """By as little as an update changes them; of another form, by no less than a power of two."""
    blocks = Blocks(as_they_arrive)
    old, new = (0.01, 0.01 * (1 + 2e-6)) if as_they_arrive else (2.0**-7, 2.0**-6)
    blocks.push(1, 8.0, old)
    with pytest.raises(UnusedPush, match="push 2: 1 tensors .* with: weight_scale_inv$"):
        blocks.push(2, 9.0, new, loads_scales=False)
    blocks.push(3, 10.0, new)


def test_scales_of_another_form_may_round_a_change_away():
    blocks = Blocks(as_they_arrive=False)
    blocks.push(1, 8.0, 0.01)
    blocks.push(2, 9.0, 0.0100001, loads_scales=False)


def test_a_tensor_that_vllm_keeps_elsewhere_is_passed_over(world):
    world.layers["small"].weight = torch.empty(0)
    world.push(1, [0], [])
