"""Checks of a model's `config.json`, refused before anything starts. No torch or Megatron.

Every key is read, is known to change nothing (`INERT_KEYS`), or is refused. A key that no code
reads may change what a model computes: a window, a bias, a scale. So a configuration is checked by
reading it with `KeyRecorder`. `_check_quantization` says which quantized checkpoints can be read,
by `quantization_config`. `parallel_checks` has what a model refuses of the recipe."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.attention_fields import KEY_VALUE_HEADS, attention_fields, model_arguments
from megatron_r1.models.experts import expert_fields
from megatron_r1.models.hf_config import (
    HFConfig,
    is_finite_number,
    model_family,
    num_mtp_layers,
    require_keys,
    require_values,
)
from megatron_r1.models.rotary_fields import rope_scaling, yarn_scaling


class KeyRecorder(dict[str, Any]):
    """A configuration that records which of its keys were read."""

    def __init__(self, hf_config: HFConfig):
        super().__init__(hf_config)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`, or `default`, and record the key as read."""
        self.keys_read.add(key)
        return super().get(key, default)


# What a model is called, which software wrote it, and how text is generated.
_NAMING_KEYS = """architectures model_type auto_map transformers_version
    unsloth_fixed unsloth_version is_llama_config transformers.js_config tokenizer_class
    finetuning_task task_specific_params prefix problem_type id2label label2id num_labels"""
_GENERATION = """use_cache max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    cache_implementation max_sequence_length"""
# How weights are stored, what the forward pass returns, and how the
# authors trained: auxiliary losses, parallel sizes. Training here has settings of its own.
_OUTPUT = """torch_dtype dtype return_dict output_hidden_states
    output_attentions output_router_logits torchscript use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward pruned_heads tie_encoder_decoder is_encoder_decoder is_decoder
    add_cross_attention cross_attention_hidden_size attn_implementation"""
_TRAINING = """initializer_range router_aux_loss_coef aux_loss_alpha seq_aux ep_size pretraining_tp
    classifier_dropout hidden_dropout_prob"""
INERT_KEYS = frozenset(" ".join((_NAMING_KEYS, _GENERATION, _OUTPUT, _TRAINING)).split())
"""Keys without an influence on a model's logits."""


def _is_inert(key: str) -> bool:
    # A leading underscore marks transformers' own notes, such as _name_or_path.
    return key in INERT_KEYS or key.startswith("_") or key.endswith("_token_id")


def _refuse_unread(hf_config: KeyRecorder) -> None:
    """Raise UserError naming the keys with a value that were not read and are not inert."""
    unknown_settings = {
        key: value
        for key, value in hf_config.items()
        if value is not None and key not in hf_config.keys_read and not _is_inert(key)
    }
    if unknown_settings:
        settings_text = ", ".join(
            f"{key}={value!r}" for key, value in sorted(unknown_settings.items())
        )
        raise UserError(
            f"config.json of {' '.join(hf_config.get('architectures') or [])}: {settings_text} is "
            "not supported and could change what the model computes; remove it from config.json if "
            "you know that it does not",
            key=min(unknown_settings),
            cause=Cause.UNSUPPORTED,
        )


FP8_BLOCK_SIZE = 128
FP8_BLOCKS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [FP8_BLOCK_SIZE, FP8_BLOCK_SIZE],
}
"""`quantization_config` of DeepSeek's published FP8 checkpoints
(`models.weights.formats.published_layout`)."""


def _check_quantization(hf_config: HFConfig) -> None:
    """Raise UserError for weights that are stored in another form than the one that can be read:
    blocks of FP8, or for models with stacked experts MXFP4."""
    quantization = hf_config.get("quantization_config")
    if not quantization:
        return
    if model_family(hf_config).stacked_experts:
        expected: dict[str, object] = {"quant_method": "mxfp4"}
    else:
        expected = {key: FP8_BLOCKS[key] for key in ("quant_method", "weight_block_size")}
        if "fmt" in quantization:  # its default in transformers is that of FP8_BLOCKS
            expected["fmt"] = FP8_BLOCKS["fmt"]
    for key, value in expected.items():
        if quantization.get(key) != value:
            raise UserError(
                f"config.json: quantization_config with {key}={quantization.get(key)!r} cannot be "
                f"read, only {value!r}; give a folder of the model in bf16",
                key="quantization_config",
                cause=Cause.UNSUPPORTED,
            )


_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    KEY_VALUE_HEADS,
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "num_experts_per_tok",
    "decoder_sparse_step",
)
_COUNTS = (
    "num_nextn_predict_layers",
    "n_routed_experts",
    "n_shared_experts",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
)
_FLAGS = ("norm_topk_prob", "tie_word_embeddings", "attention_bias", "mlp_bias", "use_qk_norm")
_FACTORS = ("routed_scaling_factor", "initializer_range")
_DTYPES = ("auto", "float64", "float32", "bfloat16", "float16", "float8_e4m3fn")


def check_supported(hf_config: HFConfig) -> None:
    """Raise UserError for a model that this stack would compute differently from transformers,
    naming the key of `config.json`; unknown keys are refused too."""
    model_fields(hf_config)


def model_fields(hf_config: HFConfig) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig in which architectures differ. Errors as
    `check_supported`."""
    _check_sizes(hf_config)
    hf_config, family = KeyRecorder(hf_config), model_family(hf_config)
    require_keys(
        hf_config, "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"
    )
    require_keys(
        hf_config, "vocab_size", "rms_norm_eps", "max_position_embeddings", *family.required_keys
    )
    require_values(hf_config, hidden_act="silu", attention_dropout=0.0, **family.fixed_values)
    _check_quantization(hf_config)
    fields = {
        **attention_fields(hf_config),
        **expert_fields(hf_config),
        "mtp_num_layers": num_mtp_layers(hf_config) or None,
    }
    # For their errors, and so that what they read counts as read.
    model_arguments(hf_config), rope_scaling(hf_config), yarn_scaling(hf_config)
    for key in ("tie_word_embeddings", *family.ignored_keys):
        hf_config.get(key)
    _refuse_unread(hf_config)
    return fields


def _check_sizes(hf_config: HFConfig) -> None:
    """Raise UserError for a size that is no whole number, or zero, or a value of another type."""
    windows = ("sliding_window",) if model_family(hf_config).sliding_windows else ()
    for key in (*_SIZES, *windows):
        size = hf_config.get(key)
        if size is not None and (type(size) is not int or size < 1):
            raise UserError(
                f"config.json: {key}={size!r} must be a whole number above 0",
                key=key,
                cause=Cause.OUT_OF_RANGE,
            )
    kinds: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
        (_COUNTS, lambda value: type(value) is int and value >= 0, "a whole number"),
        (_FLAGS, lambda value: type(value) is bool, "true or false"),
        (_FACTORS, is_finite_number, "a number"),
    )
    for keys, fits, expected in kinds:
        for key in keys:
            if (value := hf_config.get(key)) is not None and not fits(value):
                raise UserError(
                    f"config.json: {key}={value!r} must be {expected}",
                    key=key,
                    cause=Cause.MALFORMED,
                )
    epsilon = hf_config.get("rms_norm_eps", 1.0)
    if not isinstance(epsilon, float) or not 0 < epsilon < inf:
        raise UserError(
            f"config.json: rms_norm_eps={epsilon!r} must be a number above 0, written with a "
            "decimal point or exponent",
            key="rms_norm_eps",
            cause=Cause.OUT_OF_RANGE,
        )
    for key in ("dtype", "torch_dtype"):
        if (dtype := hf_config.get(key)) is not None and dtype not in _DTYPES:
            raise UserError(
                f"config.json: {key}={dtype!r} is no type of weights; write what they are, such as "
                '"bfloat16"',
                key=key,
                cause=Cause.UNKNOWN,
            )
