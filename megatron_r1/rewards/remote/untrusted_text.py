"""Showing a judge or reward model a text that may be written to deceive it."""

from __future__ import annotations

import hashlib
import re

KEY_CHARS = 16
# What chat templates write between turns. In a message these are text, but the server's tokenizer
# reads them as the tokens themselves: a response could end its own turn and begin another.
CONTROL_TOKEN = re.compile(
    r"<(?=[|｜])|(?<=[|｜])>|"
    r"[\[<](?=/?INST\])|<(?=</?SYS>>)|"
    r"<(?=/?(?:s|bos|eos|pad|unk)>)|<(?=(?:start|end)_of_turn>)",
    re.IGNORECASE,
)


def break_control_tokens(text: str) -> str:
    """`text` with every chat control token broken by a space, and in valid UTF-8."""
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")
    return CONTROL_TOKEN.sub(lambda sign: " >" if sign[0] == ">" else f"{sign[0]} ", text)


def cut_middle(text: str, max_chars: int) -> str:
    """At most about `max_chars`: the beginning, a note of what is missing, and as much of the end,
    where answers stand."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    missing = len(text) - 2 * half
    return f"{text[:half]}\n[... {missing} characters left out ...]\n{text[-half:]}"


def fence_key(*parts: object) -> str:
    """A word that cannot stand in any of `parts`, and is the same for the same parts.

    It is a hash of all of them. Whoever writes one part would have to write a text that contains
    its own hash, so the key is as unknown to them as a random one; being a function of the request,
    it lets a repeated request find its cached answer.
    """
    digest = hashlib.sha256()
    for part in parts:
        content = str(part).encode("utf-8", "replace")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:KEY_CHARS]


def fenced(name: str, key: str, text: str) -> str:
    """`text` between two lines that only the holder of `key` can write."""
    return f"[{name} {key}]\n{text}\n[end of {name} {key}]"
