"""What the end of an engine was: found in what it printed."""

import re

LINE_CHARS = 300  # vLLM names its several hundred architectures when it does not know one
# "ValueError: ..." or pydantic's "Value error, ...", whatever stands before it.
ERROR_LINE = re.compile(
    r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception)\w*: (?!\d+ validation).+|Value error, .+)$"
)
# Warnings name errors that were survived; the rest is what Python extensions say on their way out.
NOISE = re.compile(r" (WARNING|INFO) [\d-]+ [\d:]+ \[|nanobind: | - leaked |INFO: +")
LOG_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?([A-Z]+ [\d-]+ [\d:]+ \[[^\]]+\] )?")


def excerpt(log: str, num_last_lines: int = 5) -> str:
    """The first line that names an error (later ones are its echoes), then the last lines."""
    told = [line for line in log.splitlines() if not NOISE.search(line)]
    lines = [LOG_PREFIX.sub("", line).rstrip() for line in told]
    lines = [line for line in lines if line.strip(" ^~")]
    cause = next((m.group(1) for line in lines if (m := ERROR_LINE.search(line))), None)
    last = lines[-num_last_lines:]
    shown = ([cause] if cause else []) + [line for line in last if not cause or cause not in line]
    return "\n".join(f"  {line[:LINE_CHARS]}" for line in shown) or "  (the log is empty)"
