"""A reward worker, from the side of the pool."""

from typing import Self

from megatron_r1.errors import RunError
from megatron_r1.processes.framed_process import FramedProcess, WorkerLost
from megatron_r1.rewards.runtime.worker import MAX_REPLY_BYTES, JobStatus


class WorkerProcess(FramedProcess[JobStatus]):
    """A reward worker, created by `start`."""

    loaded: set[str]
    """Targets that the worker has imported."""
    seconds_per_job = 1.0
    """A moving average, kept by the pool."""

    @classmethod
    async def start(cls, memory_limit_bytes: int) -> Self:
        """Return a worker that is ready for jobs; otherwise raise RunError with its stderr."""
        module, arguments = "megatron_r1.rewards.runtime.worker", [str(memory_limit_bytes)]
        try:
            worker = await cls.launch(module, arguments, JobStatus, MAX_REPLY_BYTES)
        except WorkerLost as error:
            raise RunError(
                f"a reward worker did not start ({error}); its memory limit is "
                f"{memory_limit_bytes} bytes: raise it if that is too little"
            ) from None
        worker.loaded = set()
        return worker
