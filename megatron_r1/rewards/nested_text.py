"""Lists and mappings that data sets store as text: JSON, or Python's `str` of them."""

import ast
import json
from typing import Any

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


def _literal(text: str) -> Any:
    if len(text) > MAX_LITERAL_CHARS or not text.lstrip().startswith(PYTHON):
        return text
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text
    return found if isinstance(found, list | dict) else text
