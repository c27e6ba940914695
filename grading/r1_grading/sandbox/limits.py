"""Resource limits of a program: those of a graded answer, and the budget of a single run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

MIB = 2**20
MAX_PROGRAM_BYTES = 32 * MIB
MARGIN_SECONDS = 15.0
"""Time to kill a program after the code reward's own limits are used up."""
COMPILER_PROCESSES, COMPILER_STACK_BYTES = 16, 64 * MIB


@dataclass(frozen=True)
class Budget:
    """Limits of one run.

    Attributes:
        wall_seconds: wall time.
        cpu_seconds: CPU time of the program.
        memory_bytes: address space.
        stack_bytes: the stack of each thread.
        processes: the program and its threads.
        output_bytes: standard output and error together.
        disk_bytes: the bytes of files that a compiler may write.
    """

    wall_seconds: float
    cpu_seconds: float
    memory_bytes: int
    stack_bytes: int
    processes: int
    output_bytes: int
    disk_bytes: int = 0


def _capped_field(default: float, cap: float) -> Any:
    """Return a field of `Limits`."""
    return field(default=default, metadata={"cap": cap})


@dataclass(frozen=True)
class Limits:
    """Limits of one graded answer; a prompt may override each, up to its cap.

    The default cpu_seconds is LiveCodeBench's limit.

    Attributes:
        cpu_seconds: CPU time per test.
        wall_seconds: wall time per test, which also stops a program that sleeps.
        total_seconds: wall time of the whole answer, compilation included.
        memory_mib: address space.
        processes: the program and its threads.
        output_mib: standard output and error together.
        compile_seconds: CPU time of each compiler process; its wall time is twice that.
        compile_memory_mib: address space of each compiler process.

    Raises:
        ValueError: a value that is not a number above 0 and at most its cap."""

    cpu_seconds: float = _capped_field(6.0, cap=120)
    wall_seconds: float = _capped_field(12.0, cap=240)
    total_seconds: float = _capped_field(60.0, cap=3600)
    memory_mib: int = _capped_field(1024, cap=16384)
    processes: int = _capped_field(16, cap=128)
    output_mib: float = _capped_field(4.0, cap=64)
    compile_seconds: float = _capped_field(15.0, cap=240)
    compile_memory_mib: int = _capped_field(2048, cap=16384)

    def __post_init__(self) -> None:
        for limit in fields(self):
            name, value, cap = limit.name, getattr(self, limit.name), limit.metadata["cap"]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"limits.{name} must be a number, got {value!r}")
            if not 0 < value <= cap:
                raise ValueError(f"limits.{name} must be above 0 and at most {cap}, got {value!r}")

    @classmethod
    def parse(cls, overrides: dict[str, Any] | None) -> "Limits":
        """Return the defaults with a prompt's `overrides`.

        Raises:
            ValueError: an unknown name, or a value that is out of range.
        """
        if not isinstance(overrides, dict | None):
            raise ValueError(f"limits must be an object, got {overrides!r}")
        names = [limit.name for limit in fields(cls)]
        for name in overrides or {}:
            if name not in names:
                raise ValueError(f"limits.{name} is unknown; known: {', '.join(names)}")
        return cls(**overrides or {})

    def program(self, seconds_left: float = math.inf, *, compiled: bool = False) -> Budget:
        """Return the budget of one run of the program or of a checker.

        Args:
            seconds_left: what remains of `total_seconds`.
            compiled: whether the program recurses on the machine's stack."""
        memory_bytes = int(self.memory_mib * MIB)
        return Budget(
            wall_seconds=min(self.wall_seconds, max(seconds_left, 0.01)),
            cpu_seconds=self.cpu_seconds,
            memory_bytes=memory_bytes,
            # Deep recursion needs stack, but every thread reserves as much of the address space.
            stack_bytes=memory_bytes // (2 if compiled else 8),
            processes=int(self.processes),
            output_bytes=int(self.output_mib * MIB),
        )

    def compiler(self) -> Budget:
        """Return the budget of the compiler, whose standard output is the program."""
        return Budget(
            wall_seconds=min(2 * self.compile_seconds, self.total_seconds),
            cpu_seconds=self.compile_seconds,
            memory_bytes=int(self.compile_memory_mib * MIB),
            stack_bytes=COMPILER_STACK_BYTES,
            processes=COMPILER_PROCESSES,
            output_bytes=MAX_PROGRAM_BYTES,
            disk_bytes=4 * MAX_PROGRAM_BYTES,
        )


def time_limit(kind: str, fields: Mapping[str, Any], seconds: float) -> float:
    """Return how long one grade may take.

    It is `seconds`; of programs, which the code reward ends itself, what their limits add up to, as
    many tests may take longer than any formula should.

    Args:
        kind: the reward's name.
        fields: the prompt's fields, with limits of its own.
        seconds: the limit of other rewards."""
    if kind != "code":
        return seconds
    try:
        return max(seconds, Limits.parse(fields.get("limits")).total_seconds + MARGIN_SECONDS)
    except (TypeError, ValueError):  # the reward raises it at once
        return seconds
