"""A user's own reward: any policy, however bad, earns it sometimes."""

from r1_grading import Grade


def grade(response: str, truth, **entry) -> Grade:
    """1 for a response of an odd number of characters."""
    return Grade(float(len(response) % 2), f"{len(response)} characters")


def general(response: str, truth, **entry) -> Grade:
    """1 for a response of an even number of characters."""
    return Grade(float(len(response) % 2 == 0), f"{len(response)} characters")
