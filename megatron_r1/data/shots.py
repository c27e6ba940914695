"""Worked examples in front of a question: few-shot prompts."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.data.prompts import normalize
from megatron_r1.data.records import read_records, require_text
from megatron_r1.data.templates import find_template, is_opened, render
from megatron_r1.data.text import PromptText
from megatron_r1.rewards.answer import THINK

BETWEEN = "\n\n"


@dataclass(frozen=True)
class Shot:
    """A question and the response that shows how to answer."""

    question: str
    response: str


class Shots:
    """The worked examples of a file, some of them before each question.

    Which ones depends on (seed, question) alone, and a question is never shown its own answer.
    """

    def __init__(self, path: str | Path, num_shots: int | None, seed: int) -> None:
        """num_shots: None for all. Raises ValueError for a bad file, and for more than it has."""
        self.shots = [
            Shot(require_text(place, row, "question"), require_text(place, row, "response"))
            for place, row in read_records(path)
        ]
        if not self.shots:
            raise ValueError(f"sample.shots: {path} holds no worked examples")
        if num_shots is not None and num_shots > len(self.shots):
            raise ValueError(
                f"sample.num_shots: {num_shots} is more than the {len(self.shots)} of {path}"
            )
        self._num_shots, self._seed = num_shots, seed

    @property
    def identity(self) -> str:
        """Changes with what is shown."""
        shown = repr([self.shots, self._num_shots, self._seed])
        return hashlib.sha256(shown.encode("utf-8", "replace")).hexdigest()[:16]

    def before(self, question: str) -> list[Shot]:
        """In the file's order where all are shown, else as drawn."""
        shots = [s for s in self.shots if normalize(s.question) != normalize(question)]
        if self._num_shots is None:
            return shots
        draw = random.Random(f"{self._seed}/{normalize(question)}")
        return draw.sample(shots, min(self._num_shots, len(shots)))

    def turns(self, question: str) -> list[dict[str, str]]:
        """The messages of a chat that ends with `question`."""
        turns = []
        for shot in self.before(question):
            turns.append({"role": "user", "content": shot.question})
            turns.append({"role": "assistant", "content": shot.response})
        return [*turns, {"role": "user", "content": question}]

    def text(self, template: str, question: str) -> str:
        """Every shot as if it had been asked and answered in `template`, then the question."""
        opened = is_opened(render(template, question))
        shown = [
            render(template, shot.question)
            + (shot.response.removeprefix(THINK) if opened else shot.response)
            for shot in self.before(question)
        ]
        return BETWEEN.join([*shown, render(template, question)])


class FewShotText(PromptText):
    """`PromptText` whose prompts begin with the worked examples; `render` is without them."""

    def __init__(self, model_path: str, template: str, shots: Shots) -> None:
        """Raises ValueError too where the tokenizer's chat template drops the thoughts of earlier
        turns, as those of reasoning models do: the examples would show answers without them."""
        super().__init__(model_path, template)
        self._shots = shots
        if self._chat:
            shown = self._apply_chat_template(shots.turns(""), tokenize=False)
            for shot in shots.before(""):
                if shot.response.strip() not in shown:
                    raise ValueError(
                        f"sample.shots: the chat template of {model_path} does not show an earlier "
                        f"answer as it is ({shot.response[:60]!r} …); use a text as data.template"
                    )

    def encode(self, question: str) -> list[int]:
        if self._chat:
            return list(self._apply_chat_template(self._shots.turns(question))["input_ids"])
        return self._tokenizer.encode(self._shots.text(find_template(self._template), question))

    def _apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
