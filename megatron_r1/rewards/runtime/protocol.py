"""Messages between the pool and its worker processes: length-prefixed JSON frames.

JSON, because a truth may be an integer of any size, and because nothing that a process which runs
hostile text sends may be unpickled.
"""

import struct
from typing import Any, Literal

import msgspec

LENGTH = struct.Struct("<I")
MAX_REPLY_BYTES = 64 * 1024


class Job(msgspec.Struct):
    """target: "module:function" of the reward, called as function(response, truth, **fields)."""

    id: int
    target: str
    response: str
    truth: Any
    fields: dict[str, Any]


class Reply(msgspec.Struct):
    """A worker's message.

    ready: the worker has started. loaded: the function of job `id` is imported, and grading starts.
    graded: the job's grade. failed: the function raised, see `reason`. memory: the job exceeded the
    memory limit, and the worker exits. unloadable: the function cannot be imported.
    """

    status: Literal["ready", "loaded", "graded", "failed", "memory", "unloadable"]
    id: int = -1
    reward: float = 0.0
    reason: str = ""


def frame(message: msgspec.Struct) -> bytes:
    payload = msgspec.json.encode(message)
    return LENGTH.pack(len(payload)) + payload
