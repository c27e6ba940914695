"""Messages between a process and its child: frames of JSON over the child's stdin and stdout."""

import os
import struct
from typing import BinaryIO

import msgspec

LENGTH = struct.Struct("<I")


def frame(message: msgspec.Struct) -> bytes:
    """Return the frame of a message: the length of its JSON (uint32, little-endian), then the
    JSON."""
    payload = msgspec.json.encode(message)
    return LENGTH.pack(len(payload)) + payload


def private_streams() -> tuple[BinaryIO, BinaryIO]:
    """Move the pipes away from descriptors 0 and 1, where code that the child runs could read or
    print."""
    jobs, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return jobs, replies
