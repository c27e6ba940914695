"""Prepare text for a judge or reward model that may have been written to deceive it."""

from __future__ import annotations

import hashlib
import re

KEY_CHARS = 16
# Control tokens that chat templates write between turns. The server's tokenizer would read their
# text as the tokens themselves: a response could end its own turn and begin another.
CONTROL_TOKEN = re.compile(
    r"<(?=[|｜])|(?<=[|｜])>|"
    r"[\[<](?=/?INST\])|<(?=</?SYS>>)|"
    r"<(?=/?(?:s|bos|eos|pad|unk)>)|<(?=(?:start|end)_of_turn>)",
    re.IGNORECASE,
)


def break_control_tokens(text: str) -> str:
    """Return `text` in valid UTF-8 with every chat control token broken by a space."""
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")
    return CONTROL_TOKEN.sub(lambda sign: " >" if sign[0] == ">" else f"{sign[0]} ", text)


def cut_middle(text: str, max_chars: int) -> str:
    """Cut `text` to about `max_chars`: as much of its beginning as of its end, where the answer
    is, with a note of how much is missing between them."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    missing = len(text) - 2 * half
    return f"{text[:half]}\n[... {missing} characters left out ...]\n{text[-half:]}"


def fence_key(*parts: object) -> str:
    """Return a key that none of `parts` can contain, the same for the same parts.

    It is a hash of all parts. A part that contained it would have to contain its own hash, so the
    author of a part cannot know it, as with a random key; unlike a random key, it lets a repeated
    request find its cached reply.
    """
    digest = hashlib.sha256()
    for part in parts:
        content = str(part).encode("utf-8", "replace")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:KEY_CHARS]


def fenced(name: str, key: str, text: str) -> str:
    """Return `text` between two lines that cannot be written without knowing `key`."""
    return f"[{name} {key}]\n{text}\n[end of {name} {key}]"
