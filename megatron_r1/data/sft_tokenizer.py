"""Conversations → token ids, and which of them are the assistant's.

The ids are those of one pass of the tokenizer's chat template over the whole conversation. Learned
are the assistant's messages: from behind the header that `add_generation_prompt` writes, through
the token that ends the turn; what a template writes between turns is not. Where a template marks
the assistant's text itself (`{% generation %}`), that mark decides."""

import os
import re
from collections.abc import Sequence
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.chats import THOUGHT_KEYS, Message
from megatron_r1.data.prompt_templates import (
    CHAT_TEMPLATE_NAME,
    PLACEHOLDER,
    find_template,
    render_template,
    system_text,
)
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.sft import SFTExample, has_loss

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
TURN_MARK = "\ue000\ue001"
"""Text that no conversation has, in place of a message to see where that is rendered."""


class SFTTokenizer:
    """The tokenizer of a Hugging Face folder, and the template of conversations.

    Args:
        model_path: the folder.
        template: "chat", or a text with {question}, for conversations of one question;
            None: chat where the tokenizer has a chat template.

    Raises:
        UserError: the folder has no tokenizer, or the template does not fit it."""

    def __init__(self, model_path: str, template: str | None) -> None:
        self._text = PromptTokenizer(model_path, PLACEHOLDER)
        self._tokenizer: Any = self._text.hf_tokenizer
        self._model_path = model_path
        has_chat = bool(self._tokenizer.chat_template)
        self._template = template if template != "chat" else None
        is_chat = template == "chat" or (template is None and has_chat)
        self._chat = (
            PromptTokenizer(model_path, CHAT_TEMPLATE_NAME) if is_chat and has_chat else None
        )
        if template == "chat" and not has_chat:
            raise self._no_template()
        if self._template is not None:
            find_template(self._template, "sft.template")
        template_text = str(self._tokenizer.chat_template)
        self._thoughts = [
            key for key in THOUGHT_KEYS if re.search(rf"[.'\"]{key}\b", template_text)
        ]
        self._marks = has_chat and bool(GENERATION_BLOCK.search(str(self._tokenizer.chat_template)))

    def encode(self, example: SFTExample) -> tuple[list[int], list[bool]]:
        """Return (token ids, whether each is learned) of an example; the first is not.

        Raises:
            UserError: the template refuses the conversation, or does not show its assistant's
                messages.
        """
        if example.messages and self._chat is not None:
            messages = [self._with_thought(message) for message in example.messages]
            return self._encode_conversation(example, self._chat.merge_system_message(messages))
        prompt, response = example.prompt, example.response
        if example.messages:
            prompt, response = self._prompt_and_response(example)
        prompt_ids = self._text.encode(prompt)
        response_ids = self._text.encode_response(response)
        if not prompt_ids:  # a text without a prompt, of a tokenizer that puts nothing in front
            prompt_ids, response_ids = response_ids[:1], response_ids[1:]
        return [*prompt_ids, *response_ids], [False] * len(prompt_ids) + [True] * len(response_ids)

    def _with_thought(self, message: Message) -> Message:
        """Return a message with its thought under the key that the chat template reads; where it
        reads none, the thought stands before the text, as DeepSeek-R1 writes it."""
        thought = next((message[key] for key in THOUGHT_KEYS if message.get(key)), None)
        if not isinstance(thought, str) or any(key in self._thoughts for key in message):
            return message
        message_fields = {key: value for key, value in message.items() if key not in THOUGHT_KEYS}
        if self._thoughts:
            return {**message_fields, self._thoughts[0]: thought}
        return {
            **message_fields,
            "content": f"<think>\n{thought}\n</think>\n\n{message['content']}",
        }

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text, special tokens included."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def _prompt_and_response(self, example: SFTExample) -> tuple[str, str]:
        """Return prompt and response of a conversation in a text template."""
        if self._template is None:
            raise self._no_template(example.location)
        *messages_before, question, answer = (
            example.messages if len(example.messages) > 1 else ({}, {})
        )
        roles = (
            {m["role"] for m in messages_before} - {"system"},
            question.get("role"),
            answer.get("role"),
        )
        is_one = roles == (set(), "user", "assistant")
        if not is_one or example.tools or "tool_calls" in answer:
            raise UserError(
                f"{example.location}: sft.template {self._template!r} is for one question and one "
                "answer, and the conversation has more; use a tokenizer with a chat template",
                key="sft.template",
                cause=Cause.CONFLICT,
            )
        system = system_text(messages_before, "sft.template")
        return render_template(self._template, question["content"], system), answer["content"]

    def _no_template(self, location: str = "") -> UserError:
        prefix = f"{location}: " if location else ""
        return UserError(
            f"{prefix}a conversation is rendered by the tokenizer's chat template, and that of "
            f"{self._model_path} has none; add chat_template.jinja there, or set sft.template to "
            "plain or a text with {question}",
            key="sft.template",
            cause=Cause.MISSING,
        )

    def _encode_conversation(
        self, example: SFTExample, messages: list[Message]
    ) -> tuple[list[int], list[bool]]:
        """Return `encode` of a conversation."""
        text = self._render_conversation(example, messages)
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
        if self._marks and all(has_loss(m) for m in messages if m["role"] == "assistant"):
            are_learned = self._marked_tokens(example, messages)
        else:
            shift = len(messages) - len(example.messages)
            spans = [
                self._message_span(example, messages, number, text)
                for number in range(max(0, example.first_loss_message + shift), len(messages))
                if has_loss(messages[number])
            ]
            are_learned = self._learned_tokens(ids, offsets, spans)
        if ids:
            are_learned[0] = False
        if not any(are_learned):
            raise self._hidden_messages_error(example)
        return ids, are_learned

    def _marked_tokens(self, example: SFTExample, messages: list[Message]) -> list[bool]:
        """Return what the template marks as generated."""
        encoding = self._tokenizer.apply_chat_template(
            messages,
            tools=example.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        are_learned = [bool(mark) for mark in encoding["assistant_masks"]]
        if example.first_loss_message:
            first = len(messages) - len(example.messages) + example.first_loss_message
            start = len(
                self._tokenizer(
                    self._render_conversation(example, messages[:first], prompt=True),
                    add_special_tokens=False,
                )["input_ids"]
            )
            are_learned = [mark and index >= start for index, mark in enumerate(are_learned)]
        return are_learned

    def _message_span(
        self, example: SFTExample, messages: list[Message], number: int, text: str
    ) -> tuple[int, int]:
        """Return where the message of that number begins and ends in the conversation's text, the
        header not included."""
        prompt = (
            self._render_conversation(example, messages[:number], prompt=True) if number else ""
        )
        conversation = self._render_conversation(example, messages[: number + 1])
        if prompt and text.startswith(prompt) and text.startswith(conversation):
            return len(prompt), len(conversation)
        # The template writes earlier turns in another form than the last: without their thoughts.
        marked_message = {"role": "assistant", "content": TURN_MARK}
        marked_text = self._render_conversation(
            example, [*messages[:number], marked_message, *messages[number + 1 :]]
        )
        if TURN_MARK not in marked_text:
            raise self._hidden_messages_error(example)
        begin = len(os.path.commonprefix([text, marked_text]))
        if prompt and text.startswith(prompt):
            begin = len(prompt)
        tail = os.path.commonprefix([text[::-1], marked_text[::-1]])
        return begin, min(len(text), len(text) - len(tail) + len(self._turn_ending(tail[::-1])))

    def _turn_ending(self, tail: str) -> str:
        """Return the start of what follows a message, through the token that ends the turn."""
        end_tokens = [
            token for token in self._tokenizer.all_special_tokens if tail.startswith(token)
        ]
        if end_tokens:
            return max(end_tokens, key=len)
        stripped_tail = tail.lstrip()
        end_tokens = [
            token for token in self._tokenizer.all_special_tokens if stripped_tail.startswith(token)
        ]
        return (
            tail[: len(tail) - len(stripped_tail)] + max(end_tokens, key=len) if end_tokens else ""
        )

    def _learned_tokens(
        self, ids: list[int], offsets: Sequence[tuple[int, int]], spans: list[tuple[int, int]]
    ) -> list[bool]:
        """Return which tokens lie in the spans; of white space behind a turn's end token none."""
        special_ids = set(self._tokenizer.all_special_ids)
        are_learned = [False] * len(ids)
        for begin, end in spans:
            indices = [index for index, (start, stop) in enumerate(offsets) if begin <= start < end]
            indices = [index for index in indices if offsets[index][1] <= end]
            last_index = max(
                (index for index in indices if ids[index] in special_ids), default=None
            )
            if (
                last_index is not None
                and not self._tokenizer.decode(
                    [ids[index] for index in indices if index > last_index]
                ).strip()
            ):
                indices = [index for index in indices if index <= last_index]
            for index in indices:
                are_learned[index] = True
        return are_learned

    def _render_conversation(
        self, example: SFTExample, messages: Sequence[Message], prompt: bool = False
    ) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=example.tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # noqa: BLE001 - a template raises what it likes
            raise UserError(
                f"{example.location}: the chat template of {self._model_path} refuses the "
                f"conversation ({type(error).__name__}: {error}); correct the row, or leave it out",
                key="messages",
                cause=Cause.MALFORMED,
            ) from None

    def _hidden_messages_error(self, example: SFTExample) -> UserError:
        return UserError(
            f"{example.location}: the chat template of {self._model_path} does not show the "
            "assistant's messages, so nothing could be learned; correct the row or the template",
            key="messages",
            cause=Cause.MALFORMED,
        )
