"""Grades a few answers, in this process and in workers: `python grading/example.py`."""

import asyncio

from r1_grading import RewardPool, grade

ANSWERS = (
    (r"<think>A half.</think>so \boxed{0.5}", "1/2"),
    (r"<think>A half.</think>so \boxed{0.4}", "1/2"),
    (r"\boxed{2^{100} - 1}", "1267650600228229401496703205375"),
)


async def grade_in_workers() -> None:
    """Grade all answers at once, each in a process that may hang or crash."""
    async with RewardPool(num_workers=2, timeout_seconds=5.0) as pool:
        for result in await asyncio.gather(*(pool.grade("math", *pair) for pair in ANSWERS)):
            print(f"{result.reward:.0f}  {result.reason}")


if __name__ == "__main__":
    print(grade("format", "<think>1 + 1</think><answer>2</answer>"))
    asyncio.run(grade_in_workers())
