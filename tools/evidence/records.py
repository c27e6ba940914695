"""The records of the claims, docs/evidence/ID.json, and whether the code that a claim depends on
is the code that was measured."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path

from megatron_r1.base.files import atomic_write
from tools.evidence.instructions import Version, compute_the_same
from tools.evidence.renames import (
    ProjectNames,
    defined_in,
    imported_names,
    keywords_in,
    names_in,
)

FOLDER = "docs/evidence"
MODULE_FOLDERS = {
    "r1_grading": "grading/",
    "r1_kernels": "kernels/",
    "r1_kernels_bench": "kernels/",
}
"""Where packages are that are not in the root."""
WORD = "[A-Za-z_][A-Za-z_0-9]*"
DEFINED = rf"^ *((async +)?def|class) +{WORD}|^ *(self\.)?{WORD} *[:=]"
"""In a line of Python, up to the name that it defines or sets."""
PRIMITIVES = "kernels/r1_kernels/primitives/"
TOPICS = {
    "numbers": "Numbers that agree",
    "learning": "Models that learn",
    "survival": "Runs that survive",
    "speed": "Speed",
}


@dataclass(frozen=True)
class Measured:
    """A run of the command whose figure the page shows.

    Attributes:
        figure: What was read out of the output.
        commit: The tree that was measured; of figures from before 2026-11-26, which were written by
            hand, the commit that put the figure into the repository.
        date: The day of the run.
        machine: Processor, cores, memory and what else is known to matter."""

    figure: str
    commit: str
    date: str
    machine: str


@dataclass(frozen=True)
class Failed:
    """A later run that gave no figure.

    Attributes:
        reason: Exit status, time limit, or what the output lacks.
        commit: The tree that failed.
        date: The day of the run.
        machine: Processor, cores, memory.
        tail: The end of the output."""

    reason: str
    commit: str
    date: str
    machine: str
    tail: str


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        id: The name of its file.
        topic: A key of `TOPICS`.
        claim: One sentence.
        page: Where it is explained, from the repository's root.
        command: A line for bash in the root, with the environment's programs first in the path.
        reads: Regular expressions with named groups; the last match of each in the output counts.
        figure: The text of the figure, with the groups in braces.
        paths: Files, folders (ending with "/") and patterns whose change makes the claim stale,
            among them the modules that the files of the command import (tools/evidence/watched.py).
        seconds: What the last run took, or an estimate.
        bounds: By group, the lowest and the highest value with which the claim holds; None: no
            bound.
        measured: The run whose figure is shown.
        failed: A later run without a figure."""

    id: str
    topic: str
    claim: str
    page: str
    command: str
    reads: list[str]
    figure: str
    paths: list[str]
    seconds: float
    bounds: dict[str, list[float | None]] = field(default_factory=dict)
    measured: Measured | None = None
    failed: Failed | None = None


def read_claims(root: Path) -> list[Claim]:
    """Return the claims, by topic and name."""
    claims = []
    for path in sorted((root / FOLDER).glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        for key, kind in (("measured", Measured), ("failed", Failed)):
            if values.get(key):
                values[key] = kind(**values[key])
        claim = Claim(**values)
        if claim.id != path.stem or claim.topic not in TOPICS:
            raise ValueError(f"{path}: id {claim.id!r} or topic {claim.topic!r} is wrong")
        claims.append(claim)
    topics = list(TOPICS)
    return sorted(claims, key=lambda claim: (topics.index(claim.topic), claim.id))


def write_claim(root: Path, claim: Claim) -> None:
    """Write a claim's file, whole or not at all."""
    values = {key: value for key, value in asdict(claim).items() if value not in (None, {})}
    path = root / FOLDER / f"{claim.id}.json"
    atomic_write(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class State:
    """fresh, stale, unknown (the clone does not have the commit) or not measured.

    Attributes:
        name: One of the four.
        changed: Of a stale claim, the files that differ.
        failed: The day of a failed run since the figure was measured, or ""."""

    name: str
    changed: tuple[str, ...] = ()
    failed: str = ""

    @property
    def text(self) -> str:
        count = f", {len(self.changed)} files" if len(self.changed) > 1 else ""
        failed = f"; failed {self.failed}" if self.failed else ""
        return self.name + count + failed


class CodeChanges:
    """Which files compute something else than at an earlier commit.

    Of Python files only instructions count: comments, docstrings, formatting, names of local
    variables, and moves and renames of definitions in the files that are compared, compute nothing.

    Args:
        root: the repository, whose tracked files are compared as they are."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._changes = cache(lambda commit: changes_since(root, commit))
        self._former_names = cache(lambda commit: _former_names(root, commit))
        self._gone_modules = cache(lambda commit: _gone_modules(root, commit))
        self._names_now = cache(lambda: _names_now(root))
        self._imports_now = cache(lambda: _imports_now(root))
        self._is_same = cache(lambda commit, names: have_same_code(root, commit, names))
        self._is_same_but_for_names = cache(
            lambda commit, names: have_same_code(
                root, commit, names, self._names_now, self._imports_now
            )
        )

    def files(self, commit: str, paths: list[str]) -> list[str] | None:
        """Return the files of `paths` that compute something else than at `commit`; None where the
        clone does not have the commit."""
        changed = changed_files(self._changes(commit), paths)
        if changed is None:
            return None
        modules = {name for name in changed if name.endswith(".py")}
        former_names = self._former_names(commit).items()
        modules |= {old for new, old in former_names if new in modules}
        joined = self._joined_to(commit, modules) if modules else set()
        if modules and any(
            self._is_same_but_for_names(commit, tuple(sorted(names)))
            for names in (modules, modules | joined)
        ):
            changed = [name for name in changed if name not in modules]
        return [name for name in changed if not self._is_same(commit, (name,))]

    def _joined_to(self, commit: str, modules: set[str]) -> set[str]:
        """Return the removed files that were joined to `modules`: all definitions of such a file
        that the project still has are in them."""
        texts = (_text_in(self._root, name) or "" for name in modules)
        defined_now = {name for text in texts for name in defined_in(text)}
        left = {
            name: defined & self._names_now().defined
            for name, defined in self._gone_modules(commit).items()
        }
        return {name for name, defined in left.items() if defined and defined <= defined_now}


def states(root: Path, claims: Iterable[Claim]) -> dict[str, State]:
    """Return the state of each claim by its name, of the tracked files as they are in `root`."""
    changes = CodeChanges(root)
    return {claim.id: _claim_state(claim, changes) for claim in claims}


def _claim_state(claim: Claim, changes: CodeChanges) -> State:
    failed = claim.failed.date if claim.failed else ""
    if claim.measured is None:
        return State("not measured", failed=failed)
    changed = changes.files(claim.measured.commit, claim.paths)
    if changed is None:
        return State("unknown", failed=failed)
    return State("stale" if changed else "fresh", tuple(changed), failed)


def head(root: Path) -> str:
    """Return the present commit in short, or "" where git cannot tell."""
    return (git_output(root, "rev-parse", "--short=8", "HEAD") or "").strip()


def changes_since(root: Path, commit: str) -> list[tuple[str, ...]] | None:
    """Return the tracked files of `root` that differ from `commit`.

    Returns:
        The name of each file; of a file that only has another name, the old name and the new one.
        None where this clone does not have the commit, or is none.
    """
    if git_output(root, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}") is None:
        return None
    options = ("--name-status", "-z", "--find-renames=100%", "--no-ext-diff", "--no-relative")
    output = git_output(root, "diff", *options, commit, "--")
    if output is None:
        return None
    words = iter(output.split("\0"))
    changes: list[tuple[str, ...]] = []
    for status in words:
        if status.startswith("R"):
            changes.append((next(words), next(words)))
        elif status:
            changes.append((next(words),))
    return changes


def _former_names(root: Path, commit: str) -> dict[str, str]:
    """Return what files of today that are much like a file of `commit` were called there."""
    options = ("--name-status", "-z", "--find-renames=50%", "--diff-filter=R", "--no-ext-diff")
    words = (git_output(root, "diff", *options, "--no-relative", commit, "--") or "").split("\0")
    return dict(zip(words[2::3], words[1::3], strict=False))


def _gone_modules(root: Path, commit: str) -> dict[str, frozenset[str]]:
    """Return the Python files of `commit` that are no more, also by another name, each with the
    names that it defined."""
    options = ("--name-only", "-z", "--find-renames=50%", "--diff-filter=D", "--no-ext-diff")
    names = (git_output(root, "diff", *options, "--no-relative", commit, "--", "*.py") or "").split(
        "\0"
    )
    return {name: defined_in(text_at(root, commit, name) or "") for name in names if name}


def changed_files(changes: Iterable[tuple[str, ...]] | None, paths: list[str]) -> list[str] | None:
    """Return those of `changes` that concern `paths`; None where the changes are not known.

    A file that has another name and the same content has not changed, as long as `paths` still
    have it.
    """
    if changes is None:
        return None
    changed = []
    for names in changes:
        is_watched = [any(covers(path, name) for path in paths) for name in names]
        if is_watched == [True] or is_watched == [True, False]:
            changed.append(names[0])
    return sorted(changed)


def have_same_code(
    root: Path,
    commit: str,
    names: tuple[str, ...],
    names_now: Callable[[], ProjectNames] | None = None,
    imports_now: Callable[[], frozenset[tuple[str, str]]] | None = None,
) -> bool:
    """Return whether Python files of `root` together compute what they computed at `commit`.

    Args:
        root: the repository.
        commit: the earlier commit.
        names: the files, from the root.
        names_now: returns the names of the project as it is; None to look for no renames.
        imports_now: returns what its files import, as (module, name)."""
    if not all(name.endswith(".py") for name in names):
        return False
    try:
        new_texts = [_text_in(root, name) for name in names]
        old_texts = [text_at(root, commit, name) for name in names]
        return compute_the_same(
            Version(
                old_texts,
                lambda module: module_text(module, partial(text_at, root, commit)),
                partial(_names_at, root, commit),
            ),
            Version(
                new_texts,
                lambda module: module_text(module, partial(_text_in, root)),
                names_now,
                imports_now,
            ),
        )
    except (OSError, SyntaxError):
        return False


def module_text(module: str, text_of: Callable[[str], str | None]) -> str | None:
    """Return the text of a module of the project; None where there is none.

    Args:
        module: its name, with dots.
        text_of: returns the text of a file, named from the root, or None."""
    folder = MODULE_FOLDERS.get(module.partition(".")[0], "")
    path = folder + module.replace(".", "/")
    return text_of(f"{path}.py") or text_of(f"{path}/__init__.py")


def _text_in(root: Path, name: str) -> str | None:
    path = root / name
    return path.read_text(encoding="utf-8") if path.is_file() else None


@cache  # a commit's files stay, and every record asks for them again
def text_at(root: Path, commit: str, name: str) -> str | None:
    """Return a file's text at a commit; None where this clone lacks it."""
    return git_output(root, "show", f"{commit}:{name}")


@cache  # a commit's files stay
def _names_at(root: Path, commit: str) -> ProjectNames | None:
    grep = ("grep", "-h", "--only-matching", "--extended-regexp", "-e")
    words = git_output(root, *grep, WORD, commit, "--", "*.py")
    lines = git_output(root, *grep, DEFINED, commit, "--", "*.py")
    files = git_output(root, "ls-tree", "-r", "--name-only", commit)
    if words is None or lines is None or files is None:
        return None  # without them any name would be new
    defined = {re.findall(WORD, line)[-1] for line in lines.splitlines()}
    return ProjectNames(
        frozenset(words.split()), frozenset(defined | _module_names(files)), _modules(files)
    )


def _names_now(root: Path) -> ProjectNames:
    files = git_output(root, "ls-files", "--", "*.py") or ""
    texts = [_text_in(root, name) or "" for name in files.splitlines()]
    all_names = frozenset(name for text in texts for name in names_in(text))
    defined = {name for text in texts for name in defined_in(text)}
    keywords = frozenset(pair for text in texts for pair in keywords_in(text))
    return ProjectNames(
        all_names, frozenset(defined | _module_names(files)), _modules(files), keywords
    )


def _imports_now(root: Path) -> frozenset[tuple[str, str]]:
    files = git_output(root, "ls-files", "--", "*.py") or ""
    return frozenset(
        pair for name in files.splitlines() for pair in imported_names(_text_in(root, name) or "")
    )


def _modules(files: str) -> frozenset[str]:
    """Return the names of modules, with their packages."""
    paths = [name.removesuffix(".py") for name in files.splitlines() if name.endswith(".py")]
    for folder in set(MODULE_FOLDERS.values()):
        paths = [path.removeprefix(folder) for path in paths]
    return frozenset(path.removesuffix("/__init__").replace("/", ".") for path in paths)


def _module_names(files: str) -> set[str]:
    return {Path(name).stem for name in files.splitlines() if name.endswith(".py")}


def covers(path: str, name: str) -> bool:
    """Return whether a file is, is in or matches `path`; a kernel of GPUs only where `path` is in
    `PRIMITIVES`, since no other command runs it on a CPU."""
    if name.startswith(PRIMITIVES) and name.endswith("_triton.py") and PRIMITIVES not in path:
        return False
    return name.startswith(path) if path.endswith("/") else fnmatchcase(name, path)


def git_output(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    # A clone without all objects would fetch them.
    variables = os.environ | {"GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        process = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout
