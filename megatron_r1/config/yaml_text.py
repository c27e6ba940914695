"""Recipes as YAML text: a key that occurs twice is an error, not a choice of the last one."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from r1_grading.base import values as scalars

from megatron_r1.base.errors import Cause, UserError, did_you_mean

MERGE = "tag:yaml.org,2002:merge"


def read_sections(
    path: Path, source: str = "recipe", prepare: Callable[[str], str] = str
) -> dict[str, Any]:
    """Read the sections of a YAML file, empty ones left out.

    Args:
        path: the file.
        source: name of the file's kind in errors.
        prepare: is applied to the text before it is parsed.

    Raises:
        UserError: for a missing file, invalid YAML, a key that occurs twice in one mapping (`<<`
            may merge a key that the mapping also sets), and for content that is not a mapping."""
    if path.is_dir():
        raise UserError(
            f"{source} {path}: is a folder; name a file in it", key=source, cause=Cause.MALFORMED
        )
    if not path.is_file():
        suggestion = did_you_mean(
            path.name, [file.name for file in path.parent.glob("*.y*ml")], "{}"
        )
        raise UserError(
            f"{source} {path}: no such file (relative to {Path.cwd()}){suggestion}",
            key=source,
            cause=Cause.NOT_FOUND,
        )
    try:
        tree = _parse_yaml(prepare(path.read_text(encoding="utf-8")), path.name) or {}
    except yaml.YAMLError as error:
        remedy = "; indent with spaces instead of tabs" if r"character '\t'" in str(error) else ""
        raise UserError(
            f"{source} {path}: not YAML: {error}{remedy}", key=source, cause=Cause.MALFORMED
        ) from None
    except UserError as error:
        raise UserError(f"{source} {path}: {error}", key=error.key, cause=error.cause) from None
    except ValueError as error:
        raise UserError(f"{source} {path}: {error}", key=source, cause=Cause.MALFORMED) from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{source} {path}: it has no sections, such as `model:` with keys below it, but "
            f"{'a list' if isinstance(tree, list) else 'one value'}",
            key=source,
            cause=Cause.MALFORMED,
        )
    return {section: keys for section, keys in tree.items() if keys is not None}


def nest_keys(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return `{"section.key": value}` as sections."""
    tree: dict[str, dict[str, Any]] = {}
    for dotted_key, value in settings.items():
        section, _, key = dotted_key.partition(".")
        tree.setdefault(section, {})[key] = value
    return tree


def set_nested(tree: dict[str, Any], keys: list[str], value: Any, option: str) -> None:
    """Set the value at nested `keys` of `tree`; a parent that is missing or null becomes a section.

    Args:
        tree: section → key → value, changed.
        keys: from the outermost.
        value: to set.
        option: the command line's, for errors.

    Raises:
        UserError: naming `option` where one of the parents is a value.
    """
    *parents, leaf = keys
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(
                f"--{option}: {parent} is not a section", key=f"--{option}", cause=Cause.CONFLICT
            )
    tree[leaf] = value


def format_value(value: Any) -> str:
    """Return a setting as YAML on one line, as `parse_overrides` reads it."""
    text = dump_yaml(value, default_flow_style=True, width=10**6, sort_keys=True)
    return text.removesuffix("...\n").strip()


def parse_value(text: str) -> Any:
    """Return the value of a setting written as YAML.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    return _parse_yaml(text, "the value")


def _parse_yaml(text: str, name: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: the YAML.
        name: what errors call the text's place."""
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.reader.ReaderError as error:  # from the constructor, which checks all characters
        error.name = name
        raise


def dump_yaml(value: Any, **layout: Any) -> str:
    """Return YAML that `read_sections` and `parse_value` read as `value`.

    Args:
        value: plain values in mappings and lists.
        **layout: arguments of yaml.dump."""
    layout = {"sort_keys": False, "allow_unicode": True} | layout
    return str(yaml.dump(value, Dumper=_Dumper, **layout))


NUMBER_TAGS = {
    "tag:yaml.org,2002:int": scalars.INTEGER,
    "tag:yaml.org,2002:float": f"{scalars.FRACTION}|{scalars.INFINITE}",
}
"""What is a number without quotes, in that order; YAML 1.1's octal, hexadecimal and sexagesimal
numbers and its dates are text, which a setting that is a number refuses."""
_FIRST = "-+.0123456789"


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what is text and looks like a number to this project or to YAML 1.1."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in NUMBER_TAGS and not tag.endswith(":timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(
                    f"{key.value} is there twice, in lines {lines[key.value]} and {line}, and one "
                    "of them would be ignored; make them one",
                    key=key.value,
                    cause=Cause.DUPLICATE,
                )
            lines[key.value] = line
        return node


for _tag, _text in NUMBER_TAGS.items():
    _pattern = re.compile(f"^(?:{_text})$")
    _Loader.add_implicit_resolver(_tag, _pattern, list(_FIRST))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_FIRST))
