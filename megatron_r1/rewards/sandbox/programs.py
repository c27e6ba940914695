"""Turn source text into a command that runs in the sandbox."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.rewards.base import shorten
from megatron_r1.rewards.sandbox import host
from megatron_r1.rewards.sandbox.limits import Budget
from megatron_r1.rewards.sandbox.run import run

HERE = Path(__file__).parent
SCRIPT = (HERE / "inside_script.py").read_text(encoding="utf-8")
CALL = (HERE / "inside_call.py").read_text(encoding="utf-8")
STANDARDS = ("c++17", "c++20", "c++23")
# The GNU dialects, as contest sites use them. One error is enough for a grade's reason.
COMPILER_OPTIONS = "-O2 -w -fmax-errors=1 -fdiagnostics-color=never -fno-diagnostics-show-caret"


@dataclass(frozen=True)
class Program:
    """A command with the `files` of its working folder, by name.

    compiled: it recurses on the machine's stack, as Python does not.
    """

    command: tuple[str, ...]
    files: dict[str, bytes]
    compiled: bool = False


def python_script(source: str, *arguments: str) -> Program:
    """Return `source` as a script, or as a checker of the files in `arguments`
    (inside_script.py)."""
    return _python(SCRIPT, source, *arguments)


def python_call(source: str, function: str) -> Program:
    """Return a call of `function`, of class Solution or the module (inside_call.py)."""
    return _python(CALL, source, function)


def compile_cpp(source: str, standard: str, budget: Budget) -> Program | str:
    """Return the compiled program, or the compiler's error in one line."""
    command = f"{shlex.quote(host.compiler())} -std={standard.replace('c++', 'gnu++')}"
    command += f" {COMPILER_OPTIONS} -o main main.cpp >&2 && exec cat main"
    files = {"main.cpp": source.encode("utf-8", "replace")}
    outcome = run(("/usr/bin/sh", "-c", command), budget, files=files, compiler=True)
    if outcome.stopped:
        return f"the compiler ran into its limit of {outcome.stopped}"
    if outcome.status != 0:
        messages = outcome.stderr.decode("utf-8", "replace").splitlines()
        lines = [line for line in messages if "error" in line] or messages
        return shorten(lines[0] if lines else f"exit status {outcome.status}", 200)
    return Program(("./main",), {"main": outcome.stdout}, compiled=True)


def _python(starter: str, source: str, *arguments: str) -> Program:
    # -s -S: no site-packages; -B: no .pyc files. Not -I, which would drop PYTHONHASHSEED.
    command = (host.interpreter()[0], "-s", "-S", "-B", "-c", starter, "main.py", *arguments)
    return Program(command, {"main.py": source.encode("utf-8", "replace")})
