"""The tokenizer of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load_tokenizer(folder: str, key: str) -> Any:
    """key: of the recipe that names the folder, for the error. Raises ValueError where it has no
    tokenizer, or one that transformers cannot load."""
    try:
        return _load(Path(folder))
    except (OSError, ValueError) as error:
        if not Path(folder).is_dir():
            raise ValueError(
                f"{key}: there is no folder {folder} (relative to {Path.cwd()}); make it, or "
                "correct the path"
            ) from None
        if not any((Path(folder) / name).is_file() for name in FILES):
            raise ValueError(
                f"{key}: {folder} has no tokenizer ({FILES[0]}); give a folder with one, beside "
                "config.json and the weights"
            ) from None
        raise ValueError(f"{key}: no usable tokenizer in {folder}: {error}") from None


def _load(folder: Path) -> Any:
    """What AutoTokenizer loads. Its import brings torch and all of transformers' generation along,
    seconds that are not spent where its choice is known."""
    names = ("config.json", "tokenizer_config.json", "tokenizer.json")
    if all((folder / name).is_file() for name in names):
        settings = _read(folder / names[1])
        if "auto_map" not in settings:
            model_type = _read(folder / names[0]).get("model_type")
            if (known := _known_class(model_type, settings)) is not None:
                return known.from_pretrained(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _known_class(model_type: str, settings: dict[str, Any]) -> type | None:
    """The class that AutoTokenizer takes for any DeepSeek-V3 and any Qwen2, whatever they name, and
    for a Llama that names it."""
    if model_type == "qwen2":
        from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

        return Qwen2Tokenizer
    is_plain = model_type == "llama" and settings.get("tokenizer_class") in PLAIN
    if model_type == "deepseek_v3" or is_plain:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    return None


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
