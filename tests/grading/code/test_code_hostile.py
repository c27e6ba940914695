"""Hostile Python answers: each would be paid, by printing 42, were it not contained."""

import os
import socket
import uuid
from pathlib import Path

import pytest
from code_answers import NAP, PATIENT, SPIN, attack, fenced, named_sandboxes, needs_sandbox
from r1_grading import code

pytestmark = needs_sandbox
SYSCALL = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path):
    """No process survives its grade, and no file appears where the programs try to make some."""
    with named_sandboxes(f"test-{uuid.uuid4().hex}"):
        yield
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["secret"])


def contained(program: str, *reasons: str, **fields: object) -> None:
    grade = attack(program, **fields)
    assert grade.reward == 0.0, grade.reason
    assert any(reason in grade.reason for reason in reasons), grade.reason


def test_an_attack_that_is_not_contained_would_be_paid():
    assert attack("print(42)").reward == 1.0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        # The limit's first signal could be caught: soft and hard limit are one.
        ("import signal\nsignal.signal(24, lambda *_: 0)\nwhile True: pass", "1 s of CPU"),
        pytest.param("print(9 ** 9 ** 9 ** 9)", "1 s of CPU", marks=pytest.mark.more),
        ("while True: print('x' * 10_000)", "4 MiB"),
        ("import sys\nwhile True: sys.stderr.write('x' * 10_000)", "4 MiB"),
        ("import os\nwhile True: os.write(1, b'42' * 5_000)", "4 MiB"),
    ],
)
def test_no_end(program, reason):
    contained(program, reason, limits=PATIENT if "MiB" in reason else SPIN)


@pytest.mark.parametrize(
    "program",
    [
        "import time\ntime.sleep(1000)\nprint(42)",
        "import os, time\nfor n in range(3): os.close(n)\ntime.sleep(1000)",
        "import sys\nprint(42)\nsys.stdout.flush()\nsys.stdout.close()\n"
        "import threading\nthreading.Event().wait()",
        "print(42, flush=True)\nimport os, sys\n"
        "os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(1000)'])",
    ],
)
def test_sleepers_are_woken(program):
    contained(program, "1 s", limits=NAP)


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(10 ** 11)",
        "x = [0]\nwhile True: x += x",
        "x = 'x'\nwhile True: x += x",
        "import mmap\nx = mmap.mmap(-1, 10 ** 10)",
        # Memory that the address space does not count.
        "import os\nos.memfd_create('x')",
        SYSCALL + "assert libc.shmget(0, 1 << 30, 0o1600) >= 0, 'Errno 12'",
        "with open('x', 'wb') as f:\n while True: f.write(bytes(1 << 20))",
        "import os\nos.mkdir('x')",
    ],
)
def test_memory_bombs(program):
    reasons = ("MemoryError", "not implemented", "Read-only file system", "Errno 12")
    contained(program + "\nprint(42)", *reasons, limits=PATIENT | {"memory_mib": 256})


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import os\nif os.fork() == 0:\n os.setsid()\n while True: pass\nprint(42)",
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while 1: 0'])\nprint(42)",
        "import os, sys\nos.posix_spawn(sys.executable, ['python', '-c', '0'], {})\nprint(42)",
        "import multiprocessing as m\nm.Process(target=print).start()\nprint(42)",
        SYSCALL + "assert libc.clone(0, 0, 0x10000000 | 17, 0) >= 0, 'OSError'\nprint(42)",
    ],
)
def test_no_process_can_be_made(program):
    contained(program, "not implemented", "Errno", "OSError", "segmentation fault")


@pytest.mark.more
def test_a_fork_bomb_that_shrugs_off_errors_runs_into_the_time_limit():
    program = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
    contained(program, "1 s of CPU", limits=SPIN)


def test_threads_are_counted():
    bomb = "import threading, time\nfor _ in range(100):\n"
    bomb += " threading.Thread(target=time.sleep, args=(1,)).start()\nprint(42)"
    contained(bomb, "can't start new thread")
    few = bomb.replace("100", "4").replace("(1,)", "(0.1,)")
    assert attack(few).reward == 1.0


@pytest.mark.more
def test_no_thread_runs_on_after_the_answer():
    loop = "import threading\ndef f():\n while True: pass\nthreading.Thread(target=f).start()"
    contained(f"print(42, flush=True)\n{loop}", "1 s of CPU", limits=SPIN)


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "/etc/shadow", "/etc/hostname", "/proc/self/environ", "/proc/1/cmdline"),
        *("/sys/kernel/notes", "/dev/mem", "/dev/zero", "/dev/stdin", "/root/.bashrc", "/home"),
        *("/tmp", "/var/log", "/usr/share", "/usr/bin/env", "/run", "/usr/local", "/srv/../etc"),
        *(code.__file__, __file__, os.getcwd()),
    ],
)
def test_files_of_the_host_cannot_be_read(path):
    read = f"import os\np = {path!r}\nx = os.listdir(p) if os.path.isdir(p) else open(p).read(1)"
    contained(f"{read}\nprint(42)", "FileNotFoundError")


def test_the_sandbox_holds_what_a_program_needs_and_nothing_else():
    allowed = "{'dev', 'lib', 'lib32', 'lib64', 'python', 'usr', 'work'}"
    checks = f"""
import fcntl, os
assert set(os.listdir('/')) <= {allowed}, os.listdir('/')
assert os.listdir('/work') == ['main.py'] and os.listdir('/dev') == ['null']
assert not set(os.listdir('/usr')) - {{'bin', 'lib', 'lib32', 'lib64'}}, os.listdir('/usr')
assert os.getuid() == os.getgid() == 65534 and os.getpid() == 1 and os.uname()[1] != 'localhost'
assert not {{name for name in os.environ if name.startswith(('PYTHONPATH', 'USER', 'SSH', 'HF'))}}
for descriptor in range(3, 64):
    try:
        fcntl.fcntl(descriptor, fcntl.F_GETFD)
    except OSError:
        continue
    raise AssertionError(f'descriptor {{descriptor}} is open')
print(42)
"""
    grade = attack(checks)
    assert grade.reward == 1.0, grade.reason


def test_nothing_can_be_written_anywhere(tmp_path):
    folders = [tmp_path, Path(code.__file__).parent, "/usr/lib", "/dev", "/tmp", "/dev/shm"]
    folders += ["/", "/work"]
    for folder in folders:
        name = f"written-{uuid.uuid4().hex}"
        write = f"open({os.path.join(folder, name)!r}, 'w').write('x')\nprint(42)"
        contained(write, "Read-only file system", "No such file")
        assert not Path(folder, name).exists()
    for change in (
        "remove('/usr/lib/os-release')",
        "chmod('/usr', 0o777)",
        "truncate('main.py', 0)",
    ):
        contained(f"import os\nos.{change}\nprint(42)", "not implemented", "Read-only")


def test_the_standard_input_cannot_be_rewritten():
    grow = "import os\nos.ftruncate(0, 1 << 40)\nprint(42)"
    contained(grow, "not implemented", "not permitted")
    contained("import os\nos.write(0, b'x')\nprint(42)", "not permitted", "File too large")


def test_links_lead_nowhere(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("42")
    for link in ("symlink", "link"):
        for target in (str(secret), "/etc/passwd", "/usr/lib/os-release"):
            program = f"import os\nos.{link}({target!r}, 'x')\nprint(42)"
            contained(program, "not implemented", "No such file")
    contained("import os\nos.rename('/usr/lib/os-release', 'x')\nprint(42)", "not implemented")
    assert secret.read_text() == "42" and secret.stat().st_nlink == 1


def test_no_network_not_even_loopback():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}))\nprint(42)"
        contained(connect, "not implemented")
        with pytest.raises(BlockingIOError):
            server.accept()
    for family in ("AF_UNIX", "AF_INET6", "AF_NETLINK"):
        contained(f"import socket\nsocket.socket(socket.{family})\nprint(42)", "not implemented")
    contained("import socket\nsocket.getaddrinfo('localhost', 80)\nprint(42)", "gaierror", "Errno")


@pytest.mark.parametrize(
    "call",
    [
        *("ptrace(0, 0, 0, 0)", "ptrace(16, 1, 0, 0)", "process_vm_readv(1, 0, 0, 0, 0, 0)"),
        *("mount(b'proc', b'/work', b'proc', 0, 0)", "umount2(b'/usr/lib', 2)", "chroot(b'/work')"),
        *("unshare(0x10000000)", "setns(0, 0)", "setuid(0)", "personality(0x40000)"),
        *("syscall(321, 0, 0, 0)", "syscall(323, 0)", "syscall(425, 1, 0)", "syscall(250, 0, -3)"),
        *("syscall(435, 0, 0)", "syscall(0x40000000 + 39)", "pivot_root(b'/', b'/work')"),
    ],
)
def test_system_calls_that_open_doors_are_refused(call):
    """bpf, userfaultfd, io_uring, keyctl, clone3 and the x32 ABI by number."""
    refused = SYSCALL + f"result = libc.{call}\nassert result != -1, ctypes.get_errno()\nprint(42)"
    contained(refused, "AssertionError: 38", "AssertionError: 1")


@pytest.mark.parametrize("target", ["os.getppid()", "-1", "1", "0", "os.getpid()", *"23456789"])
def test_no_process_can_be_killed(target):
    program = f"import os\nos.kill({target}, 9)\nprint(42)"
    contained(program, "not implemented")


def test_the_parent_outlives_every_signal_to_every_pid():
    program = """
import os
for pid in range(-5, 40_000):
    try:
        os.kill(pid, 9)
    except OSError:
        pass
"""
    contained(program, "nothing, expected")


def test_limits_cannot_be_raised_again():
    for name in ("AS", "CPU", "FSIZE", "NPROC", "NOFILE", "CORE"):
        limit = f"resource.RLIMIT_{name}"
        program = f"import resource\nresource.setrlimit({limit}, (10 ** 12, 10 ** 12))\nprint(42)"
        contained(program, "not allowed to raise", "not permitted")


def test_one_test_leaves_nothing_for_the_next():
    """Neither in files nor in the processes that run: each test is process 1 and finds one file."""
    program = (
        "import os\nprint(os.getpid(), os.listdir())\ntry: open('seen', 'w')\nexcept OSError: 0"
    )
    truth = {"tests": [{"stdout": "1 ['main.py']"}] * 3}
    assert code.grade(fenced(program), truth, limits=PATIENT).reward == 1.0
