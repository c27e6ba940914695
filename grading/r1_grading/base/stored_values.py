"""Values that data sets store as text: JSON, or Python's literals."""

import ast
import json
from decimal import Decimal
from typing import Any

MAX_DIGITS = 100_000
MAX_LITERAL_CHARS = 1_000_000
"""A longer text that is no JSON is not read as Python, whose parser takes many times its size."""
PYTHON = ("{'", "['", "[{'", "[['", "[('", '[("')
"""How the text of a Python value begins that is no JSON."""


def decoded(value: Any) -> Any:
    """Return the list or mapping that a text is as JSON or as a Python literal, any other value
    itself."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return _literal(value)


def load_json(text: str | bytes) -> Any:
    """Return a JSON value, with integers of up to 100,000 digits: int() refuses more than 4,300,
    because it takes quadratic time."""
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits) if len(digits) <= 4_000 else int(Decimal(digits))


def _literal(text: str) -> Any:
    if len(text) > MAX_LITERAL_CHARS or not text.lstrip().startswith(PYTHON):
        return text
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text
    return found if isinstance(found, list | dict) else text
