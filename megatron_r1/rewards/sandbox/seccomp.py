"""The system-call filter of the sandbox, as a classic BPF program for `bwrap --seccomp`.

A call that is not allowed fails with ENOSYS, as on a kernel without it, so that the C library
falls back where it can. A program for another architecture, which numbers calls differently, is
killed. The layout is seccomp(2)'s `struct seccomp_data` and `struct sock_filter`.
"""

import errno
import platform
import struct

from megatron_r1.rewards.sandbox import syscalls

# AUDIT_ARCH_* of linux/audit.h.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
LOAD, AND, RETURN, JUMP_EQUAL, JUMP_AT_LEAST = 0x20, 0x54, 0x06, 0x15, 0x35
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000 | errno.ENOSYS
X32_BIT = 0x40000000  # the x32 ABI repeats every call at number + this

CLONE_THREAD = 0x00010000
CLONE_NEW_NAMESPACES = 0x7E020000
TERMINAL_QUERIES = (0x5401, 0x5413)  # TCGETS (isatty), TIOCGWINSZ
DESCRIPTOR_SETTINGS = (0x5450, 0x5451, 0x541B, 0x5421)  # FIONCLEX, FIOCLEX, FIONREAD, FIONBIO


def build_filter(*, compiler: bool) -> bytes:
    """Return the BPF program in the form that `--seccomp` reads.

    compiler: allow new processes and files. Otherwise only threads are allowed, so that one limit
    on address space bounds the memory of the whole sandbox. Raises ValueError on a machine whose
    system calls are not in the table.
    """
    machine = platform.machine()
    if machine not in syscalls.MACHINES:
        raise ValueError(
            f"the sandbox has no system-call table for {machine}: run the code reward on "
            f"{' or '.join(syscalls.MACHINES)}"
        )
    tables = [syscalls.FILES, syscalls.MEMORY, syscalls.PROCESS, syscalls.SIGNALS_AND_TIME]
    if compiler:
        tables.append(syscalls.COMPILING)
    filtered = syscalls.numbers(syscalls.FILTERED, machine)
    clone_mask = CLONE_NEW_NAMESPACES | (0 if compiler else CLONE_THREAD)
    program = [
        _instruction(LOAD, ARCHITECTURE),
        _instruction(JUMP_EQUAL, ARCHITECTURES[machine], if_true=1),
        _instruction(RETURN, KILL),
        _instruction(LOAD, NUMBER),
        _instruction(JUMP_AT_LEAST, X32_BIT, if_false=1),
        _instruction(RETURN, FAIL),
    ]
    for table in tables:
        for number in syscalls.numbers(table, machine).values():
            program += _if_equal(number, [_instruction(RETURN, ALLOW)])
    clone_check = [_instruction(LOAD, ARGUMENTS), _instruction(AND, clone_mask)]
    clone_check += _if_equal(0 if compiler else CLONE_THREAD, [_instruction(RETURN, ALLOW)])
    program += _if_equal(filtered["clone"], [*clone_check, _instruction(RETURN, FAIL)])
    ioctl_check = [_instruction(LOAD, ARGUMENTS + 8)]
    for request in (*TERMINAL_QUERIES, *DESCRIPTOR_SETTINGS):
        ioctl_check += _if_equal(request, [_instruction(RETURN, ALLOW)])
    program += _if_equal(filtered["ioctl"], [*ioctl_check, _instruction(RETURN, FAIL)])
    return b"".join([*program, _instruction(RETURN, FAIL)])


def _if_equal(value: int, then: list[bytes]) -> list[bytes]:
    return [_instruction(JUMP_EQUAL, value, if_false=len(then)), *then]


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, operand)
