"""What one program may use, and how far a prompt may raise it."""

import math
from dataclasses import dataclass, fields
from typing import Any

from megatron_r1.rewards.sandbox.process import Budget

MIB = 2**20
MAX_PROGRAM_BYTES = 32 * MIB
COMPILER_PROCESSES, COMPILER_STACK_BYTES = 16, 64 * MIB


@dataclass(frozen=True)
class Limits:
    """cpu_seconds, wall_seconds: per test (the clock runs for sleepers too). total_seconds: wall
    time of one graded answer, compilation included. memory_mib: address space. processes: the
    program with its threads. output_mib: standard output and error together. compile_seconds,
    compile_memory_mib: CPU time and address space of each of the compiler's processes; its wall
    time is twice that.

    cpu_seconds is LiveCodeBench's limit. Raises ValueError for a value that is not a number above 0
    and at most the cap.
    """

    cpu_seconds: float = 6.0
    wall_seconds: float = 12.0
    total_seconds: float = 60.0
    memory_mib: int = 1024
    processes: int = 16
    output_mib: float = 4.0
    compile_seconds: float = 15.0
    compile_memory_mib: int = 2048

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"limits.{name} must be a number, got {value!r}")
            if not 0 < value <= CAPS[name]:
                raise ValueError(
                    f"limits.{name} must be above 0 and at most {CAPS[name]}, got {value!r}"
                )

    @classmethod
    def parse(cls, overrides: dict[str, Any] | None) -> "Limits":
        """The defaults with a prompt's `overrides`. Raises ValueError naming an unknown one."""
        if not isinstance(overrides, dict | None):
            raise ValueError(f"limits must be an object, got {overrides!r}")
        known = [field.name for field in fields(cls)]
        for name in overrides or {}:
            if name not in known:
                raise ValueError(f"limits.{name} is unknown; known: {', '.join(known)}")
        return cls(**overrides or {})

    def program(self, seconds_left: float = math.inf, *, compiled: bool = False) -> Budget:
        """For one run of the program, or of the checker, with so much of `total_seconds` left."""
        memory_bytes = int(self.memory_mib * MIB)
        return Budget(
            wall_seconds=min(self.wall_seconds, seconds_left),
            cpu_seconds=self.cpu_seconds,
            memory_bytes=memory_bytes,
            # Deep recursion needs stack, but every thread reserves as much of the address space.
            stack_bytes=memory_bytes // (2 if compiled else 8),
            processes=int(self.processes),
            output_bytes=int(self.output_mib * MIB),
            disk_bytes=0,
        )

    def compiler(self) -> Budget:
        """For the compiler, whose output is the program."""
        return Budget(
            wall_seconds=min(2 * self.compile_seconds, self.total_seconds),
            cpu_seconds=self.compile_seconds,
            memory_bytes=int(self.compile_memory_mib * MIB),
            stack_bytes=COMPILER_STACK_BYTES,
            processes=COMPILER_PROCESSES,
            output_bytes=MAX_PROGRAM_BYTES,
            disk_bytes=4 * MAX_PROGRAM_BYTES,
        )


CAPS: dict[str, float] = {
    "cpu_seconds": 120,
    "wall_seconds": 240,
    "total_seconds": 3600,
    "memory_mib": 16384,
    "processes": 128,
    "output_mib": 64,
    "compile_seconds": 240,
    "compile_memory_mib": 16384,
}
