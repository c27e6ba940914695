"""The replies of OpenAI-compatible servers: the fields of a completion that this package reads."""

from typing import Generic, TypeVar

import msgspec


class Message(msgspec.Struct):
    """A reply in a chat. A server that parses reasoning removes the thought from `content` and
    returns it as `reasoning_content` or `reasoning`, depending on the server."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChoice(msgspec.Struct):
    """One response from `/chat/completions`; without a message it does not match, and the request
    counts as failed (`service.Service`)."""

    message: Message
    finish_reason: str | None = None


class CompletionChoice(msgspec.Struct):
    """One response: `message` from `/chat/completions`, `text` from `/completions`."""

    finish_reason: str | None = None
    message: Message | None = None
    text: str | None = None


class Usage(msgspec.Struct):
    """The token counts of a request."""

    completion_tokens: int | None = None
    """None where a server does not count tokens."""


ChoiceType = TypeVar("ChoiceType", ChatChoice, CompletionChoice)


class Completion(msgspec.Struct, Generic[ChoiceType]):
    """The body of a reply."""

    choices: list[ChoiceType]
    usage: Usage | None = None
