"""Turn source text into a command that runs in the sandbox, if this machine can run one.

LiveCodeBench's harness imports names such as `gcd` and `List` before a program, since its programs
were written for sites that provide them. Here a name is imported only where a program uses it: all
modules together would take longer than most programs."""

import builtins
import functools
import importlib
import platform
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from r1_grading.base.errors import Cause, shorten
from r1_grading.sandbox import requirements
from r1_grading.sandbox.limits import Budget, Limits
from r1_grading.sandbox.run import SandboxError, run_command

PRELOADED_MODULES = (
    "string",
    "re",
    "datetime",
    "collections",
    "heapq",
    "bisect",
    "copy",
    "math",
    "random",
    "statistics",
    "itertools",
    "functools",
    "operator",
    "io",
    "sys",
    "json",
    "typing",
)
"""In the harness's order: `from … import *` of each, builtins again, then `import …` of each."""
IDENTIFIER = re.compile(r"[^\W\d]\w*")


@functools.cache
def standard_names() -> dict[str, str]:
    """Return name → the module that provides it."""
    modules: dict[str, str] = {}
    for module in map(importlib.import_module, PRELOADED_MODULES):
        names = getattr(module, "__all__", None) or vars(module)
        modules |= {name: module.__name__ for name in names if not name.startswith("_")}
    modules = {name: module for name, module in modules.items() if not hasattr(builtins, name)}
    return modules | {module: module for module in PRELOADED_MODULES}


def names_in(source: str) -> dict[str, str]:
    """Return name → module for those names that may be used in `source`."""
    provided_names = standard_names()
    return {
        name: provided_names[name] for name in IDENTIFIER.findall(source) if name in provided_names
    }


PROGRAM_SOURCE = (Path(__file__).parent / "inside_program.py").read_text(encoding="utf-8")
STANDARDS = ("c++17", "c++20", "c++23")
COMPILER_OPTIONS = "-O2 -w -fmax-errors=1 -fdiagnostics-color=never -fno-diagnostics-show-caret"
"""The GNU dialects, as contest sites use them. One error is enough for a grade's reason."""


OLDEST_KERNEL = (5, 14)
"""The oldest supported Linux. In older ones the limit on processes counts all of the user's, not
those in the sandbox."""


@dataclass(frozen=True)
class Program:
    """A command with the files of its working folder.

    Attributes:
        command: the command and its arguments.
        files: name → content.
        compiled: whether it recurses on the machine's stack, as Python does not."""

    command: tuple[str, ...]
    files: dict[str, bytes]
    compiled: bool = False


def python_script(source: str, *arguments: str, names: bool = False) -> Program:
    """Return `source` as a script, or as a checker of files.

    Args:
        source: the program's text in Python.
        *arguments: the names of the files that a checker gets.
        names: whether the script has the names of LiveCodeBench's harness."""
    return _python_program("", names_in(source) if names else {}, source, *arguments)


def python_call(source: str, function: str) -> Program:
    """Return a call of `function`, of class Solution or the module."""
    return _python_program(function, names_in(source), source)


def compile_cpp(source: str, standard: str, budget: Budget) -> Program | str:
    """Return the compiled program, or the compiler's error in one line.

    Args:
        source: the program's text in C++.
        standard: a key of `STANDARDS`.
        budget: the compiler's limits."""
    command = f"{shlex.quote(requirements.find_compiler())} -std={standard.replace('c++', 'gnu++')}"
    command += f" {COMPILER_OPTIONS} -o main main.cpp >&2 && exec cat main"
    files = {"main.cpp": source.encode("utf-8", "replace")}
    outcome = run_command(("/usr/bin/sh", "-c", command), budget, files=files, compiler=True)
    if outcome.stopped:
        return f"the compiler ran into its limit of {outcome.stopped}"
    if outcome.status != 0:
        messages = outcome.stderr.decode("utf-8", "replace").splitlines()
        lines = [line for line in messages if "error" in line] or messages
        return shorten(lines[0] if lines else f"exit status {outcome.status}", 200)
    return Program(("./main",), {"main": outcome.stdout}, compiled=True)


@functools.cache
def require_sandbox(language: str) -> None:
    """Return if programs in `language` ("python", "cpp") can be graded on this machine.

    Raises:
        SandboxUnavailable: they cannot; a UserError with the remedy.
    """
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    if release and tuple(map(int, release.groups())) < OLDEST_KERNEL:
        raise requirements.SandboxUnavailable(
            f"graded programs need Linux {'.'.join(map(str, OLDEST_KERNEL))} or newer, this is "
            f"{platform.release()}: run them on a newer system",
            key="Linux",
            cause=Cause.UNSUPPORTED,
        )
    requirements.find_launcher()
    if language == "cpp":
        requirements.find_compiler()
    program = python_script("print(6 * 7)")
    try:
        outcome = run_command(program.command, Limits().program(), files=program.files)
    except SandboxError as error:
        raise requirements.SandboxUnavailable(
            f"graded programs run in a sandbox or not at all, and it cannot be built ({error}): "
            "allow user namespaces (Debian: sysctl kernel.unprivileged_userns_clone=1; Ubuntu: "
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0; Docker: --security-opt "
            "seccomp=unconfined --security-opt apparmor=unconfined --security-opt "
            "systempaths=unconfined)",
            key="sandbox",
            cause=Cause.FAILED,
        ) from None
    if outcome.stdout != b"42\n":
        message = shorten(outcome.stderr.decode("utf-8", "replace"), 300)
        raise requirements.SandboxUnavailable(
            f"a trivial program fails in the sandbox (status {outcome.status}: {message}): "
            "install the system's Python (apt-get install python3)",
            key="sandbox",
            cause=Cause.FAILED,
        )


def _python_program(function: str, names: dict[str, str], source: str, *arguments: str) -> Program:
    # -s -S: no site-packages; -B: no .pyc files. Not -I, which would drop PYTHONHASHSEED.
    starter = f"FUNCTION, NAMES = {function!r}, {names!r}\n{PROGRAM_SOURCE}"
    command = (
        requirements.find_interpreter()[0],
        "-s",
        "-S",
        "-B",
        "-c",
        starter,
        "main.py",
        *arguments,
    )
    return Program(command, {"main.py": source.encode("utf-8", "replace")})
