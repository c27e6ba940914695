"""What the settings of a Hugging Face `config.json` mean: the architecture, the head, and the sizes
that files give in several ways. No torch or Megatron."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.families import FAMILIES, Family

HFConfig = Mapping[str, Any]
"""The content of a Hugging Face model's `config.json`; nothing that is given one changes it.
`hf_config_file.read_hf_config` returns it checked, with one name for each setting,
`load_raw_hf_config` as the file is. A multimodal model has its language model's settings one level
down: `language_settings` returns them. What files say in several ways has a function here:
`model_family`, `sparse_layers`, `key_value_heads`, `head_sizes`, `num_mtp_layers`."""
HeadKind = Literal["language", "score"]
"""language: logits over the vocabulary. score: one number per token, for reward models and critics.
"""
VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to this (DEFAULT_VOCAB_PADDING_SIZE) before it splits it."""

_SUFFIXES: dict[HeadKind, str] = {"language": "ForCausalLM", "score": "ForSequenceClassification"}
ARCHITECTURES = {
    name + suffix: name
    for kind, suffix in _SUFFIXES.items()
    for name, family in FAMILIES.items()
    if kind == "language" or family.score_head
}
"""HF architecture -> its key in FAMILIES."""

MTP_COUNT_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
"""The keys of the number of MTP layers; every model has the first one here
(`hf_config_names.resolve_aliases`)."""
MAX_NUMBER = 1e300
"""Beyond it a number of config.json is infinite, or overflows where it is multiplied."""
EXPERT_SIZE_KEY = "moe_intermediate_size"
"""The key of an expert's inner features here, whatever the family's own key is."""


def language_settings(hf_config: HFConfig) -> HFConfig:
    """Return the language model's settings, which multimodal models keep one level down."""
    return hf_config.get("text_config") or hf_config


def has_score_head(hf_config: HFConfig) -> bool:
    """Whether the model returns one number per token instead of logits."""
    return any(name.endswith(_SUFFIXES["score"]) for name in hf_config.get("architectures") or [])


def score_model_config(hf_config: HFConfig) -> HFConfig:
    """Return the configuration of the score model with the body of `hf_config`, as transformers and
    vLLM read it: without LM head and multi-token-prediction layers.

    Raises:
        UserError: transformers has no score model of the architecture.
    """
    if not model_family(hf_config).score_head:
        raise UserError(
            f"transformers has no score model of {hf_config['architectures'][0]}; take a model of "
            f"{', '.join(name for name, family in FAMILIES.items() if family.score_head)}",
            key="architectures",
            cause=Cause.UNSUPPORTED,
        )
    names = [n.removesuffix(_SUFFIXES["language"]) for n in hf_config["architectures"]]
    score_fields = {
        **hf_config,
        "architectures": [n.removesuffix(_SUFFIXES["score"]) + _SUFFIXES["score"] for n in names],
        "num_labels": 1,
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "tie_word_embeddings": False,
    }
    return score_fields | {name: 0 for name in MTP_COUNT_KEYS if name in hf_config}


def find_architecture(hf_config: HFConfig) -> str:
    """Return the key of this configuration in FAMILIES; UserError if it has none."""
    names = hf_config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    message = f"architecture {', '.join(names)} in config.json is not supported"
    raise UserError(
        f"{message if names else 'config.json lacks architectures; add the name of its class'}; "
        f"supported are {', '.join(name + _SUFFIXES['language'] for name in FAMILIES)} "
        "(docs/models.md)",
        key="architectures",
        cause=Cause.UNSUPPORTED if names else Cause.MISSING,
    )


def model_family(hf_config: HFConfig) -> Family:
    """Return the entry of FAMILIES for this `config.json`; UserError for an unknown one."""
    return FAMILIES[find_architecture(hf_config)]


def sparse_layers(hf_config: HFConfig) -> list[bool]:
    """Return for each decoder layer whether it has routed experts instead of a dense MLP."""
    layers = range(hf_config["num_hidden_layers"])
    if not hf_config.get("n_routed_experts"):
        return [False for _ in layers]
    first = hf_config.get("first_k_dense_replace") or 0
    step = hf_config.get("decoder_sparse_step") or 1
    dense_layers = hf_config.get("mlp_only_layers") or []
    return [i >= first and i not in dense_layers and (i + 1) % step == 0 for i in layers]


def key_value_heads(hf_config: HFConfig) -> int:
    """Return the heads of keys and values of a layer: as many as query heads where config.json does
    not say."""
    return hf_config.get("num_key_value_heads") or hf_config["num_attention_heads"]


def head_sizes(hf_config: HFConfig) -> tuple[int, int]:
    """Return the features of a query head and of a value head."""
    if hf_config.get("kv_lora_rank"):
        query_size = hf_config["qk_nope_head_dim"] + hf_config["qk_rope_head_dim"]
        return query_size, hf_config["v_head_dim"]
    size = hf_config.get("head_dim") or hf_config["hidden_size"] // hf_config["num_attention_heads"]
    return size, size


def num_mtp_layers(hf_config: HFConfig) -> int:
    """Return the number of multi-token-prediction layers; 0 for architectures without any."""
    return hf_config.get("num_nextn_predict_layers") or 0


def is_finite_number(value: Any) -> bool:
    """Whether a setting is a finite number; booleans do not count as numbers."""
    return type(value) in (int, float) and -MAX_NUMBER < value < MAX_NUMBER


def require_values(hf_config: HFConfig, **allowed: Any) -> None:
    """Raise UserError for a field of `hf_config` that is set to another value than the one
    allowed."""
    for name, value in allowed.items():
        actual_value = hf_config.get(name)
        if actual_value is not None and actual_value != value:
            remedy = "leave it out" if value is None else f"only {value!r} is"
            raise UserError(
                f"{name}={actual_value!r} in config.json is not supported, {remedy}",
                key=name,
                cause=Cause.UNSUPPORTED,
            )


def require_keys(hf_config: HFConfig, *names: str) -> None:
    """Raise UserError naming every field of `names` that `hf_config` lacks."""
    missing_names = [name for name in names if hf_config.get(name) is None]
    if missing_names:
        raise UserError(
            f"config.json lacks {', '.join(missing_names)}; add the model's own value",
            key=missing_names[0],
            cause=Cause.MISSING,
        )


def padded_vocabulary(num_tokens: int) -> int:
    """Return the rows of vLLM's embedding and LM head, which its tensor ranks share."""
    return -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
