"""How many tokens of prompt and response an engine has room for."""

import json
from pathlib import Path

from megatron_r1.config import Config


def context_length(config: Config) -> int:
    """`rollout.max_model_len`, or the model's own limit.

    Of any model the engine knows, also those that cannot be trained here. Raises ValueError for
    more than the model has positions for, and for responses that would leave no room for a prompt.
    """
    limit = positions(Path(config.model.path) / "config.json")
    wanted = config.rollout.max_model_len or limit
    if wanted > limit:
        raise ValueError(
            f"rollout.max_model_len: {wanted} is more than the model's {limit} positions "
            f"({config.model.path}/config.json: max_position_embeddings)"
        )
    if config.rollout.max_response_tokens >= wanted:
        raise ValueError(
            f"rollout.max_response_tokens: {config.rollout.max_response_tokens} leaves no room for "
            f"a prompt within {wanted} tokens; lower it"
            + (f", or raise rollout.max_model_len (at most {limit})" if wanted < limit else "")
        )
    return wanted


def positions(file: Path, key: str = "model.path") -> int:
    """Of the model whose config.json `file` is. Raises ValueError where it does not say."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist: {key} must be a Hugging Face model folder")
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
        # Models that also see keep their language model's settings one level down.
        return int((hf.get("text_config") or hf)["max_position_embeddings"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: no max_position_embeddings can be read ({error!r})") from error
