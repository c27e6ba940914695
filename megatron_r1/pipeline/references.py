"""`${stage}`, `${stage.hf}`, `${serve.helpful.url}`, `${pipeline.seed}`, `${here}` in a recipe."""

import re
from collections.abc import Callable, Iterator
from typing import Any

REFERENCE = re.compile(r"\$\{([^{}\n]*)\}")
# Private-use characters stand for `${` and `}` while YAML is parsed: within a flow mapping {…} it
# would take the braces for its own.
OPEN, CLOSE = "\ue000", "\ue001"


def protect(text: str) -> str:
    """Replace the braces of references in YAML text by plain characters."""
    return REFERENCE.sub(rf"{OPEN}\1{CLOSE}", text)


def unprotect(value: Any) -> Any:
    """Undo `protect` in every text of nested lists and mappings."""
    if isinstance(value, str):
        return value.replace(OPEN, "${").replace(CLOSE, "}")
    if isinstance(value, dict):
        return {unprotect(key): unprotect(item) for key, item in value.items()}
    return [unprotect(item) for item in value] if isinstance(value, list) else value


def texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in nested lists and mappings with its dotted place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from texts(item, f"{place}[{index}]")


def references(value: Any) -> Iterator[tuple[str, str]]:
    """Yield (place, name) of every reference, such as ("model.path", "base.hf")."""
    for place, text in texts(value):
        for match in REFERENCE.finditer(text):
            yield place, match[1]


def substitute(value: Any, lookup: Callable[[str], Any]) -> Any:
    """Return a copy with each reference replaced by `lookup(name)`, whose type is kept where the
    reference is the whole text."""
    if isinstance(value, dict):
        return {key: substitute(item, lookup) for key, item in value.items()}
    if isinstance(value, list):
        return [substitute(item, lookup) for item in value]
    if not isinstance(value, str):
        return value
    if whole := REFERENCE.fullmatch(value):
        return lookup(whole[1])
    return REFERENCE.sub(lambda match: str(lookup(match[1])), value)
