"""Section fp8 of a recipe: its defaults, what is refused, and Megatron's fields on a GPU."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer.transformer_config import TransformerConfig
from refusals import refused

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import FP8Config, parse_recipe
from megatron_r1.models.fp8 import E5M2, check_sizes, find_fp8_recipe
from megatron_r1.models.fp8_checks import check_fp8_device, transformer_engine_fp8_fields


def test_defaults_of_each_recipe():
    chosen = {
        name: (FP8Config(recipe=name).gradient_format, FP8Config(recipe=name).scale_kind)
        for name in ("blockwise", "tensorwise", "mxfp8")
    }
    # Transformer Engine's: Float8BlockScaling, Float8CurrentScaling, MXFP8BlockScaling.
    assert chosen == {
        "blockwise": ("e4m3", "power_of_two"),
        "tensorwise": ("e5m2", "float32"),
        "mxfp8": ("e4m3", "power_of_two"),
    }
    assert find_fp8_recipe(FP8Config()) is None
    assert find_fp8_recipe(FP8Config(recipe="blockwise", format="hybrid")).gradient_dtype == E5M2


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"recipe": "delayed"}, "fp8.recipe"),
        ({"recipe": "mxfp8", "scales": "float32"}, "fp8.scales"),
        ({"format": "e5m2"}, "fp8.format"),
    ],
)
def test_a_wrong_setting_is_refused(settings, key):
    with pytest.raises(UserError, match=key):
        parse_recipe({"fp8": settings})


@pytest.mark.parametrize(
    ("settings", "capability", "cuda", "shows"),
    [
        ({"recipe": "blockwise"}, (8, 0), (12, 9), "9.0"),
        ({"recipe": "blockwise"}, (9, 0), (12, 8), "12.8"),
        ({"recipe": "blockwise", "scales": "float32"}, (10, 0), (13, 0), "power_of_two"),
        ({"recipe": "tensorwise"}, (8, 0), (12, 9), "8.9"),
        ({"recipe": "mxfp8"}, (9, 0), (12, 9), "10.x"),
        ({"recipe": "mxfp8"}, (12, 0), (13, 0), "10.x"),
    ],
)
def test_hardware_that_cannot_is_named_before_anything_is_built(settings, capability, cuda, shows):
    key = "fp8.scales" if "scales" in settings else "fp8.recipe"
    with refused(key, Cause.UNSUPPORTED, shows):
        check_fp8_device(FP8Config(**settings), capability, cuda)


def test_hardware_that_can_is_accepted():
    check_fp8_device(FP8Config(recipe="blockwise"), (9, 0), (12, 9))
    check_fp8_device(FP8Config(recipe="blockwise", scales="float32"), (9, 0), (13, 0))
    check_fp8_device(FP8Config(recipe="tensorwise"), (8, 9), (12, 1))
    check_fp8_device(FP8Config(recipe="mxfp8"), (10, 3), (13, 0))


@pytest.fixture
def hopper(monkeypatch):
    """A machine that reports a Hopper GPU, without Transformer Engine."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.9")


def fake_engine(monkeypatch, **power_of_two):
    """transformer_engine.common.recipe with the recipes named, and their default scales."""
    recipe = ModuleType("transformer_engine.common.recipe")
    for name, value in power_of_two.items():
        inputs = SimpleNamespace(power_2_scale=value)
        setattr(recipe, name, lambda inputs=inputs: SimpleNamespace(fp8_quant_fwd_inp=inputs))
    common = ModuleType("transformer_engine.common")
    common.recipe = recipe
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.common", common)
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipe)


def test_transformer_engine_has_to_be_there_and_new_enough(hopper, monkeypatch):
    with refused("fp8.recipe", Cause.NOT_INSTALLED):
        transformer_engine_fp8_fields(FP8Config(recipe="blockwise"))
    fake_engine(monkeypatch, Float8CurrentScaling=False)
    with refused("fp8.recipe", Cause.NOT_INSTALLED, "Float8BlockScaling"):
        transformer_engine_fp8_fields(FP8Config(recipe="blockwise"))


def test_scales_that_the_environment_decides_are_compared_with_the_recipe(hopper, monkeypatch):
    fake_engine(monkeypatch, Float8BlockScaling=True)
    with refused("fp8.scales", Cause.CONFLICT, "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1"):
        transformer_engine_fp8_fields(FP8Config(recipe="blockwise", scales="float32"))
    fake_engine(monkeypatch, Float8BlockScaling=False)
    with refused("fp8.scales", Cause.CONFLICT, "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0"):
        transformer_engine_fp8_fields(FP8Config(recipe="blockwise"))


@pytest.mark.parametrize(
    ("settings", "format"),
    [
        ({"recipe": "blockwise"}, "e4m3"),
        ({"recipe": "blockwise", "format": "hybrid"}, "hybrid"),
        ({"recipe": "tensorwise"}, "hybrid"),
    ],
)
def test_megatron_accepts_the_fields(hopper, monkeypatch, settings, format):
    fake_engine(monkeypatch, Float8BlockScaling=True, Float8CurrentScaling=False)
    fields = transformer_engine_fp8_fields(FP8Config(**settings))
    made = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, bf16=True, **fields
    )
    assert made.fp8 == format
    assert Fp8Recipe(made.fp8_recipe).value == settings["recipe"]
    assert not made.fp8_dot_product_attention and not made.fp8_param


def test_a_size_the_matrix_units_cannot_take_is_named():
    class Layer(torch.nn.Module):
        def __init__(self, rows, columns):
            super().__init__()
            self.linear_fc1 = torch.nn.Linear(columns, rows, bias=False)
            self.router = torch.nn.Linear(columns, 7, bias=False)  # not FP8

    blockwise = find_fp8_recipe(FP8Config(recipe="blockwise"))
    check_sizes(Layer(576, 48), blockwise)  # 576 is 4.5 tiles
    with refused("fp8.recipe", Cause.INDIVISIBLE, 16, "linear_fc1.weight", (40, 48)):
        check_sizes(Layer(40, 48), blockwise)
    with refused("fp8.recipe", Cause.INDIVISIBLE, 32):
        check_sizes(Layer(576, 48), find_fp8_recipe(FP8Config(recipe="mxfp8")))
