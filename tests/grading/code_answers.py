"""Shared by the tests of the code reward: responses, a sandbox that can be recognized from outside,
and problems with right and wrong answers."""

import contextlib
import functools
from pathlib import Path

import pytest
from r1_grading import Grade, code
from r1_grading.sandbox import programs, run

# As much as a prompt may ask for: no honest program runs into these.
PATIENT = {"cpu_seconds": 120, "wall_seconds": 240, "compile_seconds": 240, "total_seconds": 3600}
# For programs that compute, or sleep, for ever.
SPIN = {**PATIENT, "cpu_seconds": 1}
NAP = {**PATIENT, "wall_seconds": 1}


@functools.cache
def why_not(language: str) -> str:
    """Why no sandbox can be made here, with the remedy; empty where one can."""
    try:
        programs.require_sandbox(language)
    except ValueError as error:
        return str(error)
    return ""


needs_sandbox = pytest.mark.skipif(bool(why_not("python")), reason=why_not("python"))
needs_compiler = pytest.mark.skipif(bool(why_not("cpp")), reason=why_not("cpp"))


def fenced(program: str, language: str = "python") -> str:
    """A response whose answer is `program`."""
    return f"<think>Let me see.</think>\n<answer>\n```{language}\n{program}\n```\n</answer>"


def attack(program: str, *, language: str = "python", **fields: object) -> Grade:
    """The grade of a program that passes, printing 42, exactly when it is not contained."""
    truth = {"tests": [{"stdin": "", "stdout": "42\n"}]}
    fields = {"limits": PATIENT, **fields}
    return code.grade(fenced(program, language), truth, language=language, **fields)


@contextlib.contextmanager
def named_sandboxes(name: str):
    """What runs in sandboxes made within can be found by `name`; nothing may be left at the end."""
    before = set_name("sandbox", name)
    try:
        yield
    finally:
        run.NAMESPACES, run.PROGRAM_ENVIRONMENT["NAME"] = before
        left = processes_of(name)
        assert not left, left


def processes_of(name: str) -> list[int]:
    """Process ids of bwrap, by its arguments, and of the programs, by their environment (which root
    can read; a program never outlives bwrap, which waits for it)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_bwrap = b"--hostname\0" + name.encode() in (folder / "cmdline").read_bytes()
            if is_bwrap or b"NAME=" + name.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def grade_in_named_sandbox(response: str, truth: object, *, name: str, **entry: object) -> Grade:
    """For a worker of a pool, which no test can reach into."""
    set_name("sandbox", name)
    return code.grade(response, truth, **entry)


def set_name(old: str, new: str) -> tuple:
    before = run.NAMESPACES, run.PROGRAM_ENVIRONMENT.get("NAME", "")
    run.NAMESPACES = tuple(new if part == old else part for part in run.NAMESPACES)
    run.PROGRAM_ENVIRONMENT["NAME"] = new
    return before
