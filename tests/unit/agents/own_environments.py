"""Environments as a user writes them, and mistakes."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import enum
import functools
import itertools
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from megatron_r1.base.errors import RunError

if TYPE_CHECKING:
    from nowhere import Unknown

print("x" * 200_000 + " loaded", end="")  # what a slow import may print
np.random.random()  # a fork gets the generator's state


class Prepared:
    """Prepares a file before the first episode."""

    @classmethod
    def _before_episodes(cls, path: str) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write("prepared ")

    def __init__(self, path: str) -> None:
        self.path = path

    def reset(self, **row) -> str:
        return Path(self.path).read_text()

    def look(self) -> str:
        """Look."""
        return "nothing"


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
        raise (RunError if reason == "the machine" else RuntimeError)(reason)

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


def doubled(method):
    """A decorator without functools.wraps."""

    def wrapper(self, *args, **kwargs):
        return 2 * method(self, *args, **kwargs)

    return wrapper


class Unusual:
    """Methods that are no plain functions, results that are no plain JSON, an end that fails."""

    def __init__(self, folder: str = "") -> None:
        self._folder = folder

    def reset(self, question: str) -> None:
        self.done = np.zeros(1)

    @staticmethod
    def add(number: int, other: int) -> int:
        return number + other

    @classmethod
    def name(cls, prefix: str) -> str:
        return prefix + cls.__name__

    @functools.lru_cache  # noqa: B019
    def square(self, number: int) -> int:
        return number**2

    @doubled
    def twice(self, number):
        return number

    @functools.cached_property
    def table(self):
        return {}

    def results(self, name: str):
        cycle: list = []
        cycle.append(cycle)
        return {
            "array": np.arange(3),
            "mixed": {"a": np.int64(1), "b": np.float32(0.5), "c": Path("é")},
            "keys": {(0, 1): 2},
            "cycle": cycle,
            "long": "x" * 2**21,
        }[name]

    def fail_at_length(self):
        raise ValueError("y" * 2**21)

    def end(self):
        self.done = np.zeros(2)
        return "ended"

    def noise(self) -> int:
        return int(np.random.randint(2**31))

    def start_program(self) -> int:
        return subprocess.Popen(["sleep", "600"]).pid

    def close(self) -> None:
        if self._folder:
            Path(self._folder, f"closed-{os.getpid()}").touch()


class Direction(enum.Enum):
    NORTH = "north"
    SOUTH = "south"


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Room:
    at: Point
    exits: set[Direction]
    seen: datetime.date | None = None


class Typed:
    """Arguments and results of types that JSON does not have."""

    def reset(self, question, /, seed: int | None = None) -> None:
        self.at = Point(0, 0)

    async def go(self, direction: Direction, since: datetime.date | None = None) -> Room:
        """Go one step.

        Args:
            direction: where to.
            since: of the journey.
        """
        return Room(self.at, {direction}, since)

    def jump(self, to: Point, way: Literal["run", "fly"] = "run") -> Point:
        self.at = to
        return to

    def rooms(self, rooms: list[Room]) -> int:
        assert all(type(direction) is Direction for room in rooms for direction in room.exits)
        return len(rooms)

    def name(self, text: str, limit: int = None):
        yield text
        yield limit

    def add(self, number: int, /, other: Unknown) -> Unknown:
        return number + other

    def get_reward(self):
        return np.bool_(self.at == (1, 2))


class WordlessError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class Rude:
    """Fails where nothing should: in the text of an error, and at the end."""

    def __init__(self, at_close: str = "") -> None:
        self._at_close = at_close

    def reset(self, question) -> None: ...

    def fail(self) -> None:
        raise WordlessError

    def add(self, number: int, *more: int, **named: int) -> int:
        """Add numbers.

        Args:
            number: the first.
            more: others.
            named: others with names.
        """
        return number + sum(more) + sum(named.values())

    def get_reward(self) -> float:
        return float("inf") if self._at_close == "no number" else 0.5

    def close(self) -> None:
        if self._at_close == "raise":
            raise ValueError("at the end")
        if self._at_close == "hang":
            time.sleep(10_000)
        if self._at_close == "exit":
            os._exit(1)


class NoTools:
    def reset(self, **row): ...

    def get_reward(self): ...


class NoReset:
    def tool(self): ...


class DoneMethod:
    def reset(self, **row): ...

    def done(self): ...
