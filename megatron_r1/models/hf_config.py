"""Reads a Hugging Face `config.json`; imports no torch or Megatron, so that errors come at once."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from megatron_r1.errors import UserError

if TYPE_CHECKING:
    from megatron_r1.config import ParallelConfig

HeadKind = Literal["language", "score"]
"""language: logits over the vocabulary. score: one number per token, for reward models and critics.
"""

_MODULES = {"DeepseekV3": "deepseek_v3", "Qwen2": "qwen2", "Llama": "llama"}
_SUFFIXES: dict[HeadKind, str] = {"language": "ForCausalLM", "score": "ForSequenceClassification"}
ARCHITECTURES = {
    name + suffix: module for suffix in _SUFFIXES.values() for name, module in _MODULES.items()
}
"""HF architecture -> the module with its configuration in models/ and its table in weights/."""

# transformers 5 reads both names of each of these and may write either.
_MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")
_ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}


def load_config(path: str | Path, key: str = "model.path") -> dict:
    """Return `config.json` of a model folder as it is, of any architecture. key: the recipe's key
    of `path`, for error messages. Raises UserError when the file is missing or not JSON."""
    file = Path(path) / "config.json"
    if not file.is_file():
        own = Path(path) / "hf"
        hint = f"; did you mean {own}?" if (own / "config.json").is_file() else ""
        raise UserError(
            f"{file} does not exist (relative to {Path.cwd()}): {key} must be a Hugging Face model "
            f"folder{hint}"
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error


def language_settings(hf: dict) -> dict:
    """Return the language model's settings, which multimodal models keep one level down."""
    return hf.get("text_config") or hf


def read_hf_config(
    path: str | Path, head: HeadKind | None = "language", key: str = "model.path"
) -> dict:
    """Return the contents of `config.json` in the folder `path`, aliases resolved.

    head: the expected kind of model. "score" converts a language model's configuration to that of
    the score model which starts from it (`as_score_model`); None: either kind. key: the recipe's
    key of `path`, for error messages.

    Raises UserError when the file is missing or unreadable, its architecture is not in
    ARCHITECTURES, or it is a score model where a language model is expected."""
    file = Path(path) / "config.json"
    hf = load_config(path, key)
    for alias, name in _ALIASES.items():
        if alias in hf:
            hf.setdefault(name, hf.pop(alias))
    architecture(hf)
    if has_score_head(hf):
        _check_labels(file, hf)
    if head == "language" and has_score_head(hf):
        raise UserError(
            f"{file}: {hf['architectures'][0]} is a reward model; give the folder of a language "
            "model here (megatron-r1 reward-model trains reward models)"
        )
    return as_score_model(hf) if head == "score" or has_score_head(hf) else hf


def has_score_head(hf: dict) -> bool:
    """Whether the model returns one number per token instead of logits."""
    return any(name.endswith(_SUFFIXES["score"]) for name in hf.get("architectures") or [])


def as_score_model(hf: dict) -> dict:
    """Return the configuration of the score model with the body of `hf`, as transformers and vLLM
    read it: without LM head and multi-token-prediction layers."""
    names = [n.removesuffix(_SUFFIXES["language"]) for n in hf["architectures"]]
    scored = {
        **hf,
        "architectures": [n.removesuffix(_SUFFIXES["score"]) + _SUFFIXES["score"] for n in names],
        "num_labels": 1,
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "tie_word_embeddings": False,
    }
    return scored | {name: 0 for name in _MTP_COUNTS if name in hf}


def _check_labels(file: Path, hf: dict) -> None:
    # transformers counts id2label, which without an entry has two labels.
    count = hf.get("num_labels") or len(hf.get("id2label") or "ab")
    if count != 1:
        raise UserError(
            f"{file}: a classifier of {count} labels; only score models can be trained and "
            "converted, with num_labels: 1"
        )


def architecture(hf: dict) -> str:
    """Return the name of this configuration's module in models/ and weights/; UserError if none."""
    names = hf.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise UserError(
        f"architecture {', '.join(names) or 'missing'} in config.json is not supported; "
        f"supported are {', '.join(ARCHITECTURES)}"
    )


class ModelFamily(Protocol):
    """What a module of `models/` defines for the architectures that `_MODULES` names after it.

    hf: the content of `config.json`. All functions raise UserError for what they do not support."""

    LATENT_ATTENTION: bool
    """Whether the configuration is an MLATransformerConfig (multi-head latent attention)."""

    def config_fields(self, hf: dict) -> dict[str, Any]:
        """Return the fields of Megatron's TransformerConfig that are the family's own."""

    def model_arguments(self, hf: dict) -> dict[str, Any]:
        """Return the arguments of GPTModel beside the configuration."""

    def divisions(self, hf: dict, transformer_engine: bool) -> list[tuple[str, int, str]]:
        """Return (field, its value, the key of `parallel` that must divide it) triples."""

    def rope_scaling(self, hf: dict) -> dict[str, Any] | None:
        """Return the arguments of RotaryEmbedding._apply_scaling; only without latent attention."""


def model_family(hf: dict) -> ModelFamily:
    """Return the module of `models/` for this `config.json`; UserError for an unknown one."""
    return cast(ModelFamily, import_module(f"megatron_r1.models.{architecture(hf)}"))


def check_supported(hf: dict) -> None:
    """Raise UserError for a model that this stack would compute differently from transformers."""
    need(hf, "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    need(hf, "vocab_size", "rms_norm_eps")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act={hf['hidden_act']!r} is not supported, only 'silu' is")
    model = model_family(hf)
    model.config_fields(hf)
    model.model_arguments(hf)


def check_divisions(hf: dict, parallel: ParallelConfig, transformer_engine: bool) -> None:
    """Raise UserError for sizes of `parallel` that do not divide the model, or that only experts
    could have."""
    for key in () if hf.get("n_routed_experts") else ("expert", "expert_tensor"):
        if (ranks := getattr(parallel, key)) > 1:
            raise UserError(f"parallel.{key}={ranks} needs a model with experts; use 1")
    for field, size, key in model_family(hf).divisions(hf, transformer_engine):
        if size % (ranks := getattr(parallel, key)):
            raise UserError(
                f"parallel.{key}={ranks} does not divide {field}={size}; choose a divisor of {size}"
            )


def num_mtp_layers(hf: dict) -> int:
    """Return the number of multi-token-prediction layers; 0 for architectures without any."""
    return hf.get("num_nextn_predict_layers") or 0


def rope_parameters(hf: dict) -> dict:
    """Return the rotary settings as one flat dict with `rope_type` and `rope_theta`.

    transformers 5 writes `rope_parameters`; earlier versions `rope_theta` beside `rope_scaling`,
    with the kind in `rope_type` or `type`."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", hf.get("rope_theta", 10_000.0))
    return rope


def require(hf: dict, **allowed) -> None:
    """Raise UserError for a field of `hf` that is set to another value than the one allowed."""
    for name, value in allowed.items():
        actual = hf.get(name)
        if actual is not None and actual != value:
            raise UserError(f"{name}={actual!r} in config.json is not supported, only {value!r} is")


def need(hf: dict, *names: str) -> None:
    """Raise UserError naming every field of `names` that `hf` lacks."""
    missing = [name for name in names if hf.get(name) is None]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
