"""Which files a claim has to watch: those of the project that the files of its command import.

A claim that does not watch such a file stays fresh when the file changes."""

import re
from pathlib import Path

from tools.bench.command import OTHER_MODULES
from tools.evidence.records import Claim, covers
from tools.house.structure import PACKAGES, imports, modules

TESTS = re.compile(r"(?<!--deselect )\btests/[\w./-]+")
PROGRAM = re.compile(r"python (?:-m (examples[\w.]+)|tools/bench (\w+))")


def command_files(root: Path, claim: Claim) -> list[Path]:
    """Return the Python files that the command of a claim names.

    They are test files, of a folder all of them; an example; the file of a bench, or those files of
    its folder that the claim watches.

    Args:
        root: the repository.
        claim: the claim.
    """
    paths: list[Path] = []
    for words in TESTS.findall(claim.command):
        path = root / words
        paths += sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
    for example, bench in PROGRAM.findall(claim.command):
        name = example or OTHER_MODULES.get(bench, f"tools.bench.{bench}")
        package_root = root / "kernels" if name.startswith("r1_kernels") else root
        path = package_root / name.replace(".", "/")
        if path.is_dir():
            folder_files = sorted(path.rglob("*.py"))
            paths += [file for file in folder_files if _is_watched(root, claim, file)]
        else:
            paths.append(path.with_suffix(".py"))
    return paths


def unwatched_files(root: Path, claim: Claim) -> list[str]:
    """Return the files that are missing in the paths of a claim.

    Looked for are the bench that its command runs, and the files of the project that the files of
    the command import directly.

    Args:
        root: the repository.
        claim: the claim.
    """
    known_modules = modules(root, (*PACKAGES, "tools"))
    command_paths = command_files(root, claim)
    required_paths = {path for path in command_paths if path.is_relative_to(root / "tools")}
    for path in command_paths:
        required_paths |= {known_modules[name] for name in imports(path, known_modules)}
    missing_paths = (path for path in sorted(required_paths) if not _is_watched(root, claim, path))
    return [path.relative_to(root).as_posix() for path in missing_paths]


def _is_watched(root: Path, claim: Claim, path: Path) -> bool:
    name = path.relative_to(root).as_posix()
    return any(covers(watched, name) for watched in claim.paths)
