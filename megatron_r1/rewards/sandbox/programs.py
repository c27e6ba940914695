"""Source text → a command that runs in the sandbox."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.rewards.base import shorten
from megatron_r1.rewards.sandbox import host
from megatron_r1.rewards.sandbox.process import Budget
from megatron_r1.rewards.sandbox.run import run
from megatron_r1.rewards.sandbox.sealed_file import SealedFile

HERE = Path(__file__).parent
SCRIPT = (HERE / "inside_script.py").read_text(encoding="utf-8")
CHECKER = (HERE / "inside_checker.py").read_text(encoding="utf-8")
CALL = (HERE / "inside_call.py").read_text(encoding="utf-8")
STANDARDS = ("c++17", "c++20", "c++23")
# The GNU dialects, as the contest sites use them. One error is enough for the reason.
COMPILER_OPTIONS = "-O2 -w -fmax-errors=1 -fdiagnostics-color=never -fno-diagnostics-show-caret"


@dataclass(frozen=True)
class Program:
    """command: what to run. files: what lies in its working folder, each by name. compiled: whether
    it recurses on the machine's stack, as Python does not."""

    command: tuple[str, ...]
    files: dict[str, SealedFile]
    compiled: bool = False

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def python_script(source: str) -> Program:
    """`source` as a script."""
    return Program((*_python(SCRIPT), "main.py"), {"main.py": _text(source)})


def python_checker(source: str, *arguments: str) -> Program:
    """`source` as a special checker of the files `arguments`; see inside_checker."""
    return Program((*_python(CHECKER), "main.py", *arguments), {"main.py": _text(source)})


def python_call(source: str, function: str) -> Program:
    """One call of `function` (of class Solution, or of the module); see inside_call."""
    return Program((*_python(CALL), "main.py", function), {"main.py": _text(source)})


def compile_cpp(source: str, standard: str, budget: Budget) -> Program | str:
    """The compiled program, or what the compiler said, one line."""
    command = f"{shlex.quote(host.compiler())} -std={standard.replace('c++', 'gnu++')}"
    command += f" {COMPILER_OPTIONS} -o main main.cpp >&2 && exec cat main"
    with _text(source) as file, SealedFile(b"") as nothing:
        shell = ("/usr/bin/sh", "-c", command)
        outcome = run(shell, budget, stdin=nothing, files={"main.cpp": file}, compiler=True)
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
