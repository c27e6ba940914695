"""Whether the files that a claim depends on are those that were measured."""

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from tools.evidence.records import Claim


@dataclass(frozen=True)
class State:
    """fresh, stale, unknown (the clone does not have the commit) or not measured.

    changed: Of a stale claim, the files that differ.
    failed: The day of a failed run since the figure was measured, or "".
    """

    name: str
    changed: tuple[str, ...] = ()
    failed: str = ""

    @property
    def text(self) -> str:
        count = f", {len(self.changed)} files" if len(self.changed) > 1 else ""
        failed = f"; failed {self.failed}" if self.failed else ""
        return self.name + count + failed


def states(root: Path, claims: Iterable[Claim]) -> dict[str, State]:
    """Return the state of each claim by its name, of the tracked files as they are in `root`."""
    changes = cache(lambda commit: changes_since(root, commit))
    found = {}
    for claim in claims:
        failed = claim.failed.date if claim.failed else ""
        if claim.measured is None:
            found[claim.id] = State("not measured", failed=failed)
            continue
        changed = changed_files(changes(claim.measured.commit), claim.paths)
        if changed is None:
            found[claim.id] = State("unknown", failed=failed)
        else:
            found[claim.id] = State("stale" if changed else "fresh", tuple(changed), failed)
    return found


def head(root: Path) -> str:
    """Return the present commit in short, or "" where git cannot tell."""
    return (_git(root, "rev-parse", "--short=8", "HEAD") or "").strip()


def changes_since(root: Path, commit: str) -> list[tuple[str, ...]] | None:
    """Return the tracked files of `root` that differ from `commit`.

    Returns:
        The name of each file; of a file that only has another name, the old name and the new one.
        None where this clone does not have the commit, or is none.
    """
    if _git(root, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}") is None:
        return None
    options = ("--name-status", "-z", "--find-renames=100%", "--no-ext-diff", "--no-relative")
    listed = _git(root, "diff", *options, commit, "--")
    if listed is None:
        return None
    words = iter(listed.split("\0"))
    found: list[tuple[str, ...]] = []
    for status in words:
        if status.startswith("R"):
            found.append((next(words), next(words)))
        elif status:
            found.append((next(words),))
    return found


def changed_files(changes: Iterable[tuple[str, ...]] | None, paths: list[str]) -> list[str] | None:
    """Return those of `changes` that concern `paths`; None where the changes are not known.

    A file that has another name and the same content has not changed, as long as `paths` still
    have it.
    """
    if changes is None:
        return None
    found = []
    for names in changes:
        is_watched = [any(covers(path, name) for path in paths) for name in names]
        if is_watched == [True] or is_watched == [True, False]:
            found.append(names[0])
    return sorted(found)


def covers(path: str, name: str) -> bool:
    """Return whether a file is, is in or matches `path`."""
    return name.startswith(path) if path.endswith("/") else fnmatchcase(name, path)


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    # A clone without all objects would fetch them.
    variables = os.environ | {"GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout
