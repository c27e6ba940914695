"""Messages between a process and its child: frames of JSON over the child's stdin and stdout."""

import os
import struct
from typing import BinaryIO

import msgspec

LENGTH = struct.Struct("<I")


def frame(message: msgspec.Struct) -> bytes:
    """Return the frame of a message's JSON."""
    return framed(msgspec.json.encode(message))


def framed(payload: bytes) -> bytes:
    """Return a payload as it is sent: its length (uint32, little-endian), then itself."""
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
