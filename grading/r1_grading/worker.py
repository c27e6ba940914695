"""A reward worker: `python -m r1_grading.worker MEMORY_LIMIT_BYTES`.

Reads jobs from stdin, grades them one after the other and writes replies to the original stdout.
It dies with its parent, which enforces time limits and replaces it.

Messages are length-prefixed frames of JSON, because a truth may be an integer of any size, and
because nothing that a process which runs hostile text sends may be unpickled."""

import resource
import sys
from collections.abc import Callable
from typing import Any, Literal, Self

import msgspec

from r1_grading.base.errors import RunError, UserError, shorten
from r1_grading.base.lifetime import end_without_parent
from r1_grading.base.user_code import find_function, location_of
from r1_grading.base.workers import (
    LENGTH_HEADER,
    FramedProcess,
    WorkerLost,
    encode_frame,
    private_streams,
)
from r1_grading.reward_signatures import adapt_signature, explain_failure
from r1_grading.rewards import MAX_REASON_CHARS, FiniteGrade, Grade

MAX_REPLY_BYTES = 64 * 1024
MEMORY_WORDS = (
    "memoryerror",
    "cannot allocate memory",
    "out of memory",
    "failed to map segment from shared object",
    "can't start new thread",
    "without setting an exception",
    "without exception set",
)
"""What errors without memory say, in lower case: Python's, errno's ENOMEM, those of C++ libraries,
of a shared library that is loaded, of a thread that has no room for its stack, and of CPython where
it had no memory for the MemoryError."""


class JobArguments(msgspec.Struct):
    """A grading job without its response.

    Attributes:
        id: the job's number.
        target: the reward's "module:function", called as function(response, truth, **fields).
        truth: what the reward compares with.
        fields: the keyword arguments of the call."""

    id: int
    target: str
    truth: Any
    fields: dict[str, Any]


class GradingJob(JobArguments):
    """One response for a worker to grade."""

    response: str


class EncodedJob(JobArguments):
    """A `GradingJob` as the pool sends it, the response encoded before."""

    response: msgspec.Raw


class JobStatus(msgspec.Struct):
    """A worker's report on a job, or on itself.

    Attributes:
        status: "ready": the worker has started; "loaded": the job's function is imported, and
            grading starts; "graded": the job's grade; "failed": a grade of `Grade.ungraded`,
            because the function raised; "memory": the job exceeded the memory limit, and the worker
            exits; "unloadable": the function cannot be imported.
        id: the job's; -1: the report is on the worker.
        reward: that of the grade.
        reason: why the grade is what it is, or what failed.
        verdict: `Grade.verdict`.
        missing: `Grade.missing`.
        is_bounded: whether the reward is from 0 to 1; False for a `FiniteGrade`.
        is_out_of_memory: whether the import of an unloadable function ended for want of memory."""

    status: Literal["ready", "loaded", "graded", "failed", "memory", "unloadable"]
    id: int = -1
    reward: float = 0.0
    reason: str = ""
    verdict: str = ""
    missing: tuple[str, ...] = ()
    is_bounded: bool = True
    is_out_of_memory: bool = False


class WorkerProcess(FramedProcess[JobStatus]):
    """A reward worker as its pool sees it, created by `start`."""

    loaded: set[str]
    """Targets that the worker has imported."""
    seconds_per_job = 1.0
    """A moving average, kept by the pool."""

    @classmethod
    async def start(cls, memory_limit_bytes: int) -> Self:
        """Return a worker that is ready for jobs.

        Raises:
            RunError: the worker does not become ready; the message has its stderr.
        """
        module, arguments = "r1_grading.worker", [str(memory_limit_bytes)]
        try:
            worker = await cls.launch(module, arguments, JobStatus, MAX_REPLY_BYTES)
        except WorkerLost as error:
            raise RunError(
                f"a reward worker did not start ({error}); its memory limit is "
                f"{memory_limit_bytes} bytes: raise it if that is too little"
            ) from None
        worker.loaded = set()
        return worker


def main(memory_limit_bytes: int) -> None:
    """Serve jobs until stdin ends, or a job exceeds the limit on address space."""
    end_without_parent()
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jobs, replies = private_streams()
    decoder = msgspec.json.Decoder(GradingJob)
    functions: dict[str, Callable[..., Grade]] = {}

    def send(status: JobStatus) -> None:
        replies.write(encode_frame(status))
        replies.flush()

    send(JobStatus("ready"))
    while header := jobs.read(LENGTH_HEADER.size):
        job = decoder.decode(jobs.read(LENGTH_HEADER.unpack(header)[0]))
        if job.target not in functions:
            try:
                functions[job.target] = adapt_signature(find_function(job.target), job.target)
            except BaseException as error:  # noqa: BLE001 - a user's module may raise anything
                status = JobStatus("unloadable", job.id, reason=_describe_error(error))
                status.is_out_of_memory = _comes_from_memory(error)
                send(status)
                continue
            send(JobStatus("loaded", job.id))
        result = _grade_job(functions[job.target], job)
        send(result)
        if result.status == "memory":
            return


def _grade_job(function: Callable[..., Grade], job: GradingJob) -> JobStatus:
    try:
        grade = function(job.response, job.truth, **job.fields)
        if not isinstance(grade, Grade):
            raise TypeError(
                f"{job.target} must return a Grade, got {type(grade).__name__}: "
                "return Grade(number from 0 to 1, reason)"
            )
    except MemoryError:
        return JobStatus("memory", job.id, reason="ran over the memory limit")
    except BaseException as error:  # noqa: BLE001 - SystemExit must not end the worker either
        fault = explain_failure(error, function, job.target, job.fields)
        place = location_of(error)  # in the user's own files
        call = f", called with the response {shorten(repr(job.response))}" if place else ""
        grade = Grade.ungraded(fault.text or _describe_error(error) + place + call, fault.missing)
    status: Literal["graded", "failed"] = "graded" if grade.is_graded else "failed"
    return JobStatus(
        status,
        job.id,
        grade.reward,
        grade.reason,
        verdict=grade.verdict,
        missing=grade.missing,
        is_bounded=not isinstance(grade, FiniteGrade),
    )


def _comes_from_memory(error: BaseException | None) -> bool:
    """Return whether `error` is for want of memory, or was raised while such a one was handled."""
    chain: list[BaseException] = []  # `raise error from error` makes a circle
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return any(
        isinstance(cause, MemoryError) or is_memory_message(f"{type(cause).__name__}: {cause}")
        for cause in chain
    )


def is_memory_message(message: str) -> bool:
    """Return whether an error's message is that of memory which is not there."""
    return any(words in message.lower() for words in MEMORY_WORDS)


def _describe_error(error: BaseException) -> str:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return shorten(f"{kind}{error}", MAX_REASON_CHARS - 100)


if __name__ == "__main__":
    main(int(sys.argv[1]))
