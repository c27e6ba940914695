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
    seconds that are not spent where its choice is known: the class that reads tokenizer.json and
    nothing else, which it takes for any DeepSeek-V3, and for a Llama that names it."""
    names = ("config.json", "tokenizer_config.json", "tokenizer.json")
    if all((folder / name).is_file() for name in names):
        model_type = _read(folder / names[0]).get("model_type")
        settings = _read(folder / names[1])
        is_plain = model_type == "deepseek_v3" or (
            model_type == "llama" and settings.get("tokenizer_class") in PLAIN
        )
        if is_plain and "auto_map" not in settings:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
