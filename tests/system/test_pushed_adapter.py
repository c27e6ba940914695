"""What is noticed of a pushed adapter that vLLM's layers do not compute with, and of one that vLLM
cannot serve; on layers without a model. test_adapter_push.py has whole engines."""

from types import SimpleNamespace

import pytest
import torch

from megatron_r1.engines.plugin.pushed_adapter import REQUEST, PushedAdapter
from megatron_r1.push.control_messages import AdapterSettings, UnusedPush
from megatron_r1.push.slots import slot_view

RANK, SIZE = 2, 6
CONFIG = {"r": RANK, "lora_alpha": 3.0, "target_modules": "all", "bias": "none"}
PREFIX = "model.layers.0.self_attn."
LAYERS = ("q_proj", "k_proj", "o_proj")
TENSORS = [
    (f"{PREFIX}{layer}.lora_{factor}.weight", shape)
    for layer in LAYERS
    for factor, shape in (("A", (RANK, SIZE)), ("B", (SIZE, RANK)))
]


class Engine:
    """Layers as vLLM's, the first with q_proj and k_proj in it, and a manager that loads all but
    `left_out` of an adapter."""

    def __init__(self, left_out=""):
        self.left_out = left_out
        stacked = {name: self._layer(count) for name, count in (("qkv_proj", 2), ("o_proj", 1))}
        self._adapter_manager = SimpleNamespace(
            model=None,
            device=torch.device("cpu"),
            modules={PREFIX + name: layer for name, layer in stacked.items()},
            packed_modules={f"{PREFIX}qkv_proj": [f"{PREFIX}q_proj", f"{PREFIX}k_proj"]},
            lora_index_to_id=[REQUEST.lora_int_id],
        )
        self.places = {
            f"{PREFIX}q_proj": (stacked["qkv_proj"], 0),
            f"{PREFIX}k_proj": (stacked["qkv_proj"], 1),
            f"{PREFIX}o_proj": (stacked["o_proj"], 0),
        }
        self.lora_config = SimpleNamespace(max_lora_rank=4, lora_dtype=torch.float32)

    def _layer(self, count):
        a, b = torch.zeros(1, 1, 4, SIZE), torch.zeros(1, 1, SIZE, 4)
        return SimpleNamespace(
            tp_size=1,
            lora_a_stacked=[a.clone() for _ in range(count)],
            lora_b_stacked=[b.clone() for _ in range(count)],
        )

    def add_adapter(self, request):
        assert request == REQUEST and request.load_inplace
        for name, weights in self.pushed.model().loras.items():
            weights.optimize()
            layer, index = self.places[name]
            if not name.endswith(self.left_out or "nothing"):
                layer.lora_a_stacked[index][0, 0, :RANK] = weights.lora_a
                layer.lora_b_stacked[index][0, 0, :, :RANK] = weights.lora_b


def pushed_to(engine, seed=0):
    """Return the engine's adapter after a push of random factors, and these."""
    adapter = PushedAdapter(engine, AdapterSettings("base_model.model.", CONFIG), TENSORS)
    draw = torch.Generator().manual_seed(seed)
    memory = torch.zeros(adapter.table.num_bytes, dtype=torch.uint8)
    factors = {}
    for slot in adapter.table.slots:
        factors[slot.name] = torch.randn(slot.height, slot.width, generator=draw)
        slot_view(memory, slot).copy_(factors[slot.name])
    adapter.load(memory)
    return adapter, factors, memory


def test_the_layers_compute_with_what_arrived_as_often_as_it_is_loaded():
    engine = Engine()
    adapter, factors, memory = pushed_to(engine)
    assert list(factors) == [name for name, _ in TENSORS]
    for push in (1, 2):  # the scale is in B, and in neither the memory nor the kept factors
        adapter.check(push)
        layer, index = engine.places[f"{PREFIX}k_proj"]
        b = layer.lora_b_stacked[index][0, 0, :, :RANK]
        assert torch.equal(b, 1.5 * factors[f"{PREFIX}k_proj.lora_B.weight"])
        adapter.load(memory)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_keeps_its_old_factors_is_named(layer):
    adapter, _, _ = pushed_to(Engine(left_out=layer))
    with pytest.raises(UnusedPush, match=rf"push 7: 2 tensors .*{layer}.lora_A"):
        adapter.check(7)


def test_an_adapter_that_is_not_active_is_noticed():
    engine = Engine()
    adapter, _, _ = pushed_to(engine)
    engine._adapter_manager.lora_index_to_id = [None]
    with pytest.raises(UnusedPush, match="6 tensors"):
        adapter.check(1)


def test_layers_of_other_stages_get_no_slots():
    engine = Engine()
    del engine._adapter_manager.modules[f"{PREFIX}o_proj"]
    adapter = PushedAdapter(engine, AdapterSettings("base_model.model.", CONFIG), TENSORS)
    assert not [slot.name for slot in adapter.table.slots if "o_proj" in slot.name]
    assert len(adapter.table.slots) == 4


def test_a_rank_above_the_engine_s_and_an_adapter_before_any_push_are_errors():
    with pytest.raises(ValueError, match="rank 5 is greater"):
        PushedAdapter(Engine(), AdapterSettings("", CONFIG | {"r": 5}), TENSORS)
    adapter = PushedAdapter(Engine(), AdapterSettings("", CONFIG), TENSORS)
    with pytest.raises(RuntimeError, match="no push"):
        adapter.model()
