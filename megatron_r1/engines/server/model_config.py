"""Reads from a model's config.json what its engines need.

That is whether vLLM can load it, the longest context, the size of the vocabulary, and the keys that
vLLM gets in place of the file's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.models.hf_config import HFConfig, language_settings
from megatron_r1.models.hf_config_file import implied_settings, load_raw_hf_config


def read_engine_hf_config(model: Path) -> HFConfig:
    """Return a model's `config.json`.

    Raises:
        EngineError: there is no folder, no such file, or one that names no architecture, which vLLM
            would refuse only after importing everything.
    """
    config = model / "config.json"
    if not config.is_file():
        raise EngineError(
            f"{model} is not a model folder: it has no config.json; name a folder in Hugging Face "
            "format, such as the hf/ of a run"
        )
    try:
        hf_config = load_raw_hf_config(model)
    except UserError as error:
        raise EngineError(str(error)) from error
    if not hf_config.get("architectures"):
        raise EngineError(
            f'{config} has no "architectures": vLLM does not know which model this is; add it, '
            'such as ["Qwen2ForCausalLM"]'
        )
    return hf_config


def config_arguments(hf_config: HFConfig, overrides: Mapping[str, Any] | None) -> list[str]:
    """Return vLLM's arguments for a model of config.json `hf_config` read with `overrides`, and
    with what its class needs and transformers does not write.

    Args:
        hf_config: the model's `config.json`.
        overrides: keys in place of those of `hf_config`.
    """
    if not (changes := {**implied_settings(hf_config), **(overrides or {})}):
        return []
    return ["--hf-overrides", json.dumps(changes)]


def max_model_len(config: Config) -> int:
    """Return `rollout.max_model_len`, or the model's own limit, in tokens.

    The model may be any that vLLM supports, also one that cannot be trained here.

    Raises:
        UserError: the model has fewer positions, or responses would leave no room for a prompt.
    """
    limit = max_positions(config.model.path)
    length = config.rollout.max_model_len or limit
    if length > limit:
        raise UserError(
            f"rollout.max_model_len: {length} is more than the model's {limit} positions "
            f"({config.model.path}/config.json: max_position_embeddings)",
            key="rollout.max_model_len",
            cause=Cause.TOO_LARGE,
        )
    # Engines are sized once, for the longest responses of rl.schedule.
    max_tokens = max(part.rollout.max_response_tokens for _, part in config.schedule_parts())
    if max_tokens >= length:
        raise UserError(
            f"rollout.max_response_tokens: {max_tokens} leaves no room for "
            f"a prompt within {length} tokens; lower it"
            + (f", or raise rollout.max_model_len (at most {limit})" if length < limit else ""),
            key="rollout.max_response_tokens",
            cause=Cause.TOO_LARGE,
        )
    return length


def max_positions(folder: str | Path, key: str = "model.path") -> int:
    """Return max_position_embeddings of a model, its longest context in tokens.

    Args:
        folder: the model's folder.
        key: the recipe's setting that names the folder, for errors.

    Raises:
        UserError: config.json is missing or malformed, or has no such number.
    """
    hf_config = load_raw_hf_config(folder, key)
    try:
        return int(language_settings(hf_config)["max_position_embeddings"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}/config.json: no max_position_embeddings can be read ({error!r}); write the "
            "model's longest context there, in tokens",
            key="max_position_embeddings",
            cause=Cause.MISSING,
        ) from error


def vocab_size(model: Path) -> int | None:
    """Return the vocabulary's size in a model's config.json, or None where it is not readable."""
    try:
        return language_settings(load_raw_hf_config(model)).get("vocab_size")
    except (UserError, AttributeError):
        return None  # the server's own error is more precise
