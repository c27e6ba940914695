"""The tokenizer of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: str, key: str) -> Any:
    """key: of the recipe that names the folder, for the error. Raises ValueError where it has no
    tokenizer, or one that transformers cannot load."""
    from transformers import AutoTokenizer  # takes a second; only commands that run need it

    try:
        return AutoTokenizer.from_pretrained(folder)
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
