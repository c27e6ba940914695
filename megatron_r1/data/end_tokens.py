"""The tokens that end a response, read from the files of a Hugging Face folder.

A model may end a turn with several tokens: Llama 3 with <|eot_id|>, <|eom_id|> (a tool call) or
<|end_of_text|>, GLM-4.5 with the <|user|> or <|observation|> that begins what follows, gpt-oss with
<|return|> or <|call|>. Engines, rewards, agents and evaluations take all of them for an end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.foreign import read_json

GENERATION, CONFIG = "generation_config.json", "config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

TURN_ENDS = (
    *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|eot|>"),
    *("<|eom|>", "<end_of_turn>", "<|return|>", "<|call|>", "<|end_of_turn|>", "<|eos|>"),
    *("<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>"),
)
"""Added tokens that end a turn in every vocabulary that has them."""
GLM = ("<|user|>", "<|observation|>")
"""Of vocabularies that have both. In others, as Phi's, <|user|> only begins a turn."""
PHI, HARMONY = "<|end|>", "<|channel|>"
"""Phi's end of a turn; where a vocabulary has channels, as gpt-oss's has, it ends one message of
several."""


class EndToken(NamedTuple):
    """One token that ends a response. text: "" where the folder's files do not name it. source: the
    file that says so."""

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
    folder without these files. key: that names the folder, for errors. Raises UserError for an
    eos_token_id that is no token id.

    tokenizer: the folder's, if it is loaded; its files are then not read again."""
    path = Path(folder)
    if tokenizer is not None:
        added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        eos = tokenizer.eos_token_id
    else:
        settings = _read(path / TOKENIZER_CONFIG)
        added = _added_tokens(path, settings)
        name = settings.get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        eos = next((number for number, text in added.items() if text == name), None)
    by_text = {text: number for number, text in added.items()}
    found: dict[int, str] = {} if eos is None else {eos: TOKENIZER_CONFIG}
    for number in _ids(_read(path / GENERATION), path / GENERATION, key):
        found.setdefault(number, GENERATION)
    config = _read(path / CONFIG)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            is_list = isinstance(part.get("eos_token_id"), list)
            for number in _ids(part, path / CONFIG, key):
                if is_list or number in added:
                    found.setdefault(number, CONFIG)
    named = [text for text in TURN_ENDS if text in by_text]
    named += GLM if all(text in by_text for text in GLM) else ()
    named += [PHI] if PHI in by_text and HARMONY not in by_text else []
    for text in named:
        found.setdefault(by_text[text], TOKENIZER)
    size = _vocab_size(config)
    return [
        EndToken(number, added.get(number, ""), source)
        for number, source in found.items()
        if size is None or number < size
    ]


def describe(ends: list[EndToken]) -> str:
    """Return the end tokens as text for a person."""
    return ", ".join(f"{end.text or 'token'} {end.id} ({end.source})" for end in ends)


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, path.name) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _ids(content: Mapping[str, Any], path: Path, key: str) -> list[int]:
    given = content.get("eos_token_id")
    numbers = given if isinstance(given, list) else [] if given is None else [given]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise UserError(
                f"{key}: {path} has eos_token_id {given!r}, and {number!r} is no token id: write "
                "the id of a token, or a list of ids",
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
    added = {}
    decoder = settings.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and str(number).isdigit():
            added[int(number)] = str(token.get("content", ""))
    if added:
        return added
    for token in _read(path / TOKENIZER).get("added_tokens") or ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            added[token["id"]] = str(token.get("content", ""))
    return added
