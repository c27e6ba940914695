"""YAML as people write it: a key that is there twice is a mistake, not a choice of the last."""

from __future__ import annotations

from typing import Any

import yaml

MERGE = "tag:yaml.org,2002:merge"


def read_yaml(text: str) -> Any:
    """What a YAML text says. Raises ValueError: it is no YAML, or a mapping has a key twice (`<<`
    may still bring a key that the mapping has itself)."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(
                    f"{key.value} is there twice, in lines {lines[key.value]} and {line}, and one "
                    "of them would be ignored; make them one"
                )
            lines[key.value] = line
        return node
