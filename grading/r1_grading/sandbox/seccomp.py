"""The system-call filter of the sandbox, as a classic BPF program for `bwrap --seccomp`.

A call that is not allowed fails with ENOSYS, as on a kernel without it, so that the C library
falls back where it can. A program for another architecture, which numbers calls differently, is
killed. The layout is seccomp(2)'s `struct seccomp_data` and `struct sock_filter`.

The list has what contest programs, CPython and g++ need to compute and to read files. It leaves
out, among others, ptrace, process_vm_*, mount, unshare, setns, socket and all network calls, kill,
link and symlink, memfd_create and System V memory (which the limit on address space does not
count), keyctl, bpf, userfaultfd, io_uring, perf_event_open. clone3 hides its flags from a filter
and is left out too: the C library then uses clone, whose flags are checked here.

Each entry is "name x86-64 aarch64"; "-" where a machine never had the call. The numbers are those
of the kernel's asm/unistd_64.h and asm-generic/unistd.h."""

import errno
import functools
import platform
import struct

from r1_grading.base.errors import Cause
from r1_grading.sandbox.requirements import SandboxUnavailable

ALLOWED = """
read 0 63 | write 1 64 | readv 19 65 | writev 20 66 | pread64 17 67 | pwrite64 18 68 |
preadv 295 69 | pwritev 296 70 | lseek 8 62 | close 3 57 | close_range 436 436 | open 2 - |
openat 257 56 | stat 4 - | lstat 6 - | fstat 5 80 | newfstatat 262 79 | statx 332 291 |
access 21 - | faccessat 269 48 | faccessat2 439 439 | readlink 89 - | readlinkat 267 78 |
getdents 78 - | getdents64 217 61 | getcwd 79 17 | chdir 80 49 | fchdir 81 50 |
fadvise64 221 223 | fsync 74 82 | fdatasync 75 83 | flock 73 32 | fcntl 72 25 | dup 32 23 |
dup2 33 - | dup3 292 24 | pipe 22 - | pipe2 293 59 | poll 7 - | ppoll 271 73 | select 23 - |
pselect6 270 72 | epoll_create 213 - | epoll_create1 291 20 | epoll_ctl 233 21 |
epoll_wait 232 - | epoll_pwait 281 22 | eventfd 284 - | eventfd2 290 19 |
mmap 9 222 | munmap 11 215 | mremap 25 216 | mprotect 10 226 | madvise 28 233 | brk 12 214 |
msync 26 227 | mincore 27 232 |
execve 59 221 | exit 60 93 | exit_group 231 94 | wait4 61 260 | waitid 247 95 | arch_prctl 158 - |
futex 202 98 | set_robust_list 273 99 | get_robust_list 274 100 | set_tid_address 218 96 |
rseq 334 293 | membarrier 324 283 | gettid 186 178 | getpid 39 172 | getppid 110 173 |
getuid 102 174 | geteuid 107 175 | getgid 104 176 | getegid 108 177 | getresuid 118 148 |
getresgid 120 150 | getgroups 115 158 | getpgrp 111 - | getpgid 121 155 | getsid 124 156 |
uname 63 160 | sysinfo 99 179 | getrusage 98 165 | getrlimit 97 163 | setrlimit 160 164 |
prlimit64 302 261 | sched_yield 24 124 | sched_getaffinity 204 123 | getcpu 309 168 |
getrandom 318 278 |
rt_sigaction 13 134 | rt_sigprocmask 14 135 | rt_sigreturn 15 139 | rt_sigsuspend 130 133 |
rt_sigpending 127 136 | rt_sigtimedwait 128 137 | sigaltstack 131 132 | tgkill 234 131 |
restart_syscall 219 128 | alarm 37 - | getitimer 36 102 | setitimer 38 103 | time 201 - |
times 100 153 | gettimeofday 96 169 | clock_gettime 228 113 | clock_getres 229 114 |
clock_nanosleep 230 115 | nanosleep 35 101
"""
FILTERED = "clone 56 220 | ioctl 16 29"
"""Allowed with certain arguments only."""
COMPILING = """
mkdir 83 - | mkdirat 258 34 | rmdir 84 - | unlink 87 - | unlinkat 263 35 | rename 82 - |
renameat 264 38 | renameat2 316 276 | chmod 90 - | fchmod 91 52 | fchmodat 268 53 | umask 95 166 |
truncate 76 45 | ftruncate 77 46 | fallocate 285 47 | fork 57 - | vfork 58 -
"""
"""System calls of the compiler, which writes files and runs the assembler and the linker."""

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The machines of the tables' two columns, with their AUDIT_ARCH_* of linux/audit.h."""
NUMBER, ARCHITECTURE, ARGUMENT_OFFSETS = 0, 4, 16  # offsets in struct seccomp_data
LOAD = 0x20
AND = 0x54
RETURN = 0x06
JUMP_EQUAL = 0x15
JUMP_AT_LEAST = 0x35
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000 | errno.ENOSYS
X32_BIT = 0x40000000  # the x32 ABI repeats every call at number + this

CLONE_THREAD = 0x00010000
CLONE_NEW_NAMESPACES = 0x7E020000
TERMINAL_QUERIES = (0x5401, 0x5413)  # TCGETS (isatty), TIOCGWINSZ
DESCRIPTOR_SETTINGS = (0x5450, 0x5451, 0x541B, 0x5421)  # FIONCLEX, FIOCLEX, FIONREAD, FIONBIO


@functools.cache
def build_filter(*, compiler: bool) -> bytes:
    """Return the BPF program in the form that `--seccomp` reads.

    Args:
        compiler: whether to allow new processes and files. Otherwise only threads are allowed, so
            that one limit on address space bounds the memory of the whole sandbox.

    Raises:
        SandboxUnavailable: a machine whose system calls are not in the table."""
    machine = platform.machine()
    if machine not in MACHINES:
        raise SandboxUnavailable(
            f"the sandbox has no system-call table for {machine}: run the code reward on "
            f"{' or '.join(MACHINES)}",
            key="machine",
            cause=Cause.UNSUPPORTED,
        )
    allowed_calls = syscall_numbers(ALLOWED, machine) | (
        syscall_numbers(COMPILING, machine) if compiler else {}
    )
    filtered_calls = syscall_numbers(FILTERED, machine)
    clone_mask = CLONE_NEW_NAMESPACES | (0 if compiler else CLONE_THREAD)
    program = [
        _pack_instruction(LOAD, ARCHITECTURE),
        _pack_instruction(JUMP_EQUAL, MACHINES[machine], if_true=1),
        _pack_instruction(RETURN, KILL),
        _pack_instruction(LOAD, NUMBER),
        _pack_instruction(JUMP_AT_LEAST, X32_BIT, if_false=1),
        _pack_instruction(RETURN, FAIL),
    ]
    for number in allowed_calls.values():
        program += _if_equal(number, [_pack_instruction(RETURN, ALLOW)])
    clone_check = [_pack_instruction(LOAD, ARGUMENT_OFFSETS), _pack_instruction(AND, clone_mask)]
    clone_check += _if_equal(0 if compiler else CLONE_THREAD, [_pack_instruction(RETURN, ALLOW)])
    program += _if_equal(filtered_calls["clone"], [*clone_check, _pack_instruction(RETURN, FAIL)])
    ioctl_check = [_pack_instruction(LOAD, ARGUMENT_OFFSETS + 8)]
    for request in (*TERMINAL_QUERIES, *DESCRIPTOR_SETTINGS):
        ioctl_check += _if_equal(request, [_pack_instruction(RETURN, ALLOW)])
    program += _if_equal(filtered_calls["ioctl"], [*ioctl_check, _pack_instruction(RETURN, FAIL)])
    return b"".join([*program, _pack_instruction(RETURN, FAIL)])


def syscall_numbers(table: str, machine: str) -> dict[str, int]:
    """Return {name: number} on `machine` (one of MACHINES), without calls it does not have."""
    column = 1 + list(MACHINES).index(machine)
    entries = (entry.split() for entry in table.replace("\n", " ").split("|"))
    return {entry[0]: int(entry[column]) for entry in entries if entry[column] != "-"}


def _if_equal(value: int, instructions: list[bytes]) -> list[bytes]:
    return [_pack_instruction(JUMP_EQUAL, value, if_false=len(instructions)), *instructions]


def _pack_instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, operand)
