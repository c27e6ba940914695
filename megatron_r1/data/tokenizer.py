"""Loads the tokenizer of a Hugging Face folder.

No code of the folder is executed: one whose tokenizer is Python code of its own is refused."""

from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.untrusted_files import read_json, require_files_inside

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
END_TOKEN_FILES, CONFIG = "generation_config.json", "config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def load_tokenizer(folder: str, key: str) -> Any:
    """Return the tokenizer of `folder`.

    Args:
        folder: in Hugging Face format.
        key: the recipe's key that names the folder, for errors.

    Raises:
        UserError: if there is none, or one that transformers cannot load.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"{key}: there is no folder {folder} (relative to {Path.cwd()}); make it, or correct "
            "the path",
            key=key,
            cause=Cause.NOT_FOUND,
        )
    require_files_inside(path, key)
    # Without these, transformers may return an empty tokenizer.
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        if _is_code(path):
            raise UserError(
                f"{key}: the tokenizer of {folder} is Python code of its own (auto_map in "
                "tokenizer_config.json), which is not executed; write a tokenizer.json in its "
                "place (docs/models.md, Tokenizers that are Python code)",
                key=key,
                cause=Cause.UNSUPPORTED,
            )
        raise UserError(
            f"{key}: {folder} has no tokenizer ({TOKENIZER_FILES[0]}); give a folder with one, "
            "next to "
            "config.json and the weights",
            key=key,
            cause=Cause.NOT_FOUND,
        )
    try:
        return _load_from_folder(path)
    except Exception as error:  # transformers and tokenizers raise anything for damaged files
        raise UserError(
            f"{key}: no usable tokenizer in {folder}: {error}; fetch its files again",
            key=key,
            cause=Cause.MALFORMED,
        ) from error


def _load_from_folder(folder: Path) -> Any:
    """Load as AutoTokenizer does, but without importing it where its choice is known: the import
    loads torch and transformers' generation, which takes seconds."""
    if all((folder / name).is_file() for name in (CONFIG, TOKENIZER_CONFIG, TOKENIZER)):
        settings = read_json(folder / TOKENIZER_CONFIG, TOKENIZER_CONFIG)
        if "auto_map" not in settings:
            model_type = read_json(folder / CONFIG, CONFIG).get("model_type")
            if (known_class := _tokenizer_class(model_type, settings)) is not None:
                return known_class.from_pretrained(folder)
    from transformers import AutoTokenizer

    # Without the argument it may ask on a terminal whether to execute code.
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _tokenizer_class(model_type: str | None, settings: dict[str, Any]) -> Any:
    """Return the tokenizer's class without reading the tokenizer; None if not known. It is the
    class that AutoTokenizer chooses for every DeepSeek-V3 and Qwen2, and for a Llama whose settings
    name it; for Kimi-K2, whose type transformers does not know, that of DeepSeek-V3."""
    if model_type == "qwen2":
        from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

        return Qwen2Tokenizer
    is_plain = model_type == "llama" and settings.get("tokenizer_class") in PLAIN_CLASSES
    if model_type in ("deepseek_v3", "kimi_k2") or is_plain:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    return None


def _is_code(folder: Path) -> bool:
    """Whether the settings name a class of the folder's own."""
    return bool(read_settings_if_there(folder / TOKENIZER_CONFIG).get("auto_map"))


def read_settings_if_there(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; empty where there is no file, or no object in it."""
    content = read_json(path, path.name) if path.is_file() else {}
    return content if isinstance(content, dict) else {}
