"""Few-shot prompts: worked examples in front of a question."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1_grading.reading import THINK

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.chats import Message
from megatron_r1.data.prompt import normalize_question
from megatron_r1.data.prompt_templates import opens_thought, render_template, system_text
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.rows import read_canonical_rows, require_text

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Shot:
    """A worked example: a question with a response."""

    question: str
    response: str


class FewShotExamples:
    """The worked examples of a file, some of which precede each question. The choice depends on
    (seed, question) alone, and never includes the question itself.

    Args:
        path: the examples' file, of `read_canonical_rows`.
        num_shots: per question; None: all.
        seed: the seed of the choice.

    Raises:
        UserError: for a bad or too small file.
    """

    def __init__(self, path: str | Path, num_shots: int | None, seed: int) -> None:
        self.shots = [
            Shot(require_text(location, row, "question"), require_text(location, row, "response"))
            for location, row in read_canonical_rows(path, key="sample.shots")
        ]
        if not self.shots:
            raise UserError(
                f"sample.shots: {path} holds no worked examples",
                key="sample.shots",
                cause=Cause.EMPTY,
            )
        if num_shots is not None and num_shots > len(self.shots):
            raise UserError(
                f"sample.num_shots: {num_shots} is more than the {len(self.shots)} of {path}",
                key="sample.num_shots",
                cause=Cause.TOO_LARGE,
            )
        self._num_shots, self._seed = num_shots, seed

    @property
    def identity(self) -> str:
        """A digest of the examples and their choice."""
        content = repr([self.shots, self._num_shots, self._seed])
        return hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()[:16]

    def choose(self, question: str) -> list[Shot]:
        """Return the examples before `question`: all in the file's order, or some as drawn."""
        shots = [
            s for s in self.shots if normalize_question(s.question) != normalize_question(question)
        ]
        if self._num_shots is None:
            return shots
        draw = random.Random(f"{self._seed}/{normalize_question(question)}")
        return draw.sample(shots, min(self._num_shots, len(shots)))

    def chat_messages(self, question: str) -> list[Message]:
        """Return the messages of a chat that ends with `question`."""
        turns: list[Message] = []
        for shot in self.choose(question):
            turns.append({"role": "user", "content": shot.question})
            turns.append({"role": "assistant", "content": shot.response})
        return [*turns, {"role": "user", "content": question}]

    def prompt_text(self, template: str, question: str, before: Sequence[Message] = ()) -> str:
        """Return every example as if asked and answered in `template`, then the question.

        Args:
            template: text with `{question}`.
            question: what the prompt asks.
            before: the messages before it, in which only a system's is allowed.

        Raises:
            UserError: `before` has a message other than a system's.
        """
        thought_opened = opens_thought(render_template(template, question))
        examples = [
            render_template(template, shot.question)
            + (shot.response.removeprefix(THINK) if thought_opened else shot.response)
            for shot in self.choose(question)
        ]
        system = system_text(before, "data.template")
        return SEPARATOR.join([*examples, render_template(template, question, system)])


class FewShotTokenizer(PromptTokenizer):
    """A `PromptTokenizer` whose prompts begin with worked examples; `render` leaves them out."""

    def __init__(
        self,
        model_path: str,
        template: str,
        shots: FewShotExamples,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        """Load the tokenizer.

        Args:
            model_path: the Hugging Face folder.
            template: as for `PromptTokenizer`.
            shots: the worked examples.
            stop_token_ids: as for `PromptTokenizer`.

        Raises:
            UserError: the folder has no tokenizer, the tokenizer names no end token or lacks one of
                stop_token_ids, the template is not one, or the chat template drops the thoughts of
                earlier turns, as templates of reasoning models do: the worked examples would lack
                their thoughts."""
        super().__init__(model_path, template, stop_token_ids=stop_token_ids)
        self._shots = shots
        if self._chat:
            rendering = self._apply_chat_template(shots.chat_messages(""), tokenize=False)
            for shot in shots.choose(""):
                if shot.response.strip() not in rendering:
                    raise UserError(
                        f"sample.shots: the chat template of {model_path} does not show an earlier "
                        f"answer as it is ({shot.response[:60]!r} …); use a text as data.template",
                        key="sample.shots",
                        cause=Cause.CONFLICT,
                    )

    def encode(self, question: str, before: Sequence[Message] = ()) -> list[int]:
        """Return the tokens of the question behind its examples and the messages `before`."""
        if self._chat:
            turns = [*before, *self._shots.chat_messages(question)]
            return list(self._apply_chat_template(turns)["input_ids"])
        return self._encode_text(self._shots.prompt_text(self._template, question, before))
