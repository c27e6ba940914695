"""Checks `config.json`: the fields that become Megatron's configuration, and those that are
refused. No torch or Megatron."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.attention_fields import (
    KEY_VALUE_HEADS,
    attention_divisions,
    attention_fields,
    model_arguments,
    rope_scaling,
    yarn_scaling,
)
from megatron_r1.models.config_keys import Recorded, refuse_unread
from megatron_r1.models.expert_fields import expert_divisions, expert_fields
from megatron_r1.models.hf_config import (
    is_number,
    model_family,
    need,
    num_mtp_layers,
    require,
)
from megatron_r1.models.quantization import check_quantization

if TYPE_CHECKING:
    from megatron_r1.config import ParallelConfig


_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size"),
    *("num_attention_heads", KEY_VALUE_HEADS, "head_dim", "vocab_size", "max_position_embeddings"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("num_experts_per_tok", "decoder_sparse_step"),
)
_COUNTS = (
    *("num_nextn_predict_layers", "n_routed_experts", "n_shared_experts", "first_k_dense_replace"),
    *("n_group", "topk_group"),
)
_FLAGS = ("norm_topk_prob", "tie_word_embeddings", "attention_bias", "mlp_bias", "use_qk_norm")
_FACTORS = ("routed_scaling_factor", "initializer_range")
_DTYPES = ("auto", "float64", "float32", "bfloat16", "float16", "float8_e4m3fn")
_REFUSED = {
    "context": "the ring of ranks has neither windows nor learned softmax offsets",
    "expert_tensor": "each of the ranks that share an expert would add its bias",
}


def check_supported(hf: dict) -> None:
    """Raise UserError for a model that this stack would compute differently from transformers,
    naming the key of `config.json`; unknown keys are refused too."""
    own_fields(hf)


def own_fields(hf: dict) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig in which architectures differ. Errors as
    `check_supported`."""
    _check_sizes(hf)
    hf, family = Recorded(hf), model_family(hf)
    need(hf, "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    need(hf, "vocab_size", "rms_norm_eps", "max_position_embeddings", *family.needs)
    require(hf, hidden_act="silu", attention_dropout=0.0, **family.fixed)
    check_quantization(hf)
    fields = {
        **attention_fields(hf),
        **expert_fields(hf),
        "mtp_num_layers": num_mtp_layers(hf) or None,
    }
    # For their errors, and so that what they read counts as read.
    model_arguments(hf), rope_scaling(hf), yarn_scaling(hf)
    for key in ("tie_word_embeddings", *family.inert):
        hf.get(key)
    refuse_unread(hf)
    return fields


def _check_sizes(hf: dict) -> None:
    """Raise UserError for a size that is no whole number, or zero, or a value of another type."""
    windows = ("sliding_window",) if model_family(hf).windows else ()
    for key in (*_SIZES, *windows):
        size = hf.get(key)
        if size is not None and (type(size) is not int or size < 1):
            raise UserError(
                f"config.json: {key}={size!r} must be a whole number above 0",
                key=key,
                cause=Cause.OUT_OF_RANGE,
            )
    kinds: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
        (_COUNTS, lambda value: type(value) is int and value >= 0, "a whole number"),
        (_FLAGS, lambda value: type(value) is bool, "true or false"),
        (_FACTORS, is_number, "a number"),
    )
    for keys, fits, what in kinds:
        for key in keys:
            if (value := hf.get(key)) is not None and not fits(value):
                raise UserError(
                    f"config.json: {key}={value!r} must be {what}",
                    key=key,
                    cause=Cause.MALFORMED,
                )
    epsilon = hf.get("rms_norm_eps", 1.0)
    if not isinstance(epsilon, float) or not 0 < epsilon < inf:
        raise UserError(
            f"config.json: rms_norm_eps={epsilon!r} must be a number above 0, written with a "
            "decimal point or exponent",
            key="rms_norm_eps",
            cause=Cause.OUT_OF_RANGE,
        )
    for key in ("dtype", "torch_dtype"):
        if (dtype := hf.get(key)) is not None and dtype not in _DTYPES:
            raise UserError(
                f"config.json: {key}={dtype!r} is no type of weights; write what they are, such as "
                '"bfloat16"',
                key=key,
                cause=Cause.UNKNOWN,
            )


def check_divisions(hf: dict, parallel: ParallelConfig, transformer_engine: bool) -> None:
    """Raise UserError for sizes of `parallel` that do not divide the model, or that only experts
    could have."""
    for key in () if hf.get("n_routed_experts") else ("expert", "expert_tensor"):
        if (ranks := getattr(parallel, key)) > 1:
            raise UserError(
                f"parallel.{key}={ranks} needs a model with experts; use 1",
                key=f"parallel.{key}",
                cause=Cause.CONFLICT,
            )
    family = model_family(hf)
    refused = {"context": family.sinks or family.windows, "expert_tensor": family.biases}
    for key, is_refused in refused.items():
        if is_refused and (ranks := getattr(parallel, key)) > 1:
            raise UserError(
                f"parallel.{key}={ranks} is not supported for {hf['architectures'][0]}"
                f" ({_REFUSED[key]}); use 1",
                key=f"parallel.{key}",
                cause=Cause.UNSUPPORTED,
            )
    divisions = [
        *attention_divisions(hf, transformer_engine),
        ("intermediate_size", hf["intermediate_size"], "tensor"),
        *expert_divisions(hf),
    ]
    for field, size, key in divisions:
        ranks = getattr(parallel, key)
        is_shared = field == KEY_VALUE_HEADS  # by several ranks, if there are more ranks than heads
        if size % ranks and not (is_shared and ranks % size == 0):
            raise UserError(
                f"parallel.{key}={ranks} does not divide {field}={size}; choose a divisor "
                f"{'or a multiple ' if is_shared else ''}of {size}",
                key=f"parallel.{key}",
                cause=Cause.INDIVISIBLE,
            )
