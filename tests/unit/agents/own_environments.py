"""Environments as a user writes them, and mistakes."""

import asyncio
import itertools
import os
import time


class Counter:
    """Documented in part, with coroutines, hanging and crashing methods."""

    start = 0

    def __init__(self, step: int = 1) -> None:
        self.step = step

    async def reset(self, question: str, truth: int = 0, **row) -> str:
        await asyncio.sleep(0)
        if row.get("broken"):
            raise OSError("the server of the game is down")
        self.total, self.truth = self.start, truth
        return f"Count to {truth}."

    async def add(self, number: int = 1, times=1) -> dict:
        """Add to the counter."""
        await asyncio.sleep(0)
        self.total += number * times * self.step
        self.done = self.total >= 100
        return {"total": self.total, "note": "é"}

    def fail(self, reason: str) -> None:
        """Raise.

        Args:
            reason: of the error.
        """
        raise RuntimeError(reason)

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "awake"

    def shout(self) -> None:
        print("x" * 200_000)

    async def wait(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "awake"

    def stuck(self) -> int:
        return sum(itertools.repeat(0))  # in C, with the interpreter's lock

    def crash(self) -> None:
        os._exit(3)

    def get_reward(self) -> float:
        if self.total == 13:
            raise ValueError("13")
        return float("nan") if self.total == 14 else self.total - self.truth


class Ungrading:
    """Graded by the reward of the row's kind."""

    def reset(self, question):
        return None

    def look(self):
        return "7"


class NoTools:
    def reset(self, **row): ...

    def get_reward(self): ...


class NoReset:
    def tool(self): ...


class DoneMethod:
    def reset(self, **row): ...

    def done(self): ...
