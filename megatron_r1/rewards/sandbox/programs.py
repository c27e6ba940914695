"""Turn source text into a command that runs in the sandbox."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.rewards.base import shorten
from megatron_r1.rewards.sandbox import host
from megatron_r1.rewards.sandbox.limits import Budget
from megatron_r1.rewards.sandbox.run import run
from megatron_r1.rewards.sandbox.sealed_file import SealedFile

HERE = Path(__file__).parent
SCRIPT = (HERE / "inside_script.py").read_text(encoding="utf-8")
CHECKER = (HERE / "inside_checker.py").read_text(encoding="utf-8")
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
    files: dict[str, SealedFile]
    compiled: bool = False

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def python_script(source: str) -> Program:
    """Return `source` as a script (inside_script.py)."""
    return Program((*_python(SCRIPT), "main.py"), {"main.py": _text(source)})


def python_checker(source: str, *arguments: str) -> Program:
    """Return `source` as a checker of the files named in `arguments` (inside_checker.py)."""
    return Program((*_python(CHECKER), "main.py", *arguments), {"main.py": _text(source)})


def python_call(source: str, function: str) -> Program:
    """Return a call of `function`, of class Solution or the module (inside_call.py)."""
    return Program((*_python(CALL), "main.py", function), {"main.py": _text(source)})


def compile_cpp(source: str, standard: str, budget: Budget) -> Program | str:
    """Return the compiled program, or the compiler's error in one line."""
    command = f"{shlex.quote(host.compiler())} -std={standard.replace('c++', 'gnu++')}"
    command += f" {COMPILER_OPTIONS} -o main main.cpp >&2 && exec cat main"
    with _text(source) as file, SealedFile(b"") as no_input:
        shell = ("/usr/bin/sh", "-c", command)
        outcome = run(shell, budget, stdin=no_input, files={"main.cpp": file}, compiler=True)
    if outcome.stopped:
        return f"the compiler ran into its limit of {outcome.stopped}"
    if outcome.status != 0:
        return _first_error(outcome.stderr.decode("utf-8", "replace"), outcome.status)
    return Program(("./main",), {"main": SealedFile(outcome.stdout)}, compiled=True)


def _python(starter: str) -> tuple[str, ...]:
    # -s -S: no site-packages; -B: no .pyc files. Not -I, which would drop PYTHONHASHSEED.
    return (host.interpreter().path, "-s", "-S", "-B", "-c", starter)


def _text(source: str) -> SealedFile:
    return SealedFile(source.encode("utf-8", "replace"))


def _first_error(messages: str, status: int) -> str:
    lines = [line for line in messages.splitlines() if "error" in line] or messages.splitlines()
    return shorten(lines[0] if lines else f"exit status {status}", 200)
