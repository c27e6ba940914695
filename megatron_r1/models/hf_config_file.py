"""Reads and checks the `config.json` of a Hugging Face model folder. It imports no torch or
Megatron, so that errors come at once."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.untrusted_files import read_json, require_files_inside
from megatron_r1.base.files.weight_files import tensor_names
from megatron_r1.models.families import FAMILIES
from megatron_r1.models.hf_config import (
    ARCHITECTURES,
    MTP_COUNT_KEYS,
    HeadKind,
    HFConfig,
    find_architecture,
    has_score_head,
    language_settings,
    num_mtp_layers,
    score_model_config,
)
from megatron_r1.models.hf_config_names import resolve_aliases

_EXPERT_COUNT_KEYS = ("n_routed_experts", "num_local_experts", "num_experts")
_LISTS = ("layer_types", "mlp_layer_types", "mlp_only_layers")
_MAX_SIZES = {
    **dict.fromkeys(("num_hidden_layers", *MTP_COUNT_KEYS), 10_000),
    **dict.fromkeys((*_EXPERT_COUNT_KEYS, "n_shared_experts"), 10_000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_group"), 1 << 16),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 1 << 24),
    **dict.fromkeys(("vocab_size", "head_dim", "q_lora_rank", "kv_lora_rank"), 1 << 24),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 1 << 24),
    "max_position_embeddings": 1 << 32,
}
"""Sizes beyond those of any model: code that counts layers or rows would not finish."""
_MAX_EXPERTS = 200_000
"""Of all layers together; Kimi-K2 has 23,040."""


def load_raw_hf_config(path: str | Path, key: str = "model.path") -> HFConfig:
    """Return `config.json` of a model folder as it is, of any architecture.

    Args:
        path: the model's folder.
        key: the recipe's key of `path`, for error messages.

    Raises:
        UserError: when the file is missing or not JSON, and for a file of the folder that is a link
            to one outside.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        hf_folder, hint = Path(path) / "hf", ""
        if (hf_folder / "config.json").is_file():
            hint = f"; did you mean {hf_folder}?"
        elif (Path(path) / "adapter_config.json").is_file():
            hint = (
                "; this is a LoRA adapter: merge it into its base model (peft's merge_and_unload)"
            )
        elif Path(path).is_file():
            hint = "; this is a file: give the folder that it is in"
        elif ggufs := sorted(Path(path).glob("*.gguf")):
            hint = (
                f"; {ggufs[0].name}: load it with transformers (from_pretrained with gguf_file), "
                "and save_pretrained writes such a folder"
            )
        else:
            hint = hub_hint(str(path))
        raise UserError(
            f"{file} does not exist (relative to {Path.cwd()}): {key} must be a Hugging Face model "
            f"folder{hint}",
            key=key,
            cause=Cause.NOT_FOUND,
        )
    require_files_inside(Path(path), key)
    if _has_mark(file):
        raise UserError(
            f"{file} begins with a byte order mark; save it as UTF-8 without BOM",
            key="config.json",
            cause=Cause.MALFORMED,
        )
    hf_config = read_json(file, "config.json")
    _check_kinds(file, hf_config)
    return hf_config


def _has_mark(file: Path) -> bool:
    """Return whether a file begins with a byte order mark, which an editor may have written."""
    marks = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return file.read_bytes()[:3].startswith(marks)


def hub_hint(path: str) -> str:
    """Return how to fetch a model whose name on the hub was given instead of a folder, else ""."""
    if Path(path).exists() or path.count("/") != 1 or path[0] in "./":
        return ""
    if Path(path).parent.is_dir():
        return f"; {Path(path).parent}/ has no run or model of that name yet"
    return f"; if it is a model of the hub: hf download {path} --local-dir FOLDER"


def _check_kinds(file: Path, hf_config: Any) -> None:
    """Raise UserError for an entry that is of another kind than every release has."""
    if not isinstance(hf_config, dict):
        raise UserError(
            f"{file} must be a JSON object of settings; fetch it again",
            key="config.json",
            cause=Cause.MALFORMED,
        )
    for keys, kind, name in (
        (("architectures", *_LISTS), list, "list"),
        (("rope_scaling", "rope_parameters", "quantization_config"), dict, "object"),
    ):
        for key in keys:
            if not isinstance(hf_config.get(key), kind | None):
                raise UserError(
                    f"{file}: {key}={hf_config[key]!r} must be a JSON {name}, or be left out",
                    key=key,
                    cause=Cause.MALFORMED,
                )
    if not all(isinstance(name, str) for name in hf_config.get("architectures") or ()):
        raise UserError(
            f"{file}: architectures={hf_config['architectures']!r} must be names of classes",
            key="architectures",
            cause=Cause.MALFORMED,
        )
    settings = language_settings(hf_config)
    if not isinstance(settings, dict):
        raise UserError(
            f"{file}: text_config={settings!r} must be a JSON object, or be left out",
            key="text_config",
            cause=Cause.MALFORMED,
        )
    _check_most(file, settings)


def _check_most(file: Path, settings: HFConfig) -> None:
    """Raise UserError for a negative size, and for one that no model has."""
    limits = {name: limit for name, limit in _MAX_SIZES.items() if type(settings.get(name)) is int}
    layers = settings.get("num_hidden_layers")
    if type(layers) is int and layers > 0:
        for name in limits.keys() & set(_EXPERT_COUNT_KEYS):
            limits[name] = min(limits[name], _MAX_EXPERTS // layers)
    for name, limit in limits.items():
        if not 0 <= settings[name] <= limit:
            raise UserError(
                f"{file}: {name}={settings[name]} is no size of such a model (0 to {limit:,}); "
                "write the model's own",
                key=name,
                cause=Cause.OUT_OF_RANGE,
            )


def read_hf_config(
    path: str | Path, head: HeadKind | None = "language", key: str = "model.path"
) -> HFConfig:
    """Return the contents of `config.json` in the folder `path`, aliases resolved.

    MTP layers that the file names, but of which the folder's weights have no tensor, are left out,
    and keys of `implied_settings` are added: transformers writes such folders
    (`describe_config_changes` says so).

    Args:
        path: the model's folder.
        head: the expected kind of model. "score" converts a language model's configuration to that
            of the score model which starts from it (`score_model_config`); None: either kind.
        key: the recipe's key of `path`, for error messages.

    Raises:
        UserError: when the file is missing or unreadable, its architecture is not in ARCHITECTURES,
            or it is a score model where a language model is expected.
    """
    file = Path(path) / "config.json"
    hf_config = resolve_aliases(load_raw_hf_config(path, key))
    find_architecture(hf_config)
    if _lacks_mtp(path, hf_config):
        hf_config[MTP_COUNT_KEYS[0]] = 0
    hf_config |= implied_settings(hf_config)
    if has_score_head(hf_config):
        _check_labels(file, hf_config)
    if head == "language" and has_score_head(hf_config):
        raise UserError(
            f"{file}: {hf_config['architectures'][0]} is a reward model; give the folder of a "
            "language model here (megatron-r1 reward-model trains reward models)",
            key=key,
            cause=Cause.CONFLICT,
        )
    return (
        score_model_config(hf_config) if head == "score" or has_score_head(hf_config) else hf_config
    )


def implied_settings(hf_config: HFConfig) -> dict[str, Any]:
    """Return the keys that `hf_config`, of any architecture, lacks and vLLM needs, with the values
    that all models of its class have."""
    names = [
        ARCHITECTURES[name]
        for name in hf_config.get("architectures") or ()
        if name in ARCHITECTURES
    ]
    values = FAMILIES[names[0]].implied_values if names else {}
    return {key: value for key, value in values.items() if hf_config.get(key) is None}


def describe_config_changes(path: str | Path, key: str = "model.path") -> list[str]:
    """Return sentences on what is read from a model folder that its config.json does not say; none
    for architectures that are not in ARCHITECTURES.

    Args:
        path: the model's folder.
        key: the recipe's key of `path`, for error messages.
    """
    hf_config = resolve_aliases(load_raw_hf_config(path, key))
    sentences: list[str] = []
    if not any(name in ARCHITECTURES for name in hf_config.get("architectures") or ()):
        return sentences
    if added_settings := implied_settings(hf_config):
        settings_text = ", ".join(f"{name}={value!r}" for name, value in added_settings.items())
        sentences.append(
            f"config.json lacks {settings_text}, which every {hf_config['architectures'][0]} has; "
            "they are added for vLLM and in exports"
        )
    if _lacks_mtp(path, hf_config):
        sentences.append(
            f"config.json has {MTP_COUNT_KEYS[0]}={num_mtp_layers(hf_config)}, but the weights "
            "have no tensor of MTP layers: the model is read without them"
        )
    return sentences


def _lacks_mtp(path: str | Path, hf_config: HFConfig) -> bool:
    """Whether the folder has weights, and none of the MTP layers that `hf_config` names."""
    layers = hf_config.get("num_hidden_layers")
    if not num_mtp_layers(hf_config) or not isinstance(layers, int):
        return False
    names = tensor_names(Path(path))
    return bool(names) and not any(name.startswith(f"model.layers.{layers}.") for name in names)


def _check_labels(file: Path, hf_config: HFConfig) -> None:
    # transformers counts id2label, which without an entry has two labels.
    count = hf_config.get("num_labels") or len(hf_config.get("id2label") or "ab")
    if count != 1:
        raise UserError(
            f"{file}: a classifier of {count} labels; only score models can be trained and "
            "converted, with num_labels: 1",
            key="num_labels",
            cause=Cause.UNSUPPORTED,
        )
