"""Two-hop look-up: the answer to a question is in a table that only the tool can read.

A row's `seed` fixes the table. Every row has another table, so no policy can memorize it.
The question is a key; its value is a key again, whose value is the answer."""

import random
import re

DIGITS = 2


class Lookup:
    """One tool, `lookup`. hops: how many entries must be read one after the other."""

    def __init__(self, hops: int = 2) -> None:
        self._hops = hops

    def reset(self, seed: int, **row: object) -> str:
        self._seed, self._answer = seed, ""
        key = self._draw("question")
        self._truth = key
        for _ in range(self._hops):
            self._truth = self.lookup(self._truth)
        return key

    def lookup(self, key: str) -> str:
        """Return the entry of the table under a key.

        Args:
            key: two digits.
        """
        if not re.fullmatch(rf"\d{{{DIGITS}}}", key):
            raise KeyError(key)
        return self._draw(key)

    def final_answer(self, text: str) -> None:
        self._answer = text.strip()

    def get_reward(self) -> float:
        return float(self._answer == self._truth)

    def _draw(self, name: str) -> str:
        number = random.Random(f"{self._seed}:{name}").randrange(10**DIGITS)
        return f"{number:0{DIGITS}d}"
