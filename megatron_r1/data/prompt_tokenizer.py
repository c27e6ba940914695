"""Questions → prompt tokens, response tokens → text: a tokenizer with a prompt template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.byte_decoder import ByteDecoder
from megatron_r1.data.chats import Message
from megatron_r1.data.end_tokens import end_tokens
from megatron_r1.data.prompt_templates import (
    SYSTEM,
    empty_thought_in,
    find_template,
    opens_thought,
    render_template,
    system_text,
)
from megatron_r1.data.tokenizer import load_tokenizer

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
        self.opens_thought, self.closed_thought = opens_thought(prompt), empty_thought_in(prompt)

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
