"""Checks the subject of a commit: `python tools/commit_subject.py FILE`; FILE has the message.

A subject is one imperative sentence of at most 72 characters without a full stop or a semicolon,
as "Refuse subjects that are too long". The mood is judged by the ending of the first word, so that
many a noun passes. .githooks/commit-msg calls this; `git commit --no-verify` leaves it out."""

import re
import sys
from pathlib import Path

MOST = 72
MADE_BY_GIT = ("Merge ", "Revert ", "Reapply ", "fixup! ", "squash! ", "amend! ")
SCISSORS = "# ------------------------ >8"
"""Below it `git commit -v` shows the changes."""
NO_VERBS = ("A", "An", "No", "One", "The", "This", "What")
IMPERATIVES = (
    *("Embed", "Exceed", "Feed", "Need", "Proceed", "Seed", "Shed", "Shred", "Speed", "Succeed"),
    *("Bring", "Ping", "Ring", "Spring", "String", "Swing", "Wring"),
)
"""Verbs that end as participles do."""


def faults(message: str) -> list[str]:
    """Return a sentence for each fault of a message's subject."""
    lines = message.partition(SCISSORS)[0].splitlines()
    text = "\n".join(line.rstrip() for line in lines if not line.startswith("#")).strip("\n")
    # As git reads it: to the first empty line.
    subject = " ".join(text.partition("\n\n")[0].split())
    if not subject or subject.startswith(MADE_BY_GIT):
        return []
    found = []
    if len(subject) > MOST:
        found.append(f"it has {len(subject)} characters, at most {MOST}; its body says why")
    if subject.endswith("."):
        found.append("it ends with a full stop")
    if ";" in subject:
        found.append("a semicolon joins two ideas: make two commits, or name the one idea")
    first = subject.split()[0].removesuffix(",")
    if first in NO_VERBS or not re.fullmatch(r"[A-Z][A-Za-z-]*", first):
        found.append(f"{first!r} is no verb with a capital: what does the commit do?")
    elif re.search(r"(ed|ing|[^aus]s)$", first) and first not in IMPERATIVES:
        found.append(f"{first!r} is not in the imperative: Add, not Added, Adding or Adds")
    return found


def main() -> int:
    found = faults(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for fault in found:
        print(f"the commit's subject: {fault}", file=sys.stderr)
    return min(len(found), 1)


if __name__ == "__main__":
    sys.exit(main())
