"""Reads a Hugging Face `config.json`; imports no torch or Megatron, so that errors come at once."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.untrusted_files import read_json, require_files_inside
from megatron_r1.base.files.weight_files import tensor_names
from megatron_r1.models.families import FAMILIES, Family

HFConfig = Mapping[str, Any]
"""The content of a Hugging Face model's `config.json`; nothing that is given one changes it.
`read_hf_config` returns it checked, with one name for each setting, `load_raw_hf_config` as the
file is. A multimodal model has its language model's settings one level down: `language_settings`
returns them. What files say in several ways has a function here: `model_family`, `sparse_layers`,
`key_value_heads`, `head_sizes`, `num_mtp_layers`."""
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

# transformers 5 reads both names of each of these and may write either. Here every model has the
# second.
_MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")
_EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")
_ALIASES = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
}
_LISTS = ("layer_types", "mlp_layer_types", "mlp_only_layers")
_MAX_SIZES = {
    **dict.fromkeys(("num_hidden_layers", *_MTP_COUNTS), 10_000),
    **dict.fromkeys((*_EXPERT_COUNTS, "n_shared_experts"), 10_000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_group"), 1 << 16),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 1 << 24),
    **dict.fromkeys(("vocab_size", "head_dim", "q_lora_rank", "kv_lora_rank"), 1 << 24),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 1 << 24),
    "max_position_embeddings": 1 << 32,
}
"""Sizes beyond those of any model: code that counts layers or rows would not finish."""
MAX_NUMBER = 1e300
"""Beyond it a number of config.json is infinite, or overflows where it is multiplied."""
_MAX_EXPERTS = 200_000
"""Of all layers together; Kimi-K2 has 23,040."""
EXPERT_SIZE_KEY = "moe_intermediate_size"
"""The key of an expert's inner features here, whatever the family's own key is."""


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
        for name in limits.keys() & set(_EXPERT_COUNTS):
            limits[name] = min(limits[name], _MAX_EXPERTS // layers)
    for name, limit in limits.items():
        if not 0 <= settings[name] <= limit:
            raise UserError(
                f"{file}: {name}={settings[name]} is no size of such a model (0 to {limit:,}); "
                "write the model's own",
                key=name,
                cause=Cause.OUT_OF_RANGE,
            )


def language_settings(hf_config: HFConfig) -> HFConfig:
    """Return the language model's settings, which multimodal models keep one level down."""
    return hf_config.get("text_config") or hf_config


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
        hf_config[_MTP_COUNTS[0]] = 0
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
            f"config.json has {_MTP_COUNTS[0]}={num_mtp_layers(hf_config)}, but the weights have "
            "no tensor of MTP layers: the model is read without them"
        )
    return sentences


def _lacks_mtp(path: str | Path, hf_config: HFConfig) -> bool:
    """Whether the folder has weights, and none of the MTP layers that `hf_config` names."""
    layers = hf_config.get("num_hidden_layers")
    if not num_mtp_layers(hf_config) or not isinstance(layers, int):
        return False
    names = tensor_names(Path(path))
    return bool(names) and not any(name.startswith(f"model.layers.{layers}.") for name in names)


def resolve_aliases(hf_config: HFConfig) -> dict[str, Any]:
    """Return `hf_config` with one name for each setting; UserError where two names have two
    values."""
    hf_config = dict(hf_config)
    for alias, name in _ALIASES.items():
        if alias not in hf_config:
            continue
        value = hf_config.pop(alias)
        if hf_config.setdefault(name, value) != value:
            raise UserError(
                f"config.json: {alias}={value!r} and {name}={hf_config[name]!r} mean the same; "
                "leave one",
                key=alias,
                cause=Cause.CONFLICT,
            )
    for family in (
        ARCHITECTURES[n] for n in hf_config.get("architectures") or [] if n in ARCHITECTURES
    ):
        if FAMILIES[family].router_score and (
            size := hf_config.get(FAMILIES[family].expert_size_key)
        ):
            hf_config.setdefault(EXPERT_SIZE_KEY, size)
    return hf_config


def published_names(hf_config: HFConfig) -> HFConfig:
    """Return `hf_config` with the names that transformers' and vLLM's classes of its architecture
    read."""
    name, family = "n_routed_experts", model_family(hf_config)
    if name not in hf_config or family.router_score != "softmax" or family.latent_attention:
        return hf_config
    hf_config = {("num_experts" if key == name else key): value for key, value in hf_config.items()}
    if family.expert_size_key != EXPERT_SIZE_KEY:
        hf_config[family.expert_size_key] = hf_config.pop(EXPERT_SIZE_KEY)
    return hf_config


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
    return score_fields | {name: 0 for name in _MTP_COUNTS if name in hf_config}


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
