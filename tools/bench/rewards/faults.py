"""Graders that break their worker process, for the soak only."""

import os

from r1_grading import Grade


def hang(response: str, truth: object, **entry: object) -> Grade:
    """Stay inside one C call, where Python handles no signals, far longer than the time limit."""
    return Grade(0.0, str(len(str(9 ** (9**9)))))


def leave(response: str, truth: object, **entry: object) -> Grade:
    """End the process."""
    os._exit(3)


def eat(response: str, truth: object, **entry: object) -> Grade:
    """Allocate more memory than a worker may have."""
    return Grade(0.0, str(len(bytearray(2**40))))


def kill(response: str, truth: object, **entry: object) -> Grade:
    """Die of a signal, as a crash inside a library does."""
    os.abort()


FAULTS = ("hang", "leave", "eat", "kill")
