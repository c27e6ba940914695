"""The tokenizer of a Hugging Face folder: loading it, and the tokens that end a response, read from
the folder's files.

A model may end a turn with several tokens: Llama 3 with <|eot_id|>, <|eom_id|> (a tool call) or
<|end_of_text|>, GLM-4.5 with the <|user|> or <|observation|> that begins what follows, gpt-oss
with <|return|> or <|call|>. Engines, rewards, agents and evaluations take all of them for an
end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    return bool(_read_if_there(folder / TOKENIZER_CONFIG).get("auto_map"))


TURN_ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|eot|>",
    "<|eom|>",
    "<end_of_turn>",
    "<|return|>",
    "<|call|>",
    "<|end_of_turn|>",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>",
)
"""Added tokens that end a turn in every vocabulary that has them."""
GLM = ("<|user|>", "<|observation|>")
"""Of vocabularies that have both. In others, as Phi's, <|user|> only begins a turn."""
PHI, HARMONY = "<|end|>", "<|channel|>"
"""Phi's end of a turn; where a vocabulary has channels, as gpt-oss's has, it ends one message of
several."""


class EndToken(NamedTuple):
    """One token that ends a response.

    Attributes:
        id: the token's id.
        text: "" where the folder's files do not name it.
        source: the file that says so.
    """

    id: int
    text: str
    source: str


def end_tokens(
    folder: str | Path, key: str = "model.path", tokenizer: Any = None
) -> list[EndToken]:
    """Return the tokens of `folder` that end a response, each once, the tokenizer's eos_token
    first.

    They are eos_token of tokenizer_config.json, every eos_token_id of generation_config.json and of
    a list in config.json, one of config.json that is an added token (transformers writes a default
    of its own for configurations without), and added tokens with a name of `TURN_ENDS`, `GLM` or
    `PHI`; of these, those that the model's vocabulary has, as it samples no others. Empty for a
    folder without these files.

    Args:
        folder: in Hugging Face format.
        key: that names the folder, for errors.
        tokenizer: the folder's, if it is loaded; its files are then not read again.

    Raises:
        UserError: for an eos_token_id that is no token id.
    """
    path = Path(folder)
    if tokenizer is not None:
        added_tokens = {
            number: str(token) for number, token in tokenizer.added_tokens_decoder.items()
        }
        eos = tokenizer.eos_token_id
    else:
        settings = _read_if_there(path / TOKENIZER_CONFIG)
        added_tokens = _added_tokens(path, settings)
        name = settings.get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        eos = next((number for number, text in added_tokens.items() if text == name), None)
    by_text = {text: number for number, text in added_tokens.items()}
    file_by_id: dict[int, str] = {} if eos is None else {eos: TOKENIZER_CONFIG}
    for number in _end_ids(_read_if_there(path / END_TOKEN_FILES), path / END_TOKEN_FILES, key):
        file_by_id.setdefault(number, END_TOKEN_FILES)
    config = _read_if_there(path / CONFIG)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            is_list = isinstance(part.get("eos_token_id"), list)
            for number in _end_ids(part, path / CONFIG, key):
                if is_list or number in added_tokens:
                    file_by_id.setdefault(number, CONFIG)
    end_texts = [text for text in TURN_ENDS if text in by_text]
    end_texts += GLM if all(text in by_text for text in GLM) else ()
    end_texts += [PHI] if PHI in by_text and HARMONY not in by_text else []
    for text in end_texts:
        file_by_id.setdefault(by_text[text], TOKENIZER)
    size = _vocab_size(config)
    return [
        EndToken(number, added_tokens.get(number, ""), source)
        for number, source in file_by_id.items()
        if size is None or number < size
    ]


def describe_end_tokens(ends: list[EndToken]) -> str:
    """Return the end tokens as text for a person."""
    return ", ".join(f"{end.text or 'token'} {end.id} ({end.source})" for end in ends)


def _read_if_there(path: Path) -> dict[str, Any]:
    content = read_json(path, path.name) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _end_ids(content: Mapping[str, Any], path: Path, key: str) -> list[int]:
    token_ids = content.get("eos_token_id")
    numbers = token_ids if isinstance(token_ids, list) else [] if token_ids is None else [token_ids]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise UserError(
                f"{key}: {path} has eos_token_id {token_ids!r}, and {number!r} is no token id: "
                "write the id of a token, or a list of ids",
                key=key,
                cause=Cause.MALFORMED,
            )
    return numbers


def _vocab_size(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that the model has, None where its config.json does not say."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(size := part.get("vocab_size"), int):
            return size
    return None


def _added_tokens(path: Path, settings: Mapping[str, Any]) -> dict[int, str]:
    """Return id → text of the tokens that are no pieces of text."""
    added_tokens = {}
    decoder = settings.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and str(number).isdigit():
            added_tokens[int(number)] = str(token.get("content", ""))
    if added_tokens:
        return added_tokens
    for token in _read_if_there(path / TOKENIZER).get("added_tokens") or ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            added_tokens[token["id"]] = str(token.get("content", ""))
    return added_tokens
