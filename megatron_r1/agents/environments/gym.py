"""A reasoning-gym task in several steps: an answer is checked, and a wrong one may be corrected.

Rows are those of `data.task`; the scorers are those of the logic reward, with their guards."""

import math
from typing import Any

from r1_grading import grade


class Gym:
    """One tool, `submit`. attempts: answers of an episode. discount: a right answer earns
    `discount` to the power of the wrong ones before it, so that guessing does not pay."""

    done = False

    def __init__(self, attempts: int = 3, discount: float = 0.5) -> None:
        if attempts < 1 or not 0 <= discount <= 1:
            raise ValueError(
                f"agents.parameters: attempts={attempts} must be at least 1, and "
                f"discount={discount} from 0 to 1"
            )
        self._attempts, self._discount = attempts, discount

    def reset(
        self, task: str, entry: dict[str, Any], parameters: dict[str, Any] | None = None
    ) -> None:
        self._row: dict[str, Any] = {"task": task, "entry": entry, "parameters": parameters}
        self._wrong, self._reward = 0, 0.0

    def submit(self, answer: str) -> str:
        """Check an answer to the question. After a wrong one you may submit another.

        Args:
            answer: the final answer alone, without the way to it.
        """
        text = f"<answer>{answer}</answer>"
        if grade("logic", text, **self._row, reading="tags").reward == 1.0:
            self._reward, self.done = math.pow(self._discount, self._wrong), True
            return "right"
        self._wrong += 1
        self.done = self._wrong == self._attempts
        return f"wrong; attempts left: {self._attempts - self._wrong}"

    def final_answer(self, text: str) -> None:
        if text and not self.done:
            self.submit(text.strip())

    def get_reward(self) -> float:
        return self._reward
