"""The protocol of a model that answers the prompts of `eval` and `sample`."""

from collections.abc import Sequence
from typing import Any, Protocol

from megatron_r1.config import AgentsConfig
from megatron_r1.data.chats import Message
from megatron_r1.data.prompt import Prompt
from megatron_r1.evaluation.response import TextResponse


class EvaluatedModel(Protocol):
    """A model that answers questions.

    Attributes:
        concurrency: the number of requests that keep it busy.
        identity: JSON values that must be the same when a run is resumed."""

    concurrency: int
    identity: dict[str, Any]

    async def start(self) -> None:
        """Make the model ready, before the first question.

        Raises:
            RunError: the model cannot be made ready.
        """

    async def respond(
        self, question: str, seed: int, before: Sequence[Message] = ()
    ) -> TextResponse:
        """Sample one response.

        Args:
            question: the user's last message.
            seed: the same gives the same response, as far as the engine can reproduce it.
            before: the messages before the question.
        """

    async def check(self, agents: AgentsConfig, prompts: Sequence[Prompt]) -> None:
        """Raise UserError where episodes of these prompts cannot be played."""

    async def play(self, agents: AgentsConfig, prompt: Prompt, seed: int) -> TextResponse:
        """Play one episode in the environment of `agents`, which may grade the episode.

        Args:
            agents: the environment and its limits.
            prompt: the prompt that the episode begins with.
            seed: the seed of the first turn.

        Raises:
            RunError: episodes fail again and again by no fault of the model."""

    async def close(self) -> None:
        """Release everything. May be called twice, and without `start`."""
