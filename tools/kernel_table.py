"""`python tools/kernel_table.py` writes the table of kernels in kernels/README.md, one row for each
entry of `r1_kernels.registry.KERNELS`. `make kernel-files` calls it."""

import sys
from pathlib import Path

README = Path(__file__).parents[1] / "kernels/README.md"
HEADER = ("kernel", "in `primitives/`", "computes", "bytes read → written")


def table() -> str:
    """Return the table in Markdown, without a line break at its end."""
    from r1_kernels.registry import KERNELS

    rows = [(f"`{k.name}`", k.stem, k.computes, k.num_bytes) for k in KERNELS]
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEADER, ("---",) * len(HEADER), *rows))


def updated_readme(text: str) -> str:
    """Return README's text with the present table in place of the one that it has.

    Exits with a message where the text has no line with the table's header."""
    lines = text.splitlines()
    present = table().splitlines()
    if present[0] not in lines:
        sys.exit(f"{README} has no table that begins with: {present[0]}")
    start = end = lines.index(present[0])
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return "\n".join([*lines[:start], *present, *lines[end:]]) + "\n"


if __name__ == "__main__":
    README.write_text(updated_readme(README.read_text()))
