"""Append-only files of JSON lines that survive kill -9: every line is whole or the torn last one,
which is cut off before more is appended."""

from __future__ import annotations

import json
import math
import mmap
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write, fsync


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append one strict JSON line per record in one write, then flush and fsync.

    A torn last line (a crash during an earlier write) is cut off first, so that it cannot swallow
    the new one."""
    if not records:
        return
    is_new = not path.exists()
    if not is_new:
        _cut_torn_line(path)
    lines = [
        json.dumps(to_strict_json(record), ensure_ascii=False, allow_nan=False)
        for record in records
    ]
    # A lone surrogate (half an emoji from a byte-level tokenizer) has no UTF-8 form.
    payload = ("\n".join(lines) + "\n").encode("utf-8", errors="replace")
    with open(path, "ab") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        fsync(path.parent)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records in order, without a torn last line; a missing file has none.

    Raises:
        UserError: any other line is not a JSON object; it names the file and the line.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, (_, line) in enumerate(complete_lines(file), start=1):
            yield _parse_line(path, number, line)


def complete_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, line) of every line of an open file, except a torn last one."""
    offset = 0
    for line in file:
        if line.endswith(b"\n"):
            yield offset, line
        offset += len(line)


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Replace `path` atomically by one line per record, in UTF-8; return it."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return atomic_write(path, text)


def filter_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Drop every record for which `keep` is false and any torn last line; return how many lines
    were dropped.

    The file is replaced atomically, and only if something is dropped.

    Args:
        path: a JSONL file.
        keep: whether a record stays.
    """
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        lines = list(file)
    kept_lines = [
        line
        for number, line in enumerate(lines, start=1)
        if line.endswith(b"\n") and keep(_parse_line(path, number, line))
    ]
    if len(kept_lines) < len(lines):
        atomic_write(path, b"".join(kept_lines))
    return len(lines) - len(kept_lines)


def to_strict_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that strict JSON can hold: NaN and infinities become null and are named.

    `{"kl": nan}` becomes `{"kl": null, "nonfinite": {"kl": "nan"}}`: any JSON reader accepts the
    line, and the value is not lost.

    Raises:
        ValueError: JSON cannot represent a value.
    """
    nonfinite_values: dict[str, str] = {}
    clean_record = {
        str(key): _strict_value(value, str(key), nonfinite_values) for key, value in record.items()
    }
    if nonfinite_values:
        clean_record["nonfinite"] = nonfinite_values
    return clean_record


def _strict_value(value: Any, name: str, nonfinite: dict[str, str]) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _strict_value(value.item(), name, nonfinite)
    if isinstance(value, numbers.Real):
        if math.isfinite(value):
            return float(value)
        nonfinite[name] = str(float(value))
        return None
    if isinstance(value, Mapping):
        return {
            str(key): _strict_value(item, f"{name}.{key}", nonfinite) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_strict_value(v, f"{name}[{i}]", nonfinite) for i, v in enumerate(value)]
    raise ValueError(
        f"{name}: cannot write a {type(value).__name__} to a JSON line; "
        "pass a number, text, or a list or mapping of those"
    )


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(
            f"{path}, line {number}: not a JSON object ({line[:60]!r}); "
            "delete that line, or restore the file",
            key=path.name,
            cause=Cause.MALFORMED,
        )
    return record


def _cut_torn_line(path: Path) -> None:
    with open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            end_of_lines = content.rfind(b"\n") + 1
        if end_of_lines < size:
            file.truncate(end_of_lines)
            os.fsync(file.fileno())
