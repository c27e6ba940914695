"""The lines of a process's log that say why it ended: the first error, and the last ones."""

import os
import re
from pathlib import Path

LINE_CHARS = 300  # vLLM's error for an unknown architecture names all of its several hundred
# "ValueError: ..." or pydantic's "Value error, ...", after any prefix.
ERROR_LINE = re.compile(
    r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception)\w*: (?!\d+ validation).+|Value error, .+)$"
)
# Warnings name errors that were survived; the rest is printed by Python extensions at exit.
NOISE = re.compile(
    r" (WARNING|INFO) [\d-]+ [\d:]+ \[|nanobind|^ - (leaked|\.\.\. skipped) |INFO: +"
)
LOG_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?([A-Z]+ [\d-]+ [\d:]+ \[[^\]]+\] )?")
EXCERPT_BYTES = 2**18
"""Bytes that are read from the beginning of a log, and from its end. An engine that dies with
hundreds of requests writes the same traceback for each of them: after 722 requests the log had 140
MB, which each of the requests read."""


def excerpt_log(log: str, num_last_lines: int = 5) -> str:
    """Return the first line that names an error (later ones are its echoes), and the last ones."""
    loud_lines = [line for line in log.splitlines() if not NOISE.search(line)]
    lines = [LOG_PREFIX.sub("", line).rstrip() for line in loud_lines]
    lines = [line for line in lines if line.strip(" ^~")]
    cause = next((m.group(1) for line in lines if (m := ERROR_LINE.search(line))), None)
    last_lines = lines[-num_last_lines:]
    quotes = ([cause] if cause else []) + [
        line for line in last_lines if not cause or cause not in line
    ]
    return "\n".join(f"  {line[:LINE_CHARS]}" for line in quotes) or "  (the log is empty)"


def file_excerpt(log: Path, start: int = 0) -> str:
    """Return the excerpt of a log file from byte `start` on."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(start)
        text = file.read(EXCERPT_BYTES)
        file.seek(max(start + len(text), size - EXCERPT_BYTES))
        return excerpt_log((text + file.read()).decode(errors="replace"))


def log_end(log: Path) -> str:
    """Return the end of a log file, EXCERPT_BYTES at most; nothing where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - EXCERPT_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def last_lines(log: Path, count: int = 15) -> str:
    """Return the last lines of a log file."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "(no output)"
    return "\n".join(text.strip().splitlines()[-count:]) or "(no output)"
