"""References in the texts of a recipe: `${stage}`, `${stage.hf}`, `${serve.helpful.url}`,
`${pipeline.seed}`, `${here}`."""

import re
from collections.abc import Callable, Iterator
from typing import Any

REFERENCE_PATTERN = re.compile(r"\$\{([^{}\n]*)\}")
# Private-use characters stand for `${` and `}` while YAML is parsed: within a flow mapping {…} it
# would take the braces for its own.
OPEN_MARK, CLOSE_MARK = "\ue000", "\ue001"


def escape_references(text: str) -> str:
    """Replace the braces of references in YAML text by plain characters."""
    return REFERENCE_PATTERN.sub(rf"{OPEN_MARK}\1{CLOSE_MARK}", text)


def unescape_references(value: Any) -> Any:
    """Undo `escape_references` in every text of nested lists and mappings."""
    if isinstance(value, str):
        return value.replace(OPEN_MARK, "${").replace(CLOSE_MARK, "}")
    if isinstance(value, dict):
        return {unescape_references(key): unescape_references(item) for key, item in value.items()}
    return [unescape_references(item) for item in value] if isinstance(value, list) else value


def iter_texts(value: Any, key_path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in nested lists and mappings with its dotted key path."""
    if isinstance(value, str):
        yield key_path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from iter_texts(item, f"{key_path}.{key}" if key_path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from iter_texts(item, f"{key_path}[{index}]")


def iter_references(value: Any) -> Iterator[tuple[str, str]]:
    """Yield (key path, name) of every reference, such as ("model.path", "base.hf")."""
    for key_path, text in iter_texts(value):
        for match in REFERENCE_PATTERN.finditer(text):
            yield key_path, match[1]


def substitute_references(value: Any, lookup: Callable[[str], Any]) -> Any:
    """Return a copy with each reference replaced by `lookup(name)`, whose type is kept where the
    reference is the whole text."""
    if isinstance(value, dict):
        return {key: substitute_references(item, lookup) for key, item in value.items()}
    if isinstance(value, list):
        return [substitute_references(item, lookup) for item in value]
    if not isinstance(value, str):
        return value
    if full_match := REFERENCE_PATTERN.fullmatch(value):
        return lookup(full_match[1])
    return REFERENCE_PATTERN.sub(lambda match: str(lookup(match[1])), value)
