"""The continuation rule: the next prompt of a conversation, with the tokens already sampled.

To render a conversation anew gives other tokens than were sampled: other merges of the same text,
other blanks in the JSON of a tool call, thinking that is dropped. So:

1. The deepest sampled turn whose whole conversation begins the request is continued
(`conversation_matching`). 2. Its tokens stay. If it was cut, the token that closes a turn is
appended; where it ended with the token that begins the next message (GLM's <|user|>,
<|observation|>), that is not written again. 3. The tokens of the new messages are appended: what
the template writes after a short conversation of the same shape (`_rendered_suffix`). 4. Where the
template rewrites what stands before, or no turn matches, the whole request is rendered as a new
branch.

Where sampled tokens are those that the tokenizer itself would choose, this equals a full render."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from megatron_r1.agents.conversation_matching import NextPrompt, deepest_match, template_form
from megatron_r1.agents.token_tree import Message, TokenTree
from megatron_r1.data.end_tokens import EndToken

PROBE_TEXT = "answer-7c1e"
"""The answer of a probe conversation, which shows what a template writes after an answer."""
WORD_JOINER = "\u2060"


class RenderError(ValueError):
    """The chat template refuses a request's messages."""


class Continuation:
    """A tokenizer's chat template, applied by the continuation rule."""

    def __init__(self, tokenizer: Any, ends: Sequence[EndToken] = ()) -> None:
        """Prepare the template of a tokenizer.

        Args:
            tokenizer: a tokenizer of transformers, with a chat template.
            ends: the tokens that end an answer; by default the tokenizer's eos_token."""
        self._tokenizer = tokenizer
        self.vocabulary_size = len(tokenizer)
        special_patterns = [
            re.escape(str(t)) for t in tokenizer.added_tokens_decoder.values() if t.special
        ]
        self._special = re.compile("|".join(sorted(special_patterns, reverse=True)) or r"(?!)")
        user = {"role": "user", "content": "u"}
        answer = {"role": "assistant", "content": PROBE_TEXT}
        self._written = self._rendered_text([user, answer]).rpartition(PROBE_TEXT)[2]
        self._ends = {end.id: end.text for end in ends if end.text}
        self._ends.setdefault(tokenizer.eos_token_id, tokenizer.eos_token)

    def next_prompt(
        self, tree: TokenTree, messages: Sequence[Message], tools: Sequence[Message] = ()
    ) -> NextPrompt:
        """Return what to append to `tree` for a request.

        Args:
            tree: the tokens of the episode so far.
            messages: the request's conversation, in OpenAI's form.
            tools: the descriptions of its tools, in OpenAI's form.

        Raises:
            RenderError: the chat template refuses the messages.
        """
        node, count = deepest_match(tree, messages, tools)
        if node is not None:
            new_messages = messages[count:]
            suffix = self._rendered_suffix(tree.messages(node), new_messages, tools)
            if suffix is not None:
                sampled_ids = tree.nodes[node].token_ids
                tokens = self._ids_to_append(sampled_ids[-1] if sampled_ids else None, *suffix)
                return NextPrompt(node, tokens, tuple(new_messages))
        return NextPrompt(None, self.render(messages, tools), tuple(messages))

    def render(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> list[int]:
        """Return the tokens of a conversation up to the next answer.

        Args:
            messages: the conversation.
            tools: the descriptions of the tools, in OpenAI's form.

        Raises:
            RenderError: the chat template refuses the messages.
        """
        return self._encode_text(self._rendered_text(messages, tools, add_generation_prompt=True))

    def can_render(self, answer: Message, tools: Sequence[Message] = ()) -> bool:
        """Return whether the template accepts an answer's tool calls and their results. It is True
        where the template refuses all calls, as an agent may write results in other roles."""
        calls = answer.get("tool_calls") or ()
        if not calls:
            return True
        function = {"name": calls[0]["function"]["name"], "arguments": {}}
        minimal_answer = {**answer, "tool_calls": [{**calls[0], "function": function}]}
        return self._renders_calls(answer, tools) or not self._renders_calls(minimal_answer, tools)

    def _renders_calls(self, answer: Message, tools: Sequence[Message]) -> bool:
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": "r"}
            for call in answer["tool_calls"]
        ]
        try:
            self._rendered_text([{"role": "user", "content": "u"}, answer, *results], tools)
        except RenderError:
            return False
        return True

    def renders_tools(self, tools: Sequence[Message]) -> bool:
        """Return whether the template writes the tools into a prompt."""
        question: list[Message] = [{"role": "user", "content": "u"}]
        try:
            return self._rendered_text(question, tools) != self._rendered_text(question)
        except RenderError:
            return False

    def probe(self, tools: Sequence[Message]) -> dict[str, str]:
        """Return for each kind of message that may follow an answer whether the template continues
        it `exact`, in a `new branch`, or `refuses` it."""
        name = tools[0]["function"]["name"] if tools else ""
        call = {"type": "function", "function": {"name": name, "arguments": {}}}
        call_fields, thought_fields = {"tool_calls": [call]}, {"reasoning_content": "r"}
        cases: dict[str, tuple[str, dict[str, Any]]] = {
            "a question after an answer": ("user", {}),
            "a question after thinking": ("user", thought_fields),
        }
        if tools:
            cases["a result after a call"] = ("tool", call_fields)
            cases["a result after thinking"] = ("tool", call_fields | thought_fields)
        return {name: self._continuation_verdict(*case, tools) for name, case in cases.items()}

    def _continuation_verdict(
        self, role: str, answer: dict[str, Any], tools: Sequence[Message]
    ) -> str:
        new_message = {"role": role, "content": "n"}
        turn = {"role": "assistant", "content": "", **answer}
        history = [{"role": "user", "content": "u"}, turn, new_message, turn]
        if self._rendered_suffix(history, [new_message], tools) is not None:
            return "exact"
        try:
            self.render([*history, new_message], tools)
        except RenderError:
            return "refused"
        return "new branch"

    def _ids_to_append(self, last: int | None, written: str, new: str) -> list[int]:
        """Return the tokens to append behind an answer."""
        for closing_id, text in self._ends.items():
            if written.startswith(text):
                missing_ids = [] if last == closing_id else [closing_id]
                return missing_ids + self._encode_text(written[len(text) :] + new)
        text_behind = written + new
        # Without a closing token the answer may have ended with what begins the next message.
        return self._encode_text(
            text_behind if last is None else text_behind.removeprefix(self._ends.get(last, ""))
        )

    def _text_after_answer(self, answer: str) -> str:
        """Return what the template writes behind an answer, of the text of the whole answer."""
        start = max((answer.rfind(end) for end in self._ends.values()), default=-1)
        return self._written if start < 0 else answer[start:]

    def _rendered_suffix(
        self, history: Sequence[Message], new: Sequence[Message], tools: Sequence[Message]
    ) -> tuple[str, str] | None:
        """Return what the template writes behind the last message of `history`, an answer, and then
        for `new`; None where it then writes other text for what stands before.

        It is found on a short conversation of the same shape, because the real one has answers that
        the template would spell otherwise."""
        # Some templates write an empty thought into a last answer without reasoning, and drop it
        # once another message follows: such an answer may be continued from either form.
        for thinks in (True,) if _has_reasoning(history[-1]) else (True, False):
            messages = _sample_conversation(history, thinks)
            try:
                prompt = self._rendered_text(messages[:-1], tools)
                history_text = self._rendered_text(messages, tools)
                full_text = self._rendered_text(
                    [*messages, *new], tools, add_generation_prompt=True
                )
            except RenderError:
                return None
            if full_text.startswith(history_text) and full_text.startswith(prompt):
                return self._text_after_answer(history_text[len(prompt) :]), full_text[
                    len(history_text) :
                ]
        return None

    def _rendered_text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [self._without_control(template_form(message)) for message in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
            raise RenderError(f"the chat template refuses the messages: {error}") from None

    def _without_control(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the message; a tool's result with an invisible character within each special
        token, so that text which a tool has read cannot end its turn and begin another."""
        if message["role"] != "tool":
            return message
        text = self._special.sub(lambda m: m[0][0] + WORD_JOINER + m[0][1:], message["content"])
        return {**message, "content": text}

    def _encode_text(self, text: str) -> list[int]:
        # Half a surrogate pair, which JSON may hold, is no text to a tokenizer.
        text = text.encode("utf-8", "replace").decode()
        return self._tokenizer.encode(text, add_special_tokens=False)


def _has_reasoning(message: Message) -> bool:
    return bool(message.get("reasoning_content") or message.get("reasoning"))


def _sample_conversation(history: Sequence[Message], thinks: bool) -> list[Message]:
    """Return a short conversation of the shape of `history`, with an earlier answer, if `history`
    has any: some templates rewrite all answers but the last one."""
    conversation: list[Message] = [{"role": "user", "content": "u"}]
    if history[0]["role"] in ("system", "developer"):
        conversation.insert(0, {"role": history[0]["role"], "content": "s"})
    earlier_answers = [message for message in history[:-1] if message["role"] == "assistant"]
    if earlier_answers:
        thought = thinks or any(map(_has_reasoning, earlier_answers))
        conversation += [
            _sample_answer(earlier_answers[-1], thought),
            {**history[-2], "content": "m"},
        ]
    return [*conversation, _sample_answer(history[-1], thinks)]


def _sample_answer(answer: Message, thinks: bool) -> Message:
    sample: dict[str, Any] = {"role": "assistant", "content": "x"}
    if thinks:
        sample["reasoning_content"] = "r"
    if answer.get("tool_calls"):
        sample["tool_calls"] = answer["tool_calls"]
    return sample
