"""Limits of the sandbox for programming benchmarks."""

MAX_TOTAL_SECONDS = 600
"""Wall time for all tests of one program."""


def code_limits(cpu_seconds: float, memory_mib: float, num_tests: int) -> dict[str, float]:
    """Return `limits` of the code reward for a judge's limits per test (`rewards.sandbox.limits`).

    Wall time is twice the CPU time, because the machine does other work too. All tests together get
    the time they may take one by one, up to `MAX_TOTAL_SECONDS`.
    """
    cpu_seconds = min(max(cpu_seconds, 1.0), 120.0)
    total = min(max(60.0, cpu_seconds * num_tests), MAX_TOTAL_SECONDS)
    return {
        "cpu_seconds": cpu_seconds,
        "wall_seconds": 2 * cpu_seconds,
        "total_seconds": total,
        "memory_mib": min(memory_mib, 16_384),
    }
