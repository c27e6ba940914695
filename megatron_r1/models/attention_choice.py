"""Which attention Transformer Engine takes on this GPU, asked of it before the first step.

`get_attention_backend` is the function that Transformer Engine calls for every new shape. It
answers with a backend, and logs why it left out another; cuDNN is asked whether it supports a
kernel, and compiles none. Importing this module needs neither Megatron nor Transformer Engine."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config, infer_verb
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.loaded_libraries import loaded_libraries

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

BACKEND_VARIABLES = {
    "flash": "NVTE_FLASH_ATTN",
    "fused": "NVTE_FUSED_ATTN",
    "unfused": "NVTE_UNFUSED_ATTN",
}
"""Backend → the variable by which Megatron allows it to Transformer Engine."""
BACKENDS = ("fused", "flash", "unfused", "none")
"""From the best to the worst."""
ATTENTION_LIBRARIES = ("cuDNN", "NVRTC")
"""cuDNN compiles attention with NVRTC, and loads it when it is first asked."""
MAX_PLAIN_TOKENS = 8_192
"""Plain products hold a score for each two tokens of a sample: in bf16 4 GiB for 32 heads."""


class AttentionChoice(NamedTuple):
    """Transformer Engine's answer."""

    backend: str
    """fused (cuDNN), flash (flash-attn), unfused (plain products) or none"""
    reason: str
    """its own words for not taking fused, or flash where that is the setting"""

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})" if self.reason else self.backend


def backend_variables(setting: str) -> dict[str, str]:
    """Return the values of `BACKEND_VARIABLES` for a `model.attention_backend`."""
    return {
        variable: str(int(setting in ("auto", name)))
        for name, variable in BACKEND_VARIABLES.items()
    }


def longest_sample(config: Config, hf_config: HFConfig) -> int:
    """Return the tokens of the longest sample that a recipe names, at any step of its schedule."""
    limit = hf_config["max_position_embeddings"]
    if infer_verb(config) == "reward-model":
        return config.reward_model.max_tokens or limit
    rollouts = [part.rollout for _, part in config.schedule_parts()]
    # Behind a prompt of a token at least.
    return min(limit, max(each.max_model_len or each.max_response_tokens + 1 for each in rollouts))


def attention_parameters(
    config: Config, model: TransformerConfig, longest: int
) -> list[dict[str, Any]]:
    """Return the `AttentionParams` that Megatron's attention hands to Transformer Engine's choice,
    for each kind of layer and pass; the micro-batch has the longest sample and another.

    Args:
        config: the recipe.
        model: Megatron's configuration of the model.
        longest: tokens of the longest sample."""
    from megatron.core.models.common.embeddings import _yarn_get_mscale
    from megatron.core.transformer.utils import is_layer_window_attention

    tensor, context = config.parallel.tensor, config.parallel.context
    longest += -longest % (2 * context if context > 1 else 1)
    tokens = max(longest, config.parallel.microbatch_tokens) // context
    key_size = value_size = model.kv_channels
    scale = 1 / math.sqrt(key_size)
    if model.multi_latent_attention:
        key_size, value_size = model.qk_head_dim + model.qk_pos_emb_head_dim, model.v_head_dim
        mscale = _yarn_get_mscale(model.rotary_scaling_factor, model.mscale_all_dim)
        scale = mscale * mscale / math.sqrt(key_size)
    shared = {
        "qkv_dtype": model.params_dtype,
        "qkv_layout": "thd_thd_thd",
        "batch_size": 2,
        "num_heads": model.num_attention_heads // tensor,
        "num_gqa_groups": model.num_query_groups // tensor,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
        "num_tokens_q": tokens,
        "head_dim_qk": key_size,
        "head_dim_v": value_size,
        "softmax_type": model.softmax_type,
        "softmax_scale": scale,
        "core_attention_bias_requires_grad": False,
        "context_parallel": context > 1,
        "cp_size": context,
        # As Transformer Engine's module: of one parameter, and of torch.
        "deterministic": os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0"
        or torch.are_deterministic_algorithms_enabled(),
    }
    masks = [("padding_causal", tokens)]
    if config.parallel.share_prompts:  # `models.te_prefix_attention`
        masks.append(("padding_causal_bottom_right", tokens + longest))
    windows = {
        is_layer_window_attention(model.window_size, model.window_attn_skip_freq, number + 1)
        for number in range(model.num_layers)
    }
    return [
        shared
        | {
            "is_training": is_training,
            "attn_mask_type": mask,
            "bottom_right_diagonal": mask.endswith("bottom_right"),
            "num_tokens_kv": num_keys,
            "window_size": tuple(model.window_size) if has_window else (-1, 0),
        }
        for is_training, (mask, num_keys), has_window in product((True, False), masks, windows)
    ]


def check_attention(config: Config, model: TransformerConfig, longest: int) -> AttentionChoice:
    """Return the worst of Transformer Engine's answers for a recipe.

    Args:
        config: the recipe.
        model: Megatron's configuration of the model.
        longest: tokens of the longest sample.

    Raises:
        UserError: it has no attention for them, or plain products that were not asked for."""
    setting = config.model.attention_backend
    choices = [
        choose_attention(each, setting) for each in attention_parameters(config, model, longest)
    ]
    worst = max(choices, key=lambda choice: BACKENDS.index(choice.backend))
    are_plain_fine = setting == "unfused" or longest <= MAX_PLAIN_TOKENS
    if worst.backend in ("fused", "flash") or (worst.backend == "unfused" and are_plain_fine):
        return worst
    gib = 2 * longest**2 * model.num_attention_heads / config.parallel.tensor / 2**30
    libraries = ", ".join(map(str, loaded_libraries(*ATTENTION_LIBRARIES)))
    raise UserError(
        f"model.attention_backend: {setting} has no fused attention on this GPU for samples of "
        f"{longest:,} tokens. Transformer Engine's reason: {worst.reason}. Loaded: {libraries}. "
        "docs/gpu.md#attention says what to look for; with unfused, plain products hold "
        f"{gib:,.1f} GiB of scores in each layer",
        key="model.attention_backend",
        cause=Cause.UNSUPPORTED,
    )


def choose_attention(parameters: Mapping[str, Any], setting: str = "auto") -> AttentionChoice:
    """Return what Transformer Engine takes on this GPU for these fields of its `AttentionParams`,
    with `setting` as `model.attention_backend`."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    # Another version, of which a start only warns, may choose by fewer fields.
    fields = {field.name for field in dataclasses.fields(utils.AttentionParams)}
    known_parameters = {name: value for name, value in parameters.items() if name in fields}
    with _allowed(setting), _collected_messages(utils) as messages:
        answer = utils.get_attention_backend(utils.AttentionParams(**known_parameters))
    flash, _, fused, _, unfused, _ = answer
    if fused:
        return AttentionChoice("fused", "")
    backend = "flash" if flash else "unfused" if unfused else "none"
    kernel = "FlashAttention" if setting == "flash" else "FusedAttention"
    return AttentionChoice(backend, "" if flash else why_not(kernel, messages))


def why_not(kernel: str, messages: Iterable[str]) -> str:
    """Return the reasons that Transformer Engine has logged for leaving out FusedAttention or
    FlashAttention, each once; of cuDNN's, which name every engine that it tried, the beginning."""
    pattern = rf"Disabling (?:{kernel}(?: \d)?|all backends)\b:?\s*(.+)"
    matches = (re.search(pattern, message, re.DOTALL) for message in messages)
    reasons = (textwrap.shorten(match[1], 400, placeholder=" …") for match in matches if match)
    return "; ".join(dict.fromkeys(reasons))


@contextmanager
def _allowed(setting: str) -> Iterator[None]:
    """Set the variables of a `model.attention_backend` as Megatron does when it builds a model."""
    before = {variable: os.environ.get(variable) for variable in BACKEND_VARIABLES.values()}
    os.environ.update(backend_variables(setting))
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value


@contextmanager
def _collected_messages(utils: Any) -> Iterator[list[str]]:
    """Collect all messages of Transformer Engine's choice; it prints those that it would have."""
    messages: list[str] = []
    logger, level = logging.getLogger("DotProductAttention"), utils.AttentionLogging._log_level

    def collect(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return record.levelno >= level

    # It sets the logger's level to this one in every call.
    utils.AttentionLogging._log_level = logging.DEBUG
    logger.addFilter(collect)
    try:
        yield messages
    finally:
        logger.removeFilter(collect)
        utils.AttentionLogging._log_level = level
        logger.setLevel(level)
