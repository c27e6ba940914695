"""Finds the tokens that end a response, in the files of a Hugging Face folder.

A model may end a turn with several tokens: Llama 3 with <|eot_id|>, <|eom_id|> (a tool call) or
<|end_of_text|>, GLM-4.5 with the <|user|> or <|observation|> that begins what follows, gpt-oss
with <|return|> or <|call|>. Engines, rewards, agents and evaluations take all of them for an
end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.tokenizer import (
    CONFIG,
    END_TOKEN_FILES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    read_settings_if_there,
)

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
        settings = read_settings_if_there(path / TOKENIZER_CONFIG)
        added_tokens = _added_tokens(path, settings)
        name = settings.get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        eos = next((number for number, text in added_tokens.items() if text == name), None)
    by_text = {text: number for number, text in added_tokens.items()}
    file_by_id: dict[int, str] = {} if eos is None else {eos: TOKENIZER_CONFIG}
    for number in _end_ids(
        read_settings_if_there(path / END_TOKEN_FILES), path / END_TOKEN_FILES, key
    ):
        file_by_id.setdefault(number, END_TOKEN_FILES)
    config = read_settings_if_there(path / CONFIG)
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
    for token in read_settings_if_there(path / TOKENIZER).get("added_tokens") or ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            added_tokens[token["id"]] = str(token.get("content", ""))
    return added_tokens
