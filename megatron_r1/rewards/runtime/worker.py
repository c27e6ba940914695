"""A reward worker: `python -m megatron_r1.rewards.runtime.worker MEMORY_LIMIT_BYTES`.

Reads jobs from stdin, grades them one after the other and writes replies to the original stdout.
It dies with its parent, which enforces time limits and replaces it.
"""

import os
import resource
import sys
from collections.abc import Callable
from typing import BinaryIO

import msgspec

from megatron_r1.processes.lifetime import end_without_parent
from megatron_r1.rewards.base import MAX_REASON_CHARS, UNGRADED, Grade, shorten
from megatron_r1.rewards.runtime.call_errors import explain_call
from megatron_r1.rewards.runtime.protocol import LENGTH, Job, Reply, frame
from megatron_r1.user_code import find_function


def main(memory_limit_bytes: int) -> None:
    end_without_parent()
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jobs, replies = _private_streams()
    decoder = msgspec.json.Decoder(Job)
    functions: dict[str, Callable[..., Grade]] = {}

    def send(reply: Reply) -> None:
        replies.write(frame(reply))
        replies.flush()

    send(Reply("ready"))
    while header := jobs.read(LENGTH.size):
        job = decoder.decode(jobs.read(LENGTH.unpack(header)[0]))
        if job.target not in functions:
            try:
                functions[job.target] = find_function(job.target)
            except BaseException as error:
                send(Reply("unloadable", job.id, reason=_describe(error)))
                continue
            send(Reply("loaded", job.id))
        reply = _grade(functions[job.target], job)
        send(reply)
        if reply.status == "memory":
            return


def _grade(function: Callable[..., Grade], job: Job) -> Reply:
    try:
        grade = function(job.response, job.truth, **job.fields)
        if not isinstance(grade, Grade):
            raise TypeError(f"{job.target} must return a Grade, got {type(grade).__name__}")
        return Reply("graded", job.id, grade.reward, grade.reason)
    except MemoryError:
        return Reply("memory", job.id, reason="ran over the memory limit")
    except BaseException as error:  # SystemExit too: one response must not end the worker
        is_call = isinstance(error, TypeError)
        explanation = explain_call(function, job.target, job.fields) if is_call else ""
        return Reply("failed", job.id, reason=f"{UNGRADED}: {explanation or _describe(error)}")


def _describe(error: BaseException) -> str:
    return shorten(f"{type(error).__name__}: {error}", MAX_REASON_CHARS - 50)


def _private_streams() -> tuple[BinaryIO, BinaryIO]:
    """Move the pipes away from descriptors 0 and 1, where a reward could read or print."""
    jobs, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return jobs, replies


if __name__ == "__main__":
    main(int(sys.argv[1]))
