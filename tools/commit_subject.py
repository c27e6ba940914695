"""Check the message of a commit: `python tools/commit_subject.py FILE`; FILE has the message.
`--log RANGE` checks the commits of a range, or the last N as `--log -N`; CI does.

A subject is one imperative sentence of at most 72 characters without a full stop, as "Refuse
subjects that are too long". It has one idea, so neither a semicolon nor, unless it merges, a list
with commas, and does not name a branch. The mood is judged by the ending of the first word, so that
many a noun passes. A commit of more than five files, and a merge under git's own subject, need a
body that says why and how. One of more than sixty files has the command that made the change in its
body. A commit that renames Python files, or whose body lists renames, old → new, has in its body a
line with the command that made them, or one that says why none could.
.githooks/commit-msg calls this; `git commit --no-verify` leaves it out."""

import re
import subprocess
import sys
from pathlib import Path

MAX_CHARS = 72
MAX_FILES = 5
"""Of a commit without a body."""
MAX_FILES_BY_HAND = 60
"""Of a commit without the command that made it."""
MADE_BY_GIT = (
    "Merge branch ",
    "Merge pull request ",
    "Merge remote-tracking ",
    "Revert ",
    "Reapply ",
    "fixup! ",
    "squash! ",
    "amend! ",
)
SCISSORS = "# ------------------------ >8"
"""Below it `git commit -v` shows the changes."""
NO_VERBS = ("A", "An", "No", "One", "The", "This", "What")
IMPERATIVES = (
    "Embed",
    "Exceed",
    "Feed",
    "Need",
    "Proceed",
    "Seed",
    "Shed",
    "Shred",
    "Speed",
    "Succeed",
    "Bring",
    "Ping",
    "Ring",
    "Spring",
    "String",
    "Swing",
    "Wring",
)
"""Verbs that end as participles do."""
RENAME = re.compile(r"(?<!\S)`?[A-Za-z_.][\w./:*-]*`? (?:→|->) `?[A-Za-z_.]")
"""A name, an arrow and another name; `94.6% → 95%` is none, nor is the type of a function."""
RENAMED_BY = re.compile(r"^(?:Command|By hand):\s*\S", re.MULTILINE)
COMMAND = re.compile(r"^Command:[ \t]*(\S.*)$", re.MULTILINE)
PROGRAM = re.compile(r"[`$ ]*[a-z./][\w./+-]* +\S")
"""A program and an argument, as a shell reads them: `git mv a b`, not "a script moved them"."""
PROSE = re.compile(r"(?:a|an|the|this|each|every|one) ")
MOVED_FILE = re.compile(r'^R\d+\t.*\.py"?$')
"""A Python file that another one became, as `git diff --name-status` tells it."""


def message_faults(message: str, num_files: int = 0, *, num_moved: int = 0) -> list[str]:
    """Return a sentence for each fault of a message.

    Args:
        message: as git hands it to the hook.
        num_files: the number of files that the commit changes.
        num_moved: the number of Python files that it renames.
    """
    lines = message.partition(SCISSORS)[0].splitlines()
    text = "\n".join(line.rstrip() for line in lines if not line.startswith("#")).strip("\n")
    # As git reads it: to the first empty line.
    subject, _, body = text.partition("\n\n")
    subject = " ".join(subject.split())
    if subject.startswith("Merge branch ") and not body.strip():
        return ["git wrote it: a body says what the branch brings"]
    if not subject or subject.startswith(MADE_BY_GIT):
        return []
    faults = []
    if num_files > MAX_FILES and not body.strip():
        faults.append(
            f"it stands alone for {num_files} files: a body says why, and how it was done"
        )
    is_merge = subject.startswith("Merge ")
    if num_files > MAX_FILES_BY_HAND and not is_merge and not COMMAND.search(body):
        faults.append(
            f"it changes {num_files} files: make a commit of each idea, or give in a line "
            "`Command:` what changed them all"
        )
    renames = ""
    if num_moved:
        renames = f"it renames {num_moved} Python file{'s' if num_moved > 1 else ''}"
    elif RENAME.search(body):
        renames = "its body lists renames"
    if renames and not is_merge and not RENAMED_BY.search(body):
        faults.append(
            f"{renames}: a line `Command:` has the command that made them, "
            "or `By hand:` says what no command could do, and why"
        )
    for command in COMMAND.findall(body):
        if not PROGRAM.match(command) or PROSE.match(command) or "By hand:" in command:
            faults.append(
                f"`Command: {command[:40]}` is no command: give one that a reader can run, or say "
                "`By hand:` on a line of its own"
            )
    if len(subject) > MAX_CHARS:
        faults.append(f"it has {len(subject)} characters, at most {MAX_CHARS}; its body says why")
    if subject.endswith("."):
        faults.append("it ends with a full stop")
    is_list = re.search(r", (.* )?(and|or) ", subject) and not is_merge
    if ";" in subject or is_list:
        faults.append("it joins ideas: make a commit of each, or name the one idea")
    if re.fullmatch(r"Merge [\w./]+-[\w./-]+", subject):
        faults.append("it names a branch: say what the merge brings")
    first = subject.split()[0].removesuffix(",")
    if first in NO_VERBS or not re.fullmatch(r"[A-Z][A-Za-z-]*", first):
        faults.append(f"{first!r} is no verb with a capital: what does the commit do?")
    elif re.search(r"(ed|ing|[^aus]s)$", first) and first not in IMPERATIVES:
        faults.append(f"{first!r} is not in the imperative: Add, not Added, Adding or Adds")
    return faults


def log_faults(commits: str) -> list[str]:
    """Return the faults of the commits that `git log` lists for a range, each with its commit."""
    # Merges have no list of files here, and are judged by their own rule.
    log = _git_output("log", "--format=%x01%h%x02%P%x02%B%x02", "--name-status", "-M", commits)
    is_shallow = _git_output("rev-parse", "--is-shallow-repository").strip() == "true"
    range_faults = []
    for entry in filter(None, log.split("\x01")):
        commit, parents, message, files = entry.split("\x02")
        # The oldest commit of a shallow clone has no parent there, and lists the whole tree.
        is_cut_off = is_shallow and not parents
        num_files, num_moved = (0, 0) if is_cut_off else _count_files(files)
        faults = message_faults(message, num_files, num_moved=num_moved)
        range_faults += [f"{commit}: {fault}" for fault in faults]
    return range_faults


def _count_files(changes: str) -> tuple[int, int]:
    """Return the number of files and of renamed Python files that `--name-status -M` lists."""
    lines = [line for line in changes.splitlines() if line]
    return len(lines), sum(MOVED_FILE.match(line) is not None for line in lines)


def _git_output(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> int:
    if sys.argv[1] == "--log":
        faults = log_faults(sys.argv[2])
    else:
        staged = ["git", "diff", "--cached", "--name-status", "-M"]
        changes = subprocess.run(staged, capture_output=True, text=True).stdout
        num_files, num_moved = _count_files(changes)
        message = Path(sys.argv[1]).read_text(encoding="utf-8")
        faults = message_faults(message, num_files, num_moved=num_moved)
    for fault in faults:
        print(f"the commit's subject: {fault}", file=sys.stderr)
    return min(len(faults), 1)


if __name__ == "__main__":
    sys.exit(main())
