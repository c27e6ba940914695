"""Reading a Hugging Face `config.json`; without torch or Megatron, so that errors come at once."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

ARCHITECTURES = {
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
}
"""HF architecture -> the module with its configuration in models/ and its table in weights/."""

# transformers 5 reads both names of each of these and may write either.
_ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}


def read_hf_config(path: str | Path) -> dict:
    """The contents of `config.json` in the folder `path`, aliases resolved.

    Raises ValueError when the file is missing or unreadable, or its architecture is not in
    ARCHITECTURES.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist: model.path must be a Hugging Face model folder")
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    for alias, name in _ALIASES.items():
        if alias in hf:
            hf.setdefault(name, hf.pop(alias))
    architecture(hf)
    return hf


def architecture(hf: dict) -> str:
    """The module in models/ and weights/ that serves this configuration; ValueError if none."""
    names = hf.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise ValueError(
        f"architecture {', '.join(names) or 'missing'} in config.json is not supported; "
        f"supported are {', '.join(ARCHITECTURES)}"
    )


def check_supported(hf: dict) -> None:
    """Raise ValueError for what this stack would not compute as transformers and vLLM do."""
    need(hf, "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    need(hf, "vocab_size", "rms_norm_eps")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={hf['hidden_act']!r} is not supported, only 'silu' is")
    model = import_module(f"megatron_r1.models.{architecture(hf)}")
    model.config_fields(hf)
    model.model_arguments(hf)


def num_mtp_layers(hf: dict) -> int:
    """Multi-token-prediction layers the checkpoint carries; 0 for architectures without any."""
    return hf.get("num_nextn_predict_layers") or 0


def rope_parameters(hf: dict) -> dict:
    """Rotary settings as one flat dict with `rope_type` and `rope_theta`.

    transformers 5 writes `rope_parameters`; earlier versions `rope_theta` beside `rope_scaling`,
    whose kind is called `rope_type` or `type`.
    """
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", hf.get("rope_theta", 10_000.0))
    return rope


def require(hf: dict, **allowed) -> None:
    """Raise ValueError for a field of `hf` that is set and not to the value allowed here."""
    for name, value in allowed.items():
        found = hf.get(name)
        if found is not None and found != value:
            raise ValueError(f"{name}={found!r} in config.json is not supported, only {value!r} is")


def need(hf: dict, *names: str) -> None:
    """Raise ValueError naming every field of `names` that `hf` lacks."""
    missing = [name for name in names if hf.get(name) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
