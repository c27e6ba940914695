"""Choices of kernels, as Megatron's own configuration has them in the end."""

import sys
from types import ModuleType

import pytest
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe import fused_a2a, moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from refusals import refused
from small_configs import DEEPSEEK, QWEN

from megatron_r1 import models
from megatron_r1.base.errors import Cause
from megatron_r1.config import parse_recipe
from megatron_r1.models import megatron_config as acceleration
from megatron_r1.models import platform
from megatron_r1.models.attention_choice import BACKEND_VARIABLES

FUSED = (
    *("fused_permute", "fused_permute_with_probs", "fused_unpermute"),
    *("fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs"),
)


def config_of(hf_config, model=None, parallel=None):
    """Return the fields that depend on the choices, of Megatron's configuration."""
    recipe = parse_recipe({"model": model or {}, "parallel": parallel or {}})
    config = models.transformer_config(hf_config, recipe)
    assert isinstance(config, TransformerConfig)
    return {
        "attention": config.attention_backend,
        "gradients": config.gradient_accumulation_fusion,
        "activation": config.bias_activation_fusion,
        "permute": config.moe_permute_fusion,
        "dispatcher": config.moe_token_dispatcher_type,
    }


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, Transformer Engine, DeepEP and flash-attn."""
    monkeypatch.setattr(platform, "_REAL_CUDA", True)
    monkeypatch.setattr(acceleration, "find_spec", lambda name: name == "flash_attn")
    monkeypatch.setattr(fused_a2a, "HAVE_DEEP_EP", True)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in FUSED:
        monkeypatch.setattr(moe_utils, name, object(), raising=False)
    for variable in BACKEND_VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


def test_a_cpu_has_none_of_them():
    plain = {"attention": AttnBackend.auto, "gradients": False, "activation": False}
    plain |= {"permute": False, "dispatcher": "alltoall"}
    assert config_of(DEEPSEEK) == config_of(QWEN) == plain
    assert config_of(DEEPSEEK, {"fusions": []}) == plain


@pytest.mark.parametrize(
    ("section", "key", "value", "cause"),
    [
        ("model", "attention_backend", "flash", Cause.UNSUPPORTED),
        ("model", "fusions", ["permute"], Cause.UNSUPPORTED),
        ("parallel", "dispatcher", "flex", Cause.NOT_INSTALLED),
    ],
)
def test_a_choice_that_a_cpu_cannot_do_is_an_error_that_names_it(section, key, value, cause):
    with refused(f"{section}.{key}", cause):
        config_of(DEEPSEEK, **{section: {key: value}})


@pytest.mark.usefixtures("gpu")
def test_a_gpu_fuses_gradients_and_permutations_by_default():
    found = config_of(DEEPSEEK)
    assert found == {
        "attention": AttnBackend.auto,
        "gradients": True,
        "activation": False,
        "permute": True,
        "dispatcher": "alltoall",
    }
    assert config_of(QWEN) == found | {"permute": False}, "it has no experts"
    assert config_of(DEEPSEEK, {"fusions": []}) == found | {"gradients": False, "permute": False}
    both = ["activation", "permute"]
    assert config_of(DEEPSEEK, {"fusions": both}) == found | {
        "gradients": False,
        "activation": True,
    }


@pytest.mark.usefixtures("gpu")
def test_backend_and_dispatcher_arrive():
    for name in ("auto", "flash", "fused", "unfused"):
        assert config_of(QWEN, {"attention_backend": name})["attention"] is AttnBackend[name]
    flex = {"dispatcher": "flex", "expert": 2}
    assert config_of(DEEPSEEK, parallel=flex)["dispatcher"] == "flex"
    assert config_of(QWEN, parallel={"dispatcher": "flex"})["dispatcher"] == "alltoall"


@pytest.mark.usefixtures("gpu")
def test_what_is_not_installed_or_contradicts_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(acceleration, "find_spec", lambda name: None)
    with refused("model.attention_backend", Cause.NOT_INSTALLED, "flash-attn"):
        config_of(QWEN, {"attention_backend": "flash"})
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    with refused(
        "model.attention_backend", Cause.CONFLICT, "NVTE_FUSED_ATTN=1", "NVTE_FUSED_ATTN=0"
    ):
        config_of(QWEN)
    monkeypatch.delenv("NVTE_FUSED_ATTN")
    with refused("parallel.dispatcher", Cause.CONFLICT, "parallel.expert"):
        config_of(DEEPSEEK, parallel={"dispatcher": "flex"})
    monkeypatch.setattr(fused_a2a, "HAVE_DEEP_EP", False)
    with refused("parallel.dispatcher", Cause.NOT_INSTALLED, "deep_ep"):
        config_of(DEEPSEEK, parallel={"dispatcher": "flex", "expert": 2})
    monkeypatch.setattr(moe_utils, "fused_permute", None)
    with refused("model.fusions", Cause.NOT_INSTALLED, "permute"):
        config_of(DEEPSEEK)
