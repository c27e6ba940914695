"""The cases of the bench (`faults.yaml`), and copies of the packages with a fault."""

from __future__ import annotations

import ast
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_r1.pipeline.stages import merge_settings
from tools.bench.host import ROOT

TABLE = Path(__file__).with_name("faults.yaml")
PACKAGES = {
    "megatron_r1": ROOT / "megatron_r1",
    "r1_grading": ROOT / "grading" / "r1_grading",
    "r1_kernels": ROOT / "kernels" / "r1_kernels",
}
IMPORTS_FILE = "imported.txt"
"""File of an overlay in which each process that imports it writes what it is."""
NOTE = """
import os as _os, sys as _sys
with open(_os.path.join(_os.path.dirname(_os.path.dirname(__file__)), {file!r}), "a") as _file:
    _file.write(__name__ + " " + " ".join(_sys.orig_argv) + chr(10))
"""
PROCESSES = {
    "controller": r"megatron_r1 .*-m megatron_r1 rl ",
    "engine": r"megatron_r1 .*megatron_r1\.engines\.plugin\.serve",
    "trainer rank": r"megatron_r1 .*megatron_r1\.trainer\.rank",
    "trainer rank's kernels": r"r1_kernels .*megatron_r1\.trainer\.rank",
    "grader": r"r1_grading .*r1_grading\.worker",
}
"""Processes of a run by name, with how their imports look in `IMPORTS_FILE`; fork servers import
for engines and ranks."""


@dataclass(frozen=True)
class Edit:
    """A change of a source file: a text that is found once in it, and the one in its place."""

    file: str
    replace: str
    by: str


@dataclass(frozen=True)
class WhyCase:
    """A run of the bench.

    Attributes:
        name: the fault, or of a healthy run its recipe.
        model: a name in `models.MODELS`.
        settings: by section, over those that all runs have.
        quantity: names of the quantity that `why` must name first; none: the run is healthy.
        cause: regular expressions that all must be found in its reason or remedy, any case.
        edits: the changes of the source.
        first_run: settings of an earlier run without the fault, which this one continues.
        cpu_flags: flags of /proc/cpuinfo, of which the CPU must have one; none: any CPU."""

    name: str
    model: str
    settings: dict[str, dict[str, Any]]
    quantity: tuple[str, ...] = ()
    cause: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()
    first_run: dict[str, dict[str, Any]] | None = None
    cpu_flags: tuple[str, ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is planted."""
        return not self.quantity


@dataclass
class Table:
    """The content of `faults.yaml`."""

    common: dict[str, dict[str, Any]]
    cases: list[WhyCase] = field(default_factory=list)


def read_table(path: Path = TABLE) -> Table:
    """Return the cases in order.

    Args:
        path: the file.

    Raises:
        ValueError: two cases of a name, or a recipe that is not there."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipes = content["recipes"]
    table = Table(content["common"])
    for entry in [*content["healthy"], *content["faults"]]:
        recipe = recipes[entry.get("recipe", "dense")]
        table.cases.append(
            WhyCase(
                entry["name"],
                recipe["model"],
                merge_settings(recipe.get("settings", {}), entry.get("settings", {})),
                tuple(_flatten_names(entry.get("quantity", ()))),
                tuple(entry.get("cause", ())),
                tuple(Edit(**edit) for edit in entry.get("edits", ())),
                entry.get("first_run"),
                tuple(recipe.get("cpu_flags", ())),
            )
        )
    names = [case.name for case in table.cases]
    if repeated_names := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: cases of one name: {', '.join(sorted(repeated_names))}")
    return table


def _flatten_names(names: list[Any]) -> list[str]:
    """Return names, of which a list may be one."""
    return [entry for name in names for entry in (name if isinstance(name, list) else [name])]


def apply_edits(case: WhyCase) -> dict[str, str]:
    """Return the changed source files of a case: path in the overlay → text.

    Raises:
        ValueError: a text that is not found exactly once, or a result that is no Python or means
            the same; it names the case and the file."""
    texts: dict[str, str] = {}
    for edit in case.edits:
        package, _, inner_path = edit.file.partition("/")
        old_text = texts.get(edit.file) or (PACKAGES[package] / inner_path).read_text(
            encoding="utf-8"
        )
        if (count := old_text.count(edit.replace)) != 1:
            raise ValueError(f"{case.name}: {edit.file} has {edit.replace!r} {count} times")
        new_text = old_text.replace(edit.replace, edit.by)
        try:
            is_same = ast.dump(ast.parse(new_text)) == ast.dump(ast.parse(old_text))
        except SyntaxError as error:
            raise ValueError(f"{case.name}: {edit.file} is no Python then: {error}") from error
        if is_same:
            raise ValueError(f"{case.name}: {edit.file} means the same then")
        texts[edit.file] = new_text
    return texts


def write_overlay(case: WhyCase, folder: Path) -> Path:
    """Write the packages with the case's edits; files that it does not change are hard links.

    Args:
        case: the case.
        folder: the new folder.

    Returns:
        The folder, to be the first of PYTHONPATH."""
    shutil.rmtree(folder, ignore_errors=True)
    texts = apply_edits(case)
    for name, source in PACKAGES.items():
        shutil.copytree(source, folder / name, copy_function=os.link)
        init_file = folder / name / "__init__.py"
        text = texts.pop(f"{name}/__init__.py", init_file.read_text(encoding="utf-8"))
        texts[f"{name}/__init__.py"] = text + NOTE.format(file=IMPORTS_FILE)
    for path, text in texts.items():
        target = folder / path
        for cached_file in target.parent.glob(f"__pycache__/{target.stem}.*.pyc"):
            cached_file.unlink()
        target.unlink()
        target.write_text(text, encoding="utf-8")
    return folder


def check_imports(overlay: Path) -> None:
    """Check that every process of a run has imported the overlay.

    Raises:
        RuntimeError: one has not; it names the process."""
    path = overlay / IMPORTS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for process, pattern in PROCESSES.items():
        if not any(re.match(pattern, line) for line in lines):
            raise RuntimeError(f"{overlay}: no {process} has imported it; see {path}")
