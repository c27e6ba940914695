"""Questions → prompt tokens, response tokens → text: a tokenizer with a template."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_r1.data.byte_decoder import ByteDecoder
from megatron_r1.data.templates import find_template, is_opened, render
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.errors import Cause, UserError


class PromptText:
    """The tokenizer of a Hugging Face folder with one prompt template."""

    def __init__(
        self,
        model_path: str,
        template: str,
        keys: tuple[str, str] = ("model.path", "data.template"),
    ):
        """keys: the recipe's keys that name model and template, for errors. Sets opens_thought:
        whether prompts end with `<think>`, which responses then do not repeat. Raises UserError if
        the folder has no tokenizer, the tokenizer names no end token, or the template is none."""
        self._chat = template == "chat"
        self._template = template if self._chat else find_template(template, keys[1])
        self.tokenizer: Any = load_tokenizer(model_path, keys[0])
        if self._chat and not self.tokenizer.chat_template:
            raise UserError(
                f"{keys[1]}: chat is the tokenizer's own, and that of {model_path} has none; "
                "use r1_zero, plain or a text with {problem}",
                key=keys[1],
                cause=Cause.CONFLICT,
            )
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"model.path {model_path}: the tokenizer names no eos_token",
                key=keys[0],
                cause=Cause.MALFORMED,
            )
        self.end: int = self.tokenizer.eos_token_id
        self._byte_decoder = ByteDecoder.of(self.tokenizer)
        self.opens_thought = is_opened(self.render("?"))

    def render(self, question: str) -> str:
        if not self._chat:
            return render(self._template, question)
        return self._apply_chat_template(_turns(question), tokenize=False)

    def encode(self, question: str) -> list[int]:
        """Return the prompt's token ids, with those that the tokenizer itself puts in front."""
        if self._chat:
            return list(self._apply_chat_template(_turns(question))["input_ids"])
        return self.tokenizer.encode(render(self._template, question))

    def fits(self, question: str, room: int) -> bool:
        """Whether the prompt leaves at least one of `room` tokens for a response."""
        # A token is a byte at least, so most need not be encoded; normalization may double some.
        spare = room - len(self.encode("")) - 2 * len(question.encode("utf-8", "replace"))
        return spare > 0 or len(self.encode(question)) < room

    def encode_response(self, text: str) -> list[int]:
        """Return the token ids of a response, with the end token."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.end]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a response without the end token. Other special tokens stay: tags may
        be among them."""
        if token_ids and token_ids[-1] == self.end:
            token_ids = token_ids[:-1]
        if self._byte_decoder is not None:
            return self._byte_decoder.decode(np.asarray(token_ids, np.int32))
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def _apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)


def _turns(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]
