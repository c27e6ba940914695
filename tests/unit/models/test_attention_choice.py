"""Transformer Engine's choice of attention, by a stand-in that logs as it does."""

import logging
import os
import sys
from copy import copy
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
from refusals import refused
from small_configs import DEEPSEEK, QWEN

from megatron_r1 import models
from megatron_r1.base.errors import Cause
from megatron_r1.config import Config, parse_recipe
from megatron_r1.models.attention_choice import (
    AttentionChoice,
    attention_parameters,
    check_attention,
    choose_attention,
    longest_sample,
    why_not,
)

PREFIX = "transformer_engine.pytorch.attention.dot_product_attention"
CUDNN = "Known cuDNN < 9.26.0 issue with THD learnable softmax backward. Please upgrade cuDNN."
# Here, so that Megatron is imported without the stand-in.
MODEL = models.transformer_config(QWEN, Config())


@dataclass
class AttentionParams:
    """With fewer fields than the installed one's, as another version's."""

    softmax_type: str = "vanilla"
    is_training: bool = True


@pytest.fixture
def transformer_engine(monkeypatch):
    """A module that refuses learnable softmax as Transformer Engine 2.20.2 with cuDNN 9.20."""
    module = ModuleType(f"{PREFIX}.utils")
    module.AttentionParams = AttentionParams
    module.AttentionLogging = SimpleNamespace(_log_level=logging.WARNING)

    def get_attention_backend(parameters):
        logger = logging.getLogger("DotProductAttention")
        logger.setLevel(module.AttentionLogging._log_level)
        logger.debug("Running with config=%s", {})
        fused, unfused = (os.environ[f"NVTE_{name}_ATTN"] == "1" for name in ("FUSED", "UNFUSED"))
        if not fused:
            logger.debug("Disabling FusedAttention due to NVTE_FUSED_ATTN=0")
        elif parameters.softmax_type == "learnable" and parameters.is_training:
            logger.debug("Disabling FusedAttention: %s%s", CUDNN.replace(". ", ".\n"), "")
            fused = False
            logger.warning("Please install flash-attn")
        return False, None, fused, 1 if fused else None, unfused and not fused, []

    module.get_attention_backend = get_attention_backend
    names = PREFIX.split(".")
    for number in range(1, len(names) + 1):
        package = ModuleType(".".join(names[:number]))
        monkeypatch.setitem(sys.modules, package.__name__, package)
    package.utils = module
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("transformer_engine")
def test_the_choice_has_transformer_engines_own_reason(monkeypatch, caplog):
    monkeypatch.setenv("NVTE_FUSED_ATTN", "1")
    monkeypatch.delenv("NVTE_FLASH_ATTN", raising=False)
    sinks = {"softmax_type": "learnable"}
    assert choose_attention({}) == choose_attention({}, "fused") == AttentionChoice("fused", "")
    assert choose_attention(sinks) == AttentionChoice("unfused", CUDNN)
    assert choose_attention(sinks, "fused") == AttentionChoice("none", CUDNN)
    asked = choose_attention({}, "unfused")
    assert asked == AttentionChoice("unfused", "due to NVTE_FUSED_ATTN=0")
    assert os.environ["NVTE_FUSED_ATTN"] == "1" and "NVTE_FLASH_ATTN" not in os.environ
    assert {record.levelno for record in caplog.records} == {logging.WARNING}, "as without us"


@pytest.mark.usefixtures("transformer_engine")
def test_plain_products_are_refused_for_long_samples_that_did_not_ask_for_them():
    model = copy(MODEL)
    model.softmax_type = "learnable"

    def ask(backend, longest):
        config = parse_recipe({"model": {"attention_backend": backend}, "parallel": {"tensor": 2}})
        return check_attention(config, model, longest)

    assert ask("auto", 8192) == AttentionChoice("unfused", CUDNN), "in training"
    with refused("model.attention_backend", Cause.UNSUPPORTED, CUDNN, "8,194 tokens"):
        ask("auto", 8194)
    with refused("model.attention_backend", Cause.UNSUPPORTED, CUDNN):
        ask("fused", 64)
    assert ask("unfused", 8194).backend == "unfused"


def test_the_parameters_are_those_of_a_rank_and_its_longest_sample():
    config = parse_recipe({"parallel": {"tensor": 2, "context": 2, "tokens_per_microbatch": 64}})
    model = models.transformer_config(DEEPSEEK, Config())
    training, scoring = attention_parameters(config, model, 101)
    assert training | {"is_training": False} == scoring
    heads = DEEPSEEK["num_attention_heads"] // 2
    assert (training["num_heads"], training["num_gqa_groups"]) == (heads, heads)
    sizes = DEEPSEEK["qk_nope_head_dim"] + DEEPSEEK["qk_rope_head_dim"], DEEPSEEK["v_head_dim"]
    assert (training["head_dim_qk"], training["head_dim_v"]) == sizes
    # A multiple of twice the context ranks, which have half of the tokens each.
    assert (training["max_seqlen_q"], training["num_tokens_q"]) == (104, 52)
    shared = config.with_changes(parallel={"share_prompts": True, "context": 1})
    masks = [each["attn_mask_type"] for each in attention_parameters(shared, model, 101)]
    assert masks == 2 * ["padding_causal", "padding_causal_bottom_right"]


@pytest.mark.parametrize(
    ("recipe", "longest"),
    [
        ({"rollout": {"max_response_tokens": 300}}, 301),
        ({"rollout": {"max_response_tokens": 300, "max_model_len": 400}}, 400),
        ({"rl": {"schedule": [{"from_step": 5, "rollout.max_response_tokens": 65536}]}}, 50_000),
        ({"model": {"head": "score"}}, 50_000),
        ({"model": {"head": "score"}, "reward_model": {"max_tokens": 200}}, 200),
    ],
)
def test_the_longest_sample_is_that_of_any_step(recipe, longest):
    assert longest_sample(parse_recipe(recipe), {"max_position_embeddings": 50_000}) == longest


def test_reasons_are_read_from_lines_of_a_log_each_once():
    prefix = "[DEBUG    | DotProductAttention]: Disabling"
    lines = [
        "[DEBUG    | DotProductAttention]: Running with config={'cudnn_version': '9.19.0'}",
        f"{prefix} FusedAttention: {CUDNN}",
        f"{prefix} FlashAttention for softmax_type = learnable",
        f"{prefix} FusedAttention as MLA is not supported with qkv_layout = t3hd.",
        f"{prefix} all backends for pad_between_seqs = True and KV caching",
    ]
    assert why_not("FusedAttention", 2 * lines) == (
        f"{CUDNN}; as MLA is not supported with qkv_layout = t3hd.; "
        "for pad_between_seqs = True and KV caching"
    )
