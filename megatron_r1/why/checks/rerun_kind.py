"""The frame of a rerun: what it refines, where it runs, what comparison it makes."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from megatron_r1.why.comparison import DEPARTS, EQUAL, Comparison
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.rerun.readings import Distances, Reading

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation

T = TypeVar("T")


class Rerun(NamedTuple):
    """A kind of rerun.

    Attributes:
        stage: the stage of its comparison, and of the one that it refines.
        name: the quantity that it compares.
        refines: the name of the comparison that it refines.
        start: what is started, for a message.
        check: makes it."""

    stage: str
    name: str
    refines: str
    start: str
    check: Callable[[RecordedStep, Recomputation, Comparison], tuple[Comparison, Reading]]


def rerun_comparison(
    rerun: Rerun, subject: str, distances: Distances, tolerance: float, reading: Reading
) -> Comparison:
    """Return the comparison of a rerun with transformers.

    Args:
        rerun: its kind.
        subject: what is compared, with the distances as text.
        distances: the distances.
        tolerance: the largest distance that is rounding.
        reading: what the distances say."""
    text = f"{subject}; {reading.conclusion}"
    return Comparison(
        rerun.stage,
        rerun.name,
        DEPARTS if reading.departs else EQUAL,
        text,
        distances.rerun_to_transformers,
        tolerance,
        "rounding of the dtype (docs/compare.md)",
        text if reading.departs else "",
        remedy=reading.remedy if reading.departs else "",
    )


def run_in_scratch_folder(work: Callable[[Path], Coroutine[Any, Any, T]]) -> T:
    """Run what starts processes, in a temporary folder that is removed; SIGTERM and Ctrl-C end it
    after it has stopped them.

    Args:
        work: what is run, given the folder.

    Raises:
        KeyboardInterrupt: a signal has ended it."""

    async def run(scratch: Path) -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work(scratch)

    with tempfile.TemporaryDirectory(prefix="megatron-r1-why-") as scratch:
        try:
            return asyncio.run(run(Path(scratch)))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
