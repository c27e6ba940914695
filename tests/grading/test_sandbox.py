"""The sandbox from outside: what it refuses to do without, and what is left when it is killed."""

import asyncio
import contextlib
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from code_answers import PATIENT, fenced, needs_sandbox, processes_of, why_not
from r1_grading import RewardPool, code
from r1_grading.sandbox import programs, requirements, seccomp
from r1_grading.sandbox.run import SandboxError, sealed_file
from refusals import refused
from waiting import wait_until

from megatron_r1.base.errors import Cause

TRUTH = {"tests": [{"stdin": "", "stdout": "42"}]}
SLEEPER = fenced("import time\ntime.sleep(1000)")
HEADERS = {"x86_64": "asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}


@pytest.fixture
def another_machine(monkeypatch):
    """Nothing is known of the machine yet, and nothing may be started on it."""
    caches = (
        requirements.find_launcher,
        requirements.find_interpreter,
        requirements.find_compiler,
        programs.require_sandbox,
    )
    for cache in caches:
        cache.cache_clear()
    with monkeypatch.context() as patch:
        yield patch
    for cache in caches:
        cache.cache_clear()


def refuse_to_start(*command, **_):
    raise AssertionError(f"started {command}")


def test_without_bubblewrap_nothing_is_graded_and_the_remedy_is_given(another_machine, tmp_path):
    another_machine.setenv("PATH", str(tmp_path))
    another_machine.setattr(subprocess, "Popen", refuse_to_start)
    for response in ("", fenced("print(42)")):
        with refused("bwrap", Cause.NOT_INSTALLED, "apt-get install bubblewrap"):
            code.grade(response, TRUTH)


def test_a_pool_reports_the_remedy_as_an_answer_that_cannot_be_graded(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    async def scenario():
        async with RewardPool(num_workers=1) as pool:
            return await pool.grade("code", "", TRUTH)

    grade = asyncio.run(scenario())
    assert grade.reward == 0.0 and not grade.is_graded
    assert "apt-get install bubblewrap" in grade.reason


def test_an_old_kernel_is_refused(another_machine):
    another_machine.setattr(platform, "release", lambda: "5.10.0-28-amd64")
    another_machine.setattr(subprocess, "Popen", refuse_to_start)
    with refused("Linux", Cause.UNSUPPORTED, "5.14", "5.10"):
        code.grade("", TRUTH)


def test_a_machine_without_a_table_of_system_calls_is_refused(another_machine):
    another_machine.setattr(platform, "machine", lambda: "riscv64")
    with refused("machine", Cause.UNSUPPORTED, "riscv64", "x86_64", "aarch64"):
        seccomp.build_filter.__wrapped__(compiler=False)


@needs_sandbox
def test_such_a_machine_is_refused_before_bubblewrap_starts(another_machine):
    """It would wait for a filter that never comes."""
    another_machine.setattr(platform, "machine", lambda: "riscv64")
    another_machine.setattr(subprocess, "Popen", refuse_to_start)
    seccomp.build_filter.cache_clear()
    with refused("machine", Cause.UNSUPPORTED, "riscv64"):
        code.grade("", TRUTH)


@needs_sandbox
def test_without_a_compiler_cpp_is_refused_and_python_is_not(another_machine, tmp_path):
    another_machine.setattr(requirements, "COMPILER", str(tmp_path / "g++"))
    with refused("g++", Cause.NOT_INSTALLED, "apt-get install g++"):
        code.grade("", TRUTH, language="cpp")
    assert code.grade(fenced("print(42)"), TRUTH, limits=PATIENT).reward == 1.0


@needs_sandbox
@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("echo 'bwrap: No permissions to create a new namespace' >&2; exit 1", "No permissions"),
        # One that runs the program without a sandbox, or claims to have.
        ('while [ "$1" != -- ]; do shift; done; shift; exec "$@"', ""),
        ("echo 42", ""),
    ],
)
def test_a_bubblewrap_that_makes_no_sandbox_is_refused(another_machine, script, shown):
    another_machine.setattr(
        requirements, "find_launcher", lambda: ("/bin/sh", "-c", script, "bwrap")
    )
    remedy = "kernel.unprivileged_userns_clone=1"
    with refused("sandbox", Cause.FAILED, shown, remedy) as caught:
        code.grade("", TRUTH)
    assert "\n" not in str(caught.value)


@needs_sandbox
def test_a_sandbox_that_cannot_be_built_for_a_moment_is_tried_again(monkeypatch, tmp_path):
    launcher, failed = shlex.join(requirements.find_launcher()), tmp_path / "failed"
    script = f'[ -e {failed} ] && exec {launcher} "$@"; : > {failed}; echo busy >&2; exit 1'
    monkeypatch.setattr(requirements, "find_launcher", lambda: ("/bin/sh", "-c", script, "bwrap"))
    assert code.grade(fenced("print(42)"), TRUTH, limits=PATIENT).reward == 1.0
    assert failed.exists()
    always = ("/bin/sh", "-c", "echo busy >&2; exit 1")
    monkeypatch.setattr(requirements, "find_launcher", lambda: always)
    with pytest.raises(SandboxError, match="busy"):
        code.grade(fenced("print(42)"), TRUTH)


@needs_sandbox
def test_a_pool_that_loses_patience_leaves_no_process():
    name = f"test-{uuid.uuid4().hex}"

    async def scenario():
        async with RewardPool(num_workers=2) as pool:

            async def grade(response):
                # Only the one that sleeps runs into its limit.
                pool.timeout_seconds = 3.0 if response is SLEEPER else 600.0
                fields = {"name": name, "limits": PATIENT}
                grader = "code_answers:grade_in_named_sandbox"
                return await pool.grade(grader, response, TRUTH, **fields)

            quick = fenced("print(42)")
            jobs = map(grade, (quick, SLEEPER, quick, quick))
            return await asyncio.gather(*jobs), pool.snapshot()

    grades, counts = asyncio.run(scenario())
    assert [grade.reward for grade in grades] == [1.0, 0.0, 1.0, 1.0]
    assert counts["timeouts"] == 1 and counts["crashes"] == counts["errors"] == 0
    wait_until_gone(name)


NEVER_STARTED = """
import time
import code_answers  # runs a program
from r1_grading.sandbox.run import SandboxProcess
SandboxProcess.start_program = lambda self: time.sleep(3600)
"""


@needs_sandbox
@pytest.mark.parametrize("before", ["", NEVER_STARTED], ids=["running", "not yet started"])
def test_a_grader_that_is_killed_takes_its_sandbox_along(before):
    name = f"test-{uuid.uuid4().hex}"
    call = f"grade_in_named_sandbox({SLEEPER!r}, {TRUTH}, name={name!r}, limits={PATIENT})"
    program = f"{before}\nimport code_answers\ncode_answers.{call}"
    grader = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        expected = 2 if os.geteuid() == 0 else 1  # bwrap, and the program where it can be seen
        wait_until(lambda: len(processes_of(name)) >= expected)
        if os.geteuid() == 0:
            wait_until(lambda: set(map(owner, processes_of(name))) == {requirements.NOBODY})
            if not before:
                wait_until(lambda: any(not is_bwrap(pid) for pid in processes_of(name)))
        os.kill(grader.pid, signal.SIGKILL)
        grader.wait()
        wait_until_gone(name)
    finally:
        grader.kill()
        grader.wait()


def is_bwrap(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"bwrap" in Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]
    return True


def owner(pid: int) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}").stat().st_uid
    return None


def children() -> set[str]:
    threads = Path("/proc/self/task").iterdir()
    return {pid for thread in threads for pid in (thread / "children").read_text().split()}


@pytest.mark.more
@needs_sandbox
def test_neither_descriptors_nor_children_pile_up():
    programs = [
        fenced(text) for text in ("print(42)", "1 / 0", "while True: print(1)", "x = 'x' * 2**40")
    ]
    answers = [(program, "python") for program in programs]
    if not why_not("cpp"):
        answers += [
            (fenced(text, "cpp"), "cpp") for text in ("int main(", "int main() { *(int *)0 = 1; }")
        ]
    truths = [TRUTH, {**TRUTH, "checker": "import sys\nsys.exit(1)"}]

    def grade_all() -> tuple[list[str], set[str]]:
        for answer, language in answers:
            for truth in truths:
                code.grade(answer, truth, language=language, limits=PATIENT)
        return sorted(os.listdir("/proc/self/fd")), children()

    before = children()  # what other tests have started
    first, second = grade_all(), grade_all()
    assert first == second  # the system-call filters stay open
    assert second[1] <= before


def test_what_is_handed_in_cannot_be_changed():
    with sealed_file(b"x") as file:
        for change in (
            lambda: os.pwrite(file.fileno(), b"y", 0),
            lambda: os.truncate(file.fileno(), 0),
        ):
            with pytest.raises(PermissionError):
                change()
        assert os.read(file.fileno(), 9) == b"x"


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_system_call_numbers_are_the_kernel_s(machine):
    path = next(
        (
            path
            for folder in ("/usr/include", "/usr/include/x86_64-linux-gnu")
            if (path := Path(folder, HEADERS[machine])).exists()
        ),
        None,
    )
    if path is None:
        pytest.skip(f"no {HEADERS[machine]} (apt-get install linux-libc-dev)")
    defined = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\n", path.read_text())
    numbers = {name: int(number) for name, number in defined}
    numbers.setdefault("newfstatat", numbers.get("fstatat"))
    for table in (seccomp.ALLOWED, seccomp.FILTERED, seccomp.COMPILING):
        for name, number in seccomp.syscall_numbers(table, machine).items():
            assert numbers[name] == number, name


def wait_until_gone(name: str) -> None:
    """A killed process takes a moment to go."""
    wait_until(lambda: not processes_of(name))
