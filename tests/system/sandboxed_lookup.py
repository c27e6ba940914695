"""An environment whose tool runs code in the sandboxed interpreter, slowly, and keeps a journal."""

import os
from pathlib import Path

from megatron_r1.agents.shipped_environments import Lookup, Python


class SandboxedLookup:
    """The shipped look-up, whose table is read by the shipped interpreter.

    Args:
        journal: a file that gets a line for every call and for every reward.
        seconds: that a call takes; of rows with an odd seed, forty times as long."""

    def __init__(self, journal: str, seconds: float) -> None:
        self._table, self._python = Lookup(), Python(seconds=60)
        self._journal, self._seconds = Path(journal), seconds

    def reset(self, seed: int, **row: object) -> str:
        self._python.reset()
        self._seed = seed
        return self._table.reset(seed)

    def lookup(self, key: str) -> str:
        value = self._table.lookup(key)
        self._python.python("0")  # the interpreter starts
        self._note("call")
        wait = self._seconds * (40 if self._seed % 2 else 1)
        return self._python.python(f"import time; time.sleep({wait}); print({value!r}, end='')")

    def final_answer(self, text: str) -> None:
        self._table.final_answer(text)

    def get_reward(self) -> float:
        self._note("reward")
        return self._table.get_reward()

    def close(self) -> None:
        self._python.close()

    def _note(self, what: str) -> None:
        with self._journal.open("a") as file:
            print(what, self._seed, os.getpid(), file=file)
