"""Questions → prompt tokens, response tokens → text: prompt templates and a tokenizer with one.

A template says how a question becomes the text that the policy continues."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.chats import Message
from megatron_r1.data.tokenizer import end_tokens, load_tokenizer


class ByteDecoder:
    """Decodes as `tokenizer.decode(ids, skip_special_tokens=False)` does, from a table of every
    token's bytes. The tokenizers' own decode takes 16 ms for 30,000 tokens, 130 s for a rollout of
    8,192 such responses; this one 1 ms.

    Args:
        tokens: id → token in GPT-2's alphabet of bytes; None for an id without a token."""

    def __init__(self, tokens: list[str | None]) -> None:
        alphabet = _byte_alphabet()
        table = [_token_bytes(token or "", alphabet) for token in tokens]
        # The last row is for ids beyond the table, which have no text.
        self._lengths = np.array([*map(len, table), 0], np.int32)
        self._ends = self._lengths.cumsum(dtype=np.int32)
        self._content = np.frombuffer(b"".join(table), np.uint8)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> ByteDecoder | None:
        """Return a decoder for a byte-level transformers tokenizer; None for others, and for one
        that cleans up spaces."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or type(backend.decoder).__name__ != "ByteLevel":
            return None
        size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        decoder = cls([backend.id_to_token(index) for index in range(size)])
        # Neighbors matter where bytes of several tokens make a letter, and to a clean-up.
        ids = np.random.default_rng(0).permutation(size).astype(np.int32)
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return decoder if decoder.decode(ids) == text else None

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of `ids`, int32; bytes that are no UTF-8 become U+FFFD."""
        ids = np.where((ids >= 0) & (ids < len(self._lengths)), ids, len(self._lengths) - 1)
        lengths = self._lengths[ids]
        # Byte i of the text is byte i + shift of the table, with one shift per token. int32: half
        # the time of int64.
        shifts = self._ends[ids] - lengths.cumsum(dtype=np.int32)
        positions = np.repeat(shifts, lengths)
        positions += np.arange(len(positions), dtype=np.int32)
        return self._content.take(positions, mode="clip").tobytes().decode("utf-8", "replace")


def _token_bytes(token: str, alphabet: dict[str, int]) -> bytes:
    """Return a token's bytes. A token with a letter outside the alphabet, which only added tokens
    have, is its UTF-8 form (tokenizers 0.23, pre_tokenizers/byte_level.rs, `decode_chain`)."""
    try:
        return bytes([alphabet[letter] for letter in token])
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's byte of each letter: printable bytes are themselves, the others the letters
    from U+0100."""
    printable_bytes = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable_bytes = [byte for byte in range(256) if byte not in printable_bytes]
    letters = {chr(byte): byte for byte in printable_bytes}
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(unprintable_bytes)}


PLACEHOLDER = "{question}"
SYSTEM = "{system}"
"""Where a text template has the system's message of a question, if it has a place for it."""

TEMPLATE_PLACEHOLDERS = re.compile(r"\{question\}|\{system\}")
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")

CHAT_TEMPLATE_NAME = "chat"
"""Stands for the tokenizer's own chat template (`prompt_tokenizer.PromptTokenizer`)."""

TEMPLATES: dict[str, str] = {
    # DeepSeek-R1 (arXiv 2501.12948), the template of R1-Zero.
    "r1_zero": (
        "A conversation between User and Assistant. The User asks a question and the Assistant "
        "solves it. The Assistant first thinks about the reasoning process and then provides the "
        "answer, enclosed within <think> </think> and <answer> </answer> tags.\n"
        "User: {question}\n"
        "Assistant:"
    ),
    # For models too small to read instructions.
    "plain": "User: {question}\nAssistant:",
}


def find_template(template: str, key: str = "data.template") -> str:
    """Return the text of a template: a name in `TEMPLATES`, or a text with `{question}` in it.

    Args:
        template: the recipe's value.
        key: the recipe's key, for errors.

    Raises:
        UserError: a text without the placeholder.
        ValueError: "chat"."""
    if template == CHAT_TEMPLATE_NAME:
        raise ValueError("the chat template belongs to the tokenizer: use apply_chat_template")
    text = TEMPLATES.get(template, template)
    if PLACEHOLDER not in text:
        former_hint = "; {problem} is {question} now" if "{problem}" in text else ""
        raise UserError(
            f"prompt template {template!r} is neither one of "
            f"{', '.join([*TEMPLATES, CHAT_TEMPLATE_NAME])} "
            f"nor a text with {PLACEHOLDER} where the question goes{former_hint}",
            key=key,
            cause=Cause.UNKNOWN,
        )
    return text


def render_template(template: str, question: str, system: str = "") -> str:
    """Return the prompt text. Braces in the question or elsewhere in the template stay.

    Args:
        template: text with `{question}`.
        question: what stands in its place.
        system: the text for `{system}`; without such a place it stands before the question, with a
            blank line.
    """
    text = find_template(template)
    if system and SYSTEM not in text:
        question = f"{system}\n\n{question}"
    texts = {PLACEHOLDER: question, SYSTEM: system}
    # One pass: a question that contains "{system}" keeps it.
    return TEMPLATE_PLACEHOLDERS.sub(lambda match: texts[match[0]], text)


def _closed_thought(prompt_text: str) -> str:
    """Return the empty thought with which a rendered prompt ends, as templates write it that
    switch thinking off; "" without one."""
    match = EMPTY_THOUGHT.search(prompt_text)
    return match[0] if match else ""


def opens_thought(prompt_text: str) -> bool:
    """Whether a rendered prompt ends inside the thought, which rewards call `thought_opened`."""
    return prompt_text.rstrip().endswith("<think>")


PROBE = "a message of the system"
"""A text by which it is seen whether a template shows a system's message."""


class PromptTokenizer:
    """The tokenizer of a Hugging Face folder with one prompt template.

    Attributes:
        opens_thought: whether prompts end with `<think>`, which responses then do not repeat.
        closed_thought: the empty thought with which prompts end, "" without one.
        end: the token that ends a written response.
        end_tokens: all that end a sampled one.
        stop_token_ids: their ids and the given ones."""

    def __init__(
        self,
        model_path: str,
        template: str,
        keys: tuple[str, str] = ("model.path", "data.template"),
        stop_token_ids: Sequence[int] = (),
    ):
        """Load the tokenizer and read the template.

        Args:
            model_path: the Hugging Face folder.
            template: a template's name or text, or "chat" for the tokenizer's own.
            keys: the recipe's keys that name model and template, for errors.
            stop_token_ids: tokens that end a response besides the model's own
                (`rollout.stop_token_ids`).

        Raises:
            UserError: the folder has no tokenizer, the tokenizer names no end token or lacks one of
                stop_token_ids, or the template is not one."""
        self._chat, self._key = template == "chat", keys[1]
        self._template = template if self._chat else find_template(template, keys[1])
        self.hf_tokenizer: Any = load_tokenizer(model_path, keys[0])
        if self._chat and not self.hf_tokenizer.chat_template:
            raise UserError(
                f"{keys[1]}: chat is the tokenizer's own, and that of {model_path} has none; "
                "use r1_zero, plain or a text with {question}",
                key=keys[1],
                cause=Cause.CONFLICT,
            )
        if self.hf_tokenizer.eos_token_id is None:
            raise UserError(
                f"model.path {model_path}: the tokenizer names no eos_token",
                key=keys[0],
                cause=Cause.MALFORMED,
            )
        self.end: int = self.hf_tokenizer.eos_token_id
        self.end_tokens = end_tokens(model_path, keys[0], self.hf_tokenizer)
        end_ids = [end_token.id for end_token in self.end_tokens]
        for token in stop_token_ids:
            if token >= (size := len(self.hf_tokenizer)):
                raise UserError(
                    f"rollout.stop_token_ids: {token} is no token of {model_path}, which has "
                    f"{size:,}: 0 to {size - 1}",
                    key="rollout.stop_token_ids",
                    cause=Cause.OUT_OF_RANGE,
                )
        self.stop_token_ids = [*dict.fromkeys([*end_ids, *stop_token_ids])]
        special_ids = self.hf_tokenizer.all_special_ids
        self._silent = {*end_ids, *(token for token in stop_token_ids if token in special_ids)}
        self._byte_decoder = ByteDecoder.from_tokenizer(self.hf_tokenizer)
        self._start = self._text_in_front()
        prompt = self.render("?")
        self.opens_thought, self.closed_thought = opens_thought(prompt), _closed_thought(prompt)

    def render(self, question: str, before: Sequence[Message] = ()) -> str:
        """Return the prompt's text.

        Args:
            question: the user's last message.
            before: the messages before the question.

        Raises:
            UserError: for turns before it where the template is a text with one question.
        """
        if not self._chat:
            return render_template(self._template, question, system_text(before, self._key))
        return self._apply_chat_template(self._chat_turns(question, before), tokenize=False)

    def encode(self, question: str, before: Sequence[Message] = ()) -> list[int]:
        """Return the prompt's token ids, with those that the tokenizer itself puts in front.
        Arguments and errors are those of `render`."""
        if self._chat:
            return list(self._apply_chat_template(self._chat_turns(question, before))["input_ids"])
        return self._encode_text(
            render_template(self._template, question, system_text(before, self._key))
        )

    def _encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text, with the tokenizer's own in front, unless the text begins
        with them already."""
        is_whole = bool(self._start) and text.startswith(self._start)
        return self.hf_tokenizer.encode(text, add_special_tokens=not is_whole)

    def _text_in_front(self) -> str:
        """Return the text of the special tokens that the tokenizer puts in front of a text."""
        letter_ids = self.hf_tokenizer.encode("a", add_special_tokens=False)
        ids = self.hf_tokenizer.encode("a")
        counts = [
            index
            for index in range(len(ids))
            if letter_ids and ids[index : index + len(letter_ids)] == letter_ids
        ]
        return "".join(self.hf_tokenizer.convert_ids_to_tokens(ids[: counts[0]])) if counts else ""

    def fits(self, question: str, limit: int, before: Sequence[Message] = ()) -> bool:
        """Whether the prompt leaves at least one of `limit` tokens for a response.

        Args:
            question: the question.
            limit: the most tokens of prompt and response.
            before: the messages before the question."""
        # A token is a byte at least, so most need not be encoded; normalization may double some.
        texts = [question, *(str(value) for message in before for value in message.values())]
        num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
        num_spare = limit - len(self.encode("")) - 2 * num_bytes - 32 * len(before)
        return num_spare > 0 or len(self.encode(question, before)) < limit

    @cached_property
    def shows_system(self) -> bool:
        """Whether the prompt shows a system's message where the template has a place for it. Some
        chat templates refuse such a message, or leave it out: there it stands in front of the first
        message of the user."""
        if not self._chat:
            return SYSTEM in self._template
        probe = {"role": "system", "content": PROBE}
        try:
            text = self._apply_chat_template([probe, *_user_turns("?")], tokenize=False)
        except Exception:  # noqa: BLE001 - a template raises what it likes
            return False
        return PROBE in text

    def _chat_turns(self, question: str, before: Sequence[Message]) -> list[Message]:
        return self.merge_system_message([*before, *_user_turns(question)])

    def merge_system_message(self, turns: Sequence[Message]) -> list[Message]:
        """Return a conversation with the system's message in front of the first of the user, where
        the template has no place for a system."""
        turns = list(turns)
        users = (index for index, turn in enumerate(turns) if turn["role"] == "user")
        first = next(users, None)
        if first is None or turns[0]["role"] != "system" or self.shows_system:
            return turns
        content = f"{turns[0]['content']}\n\n{turns[first]['content']}"
        turns[first] = {**turns[first], "content": content}
        return turns[1:]

    def encode_response(self, text: str) -> list[int]:
        """Return the token ids of a response, with the end token."""
        return [*self.hf_tokenizer.encode(text, add_special_tokens=False), self.end]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a response without the token that ended it, if that is one of
        end_tokens or special. Other special tokens stay: tags may be among them."""
        if len(token_ids) and token_ids[-1] in self._silent:
            token_ids = token_ids[:-1]
        if self._byte_decoder is not None:
            return self._byte_decoder.decode(np.asarray(token_ids, np.int32))
        return self.hf_tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def _apply_chat_template(self, turns: Sequence[Message], **options: Any) -> Any:
        return self.hf_tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=True, **options
        )


def _user_turns(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]


def system_text(before: Sequence[Message], key: str) -> str:
    """Return the text of the system messages before a question, for a template with a place for one
    question.

    Args:
        before: the messages before the question.
        key: the template's setting.

    Raises:
        UserError: for any other turn.
    """
    if misplaced_message := next((m for m in before if m["role"] != "system"), None):
        raise UserError(
            f"{key}: a text has a place for one question, and a question of the data has turns "
            f"before it ({misplaced_message['role']}: {misplaced_message['content'][:40]!r}); "
            "use chat",
            key=key,
            cause=Cause.CONFLICT,
        )
    return "\n\n".join(message["content"] for message in before)
