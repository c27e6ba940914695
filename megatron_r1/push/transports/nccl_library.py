"""The functions of NCCL that a push calls, through ctypes, with communicators whose calls do not
block the host.

torch's process groups are not used here: their watchdog ends the process where a call fails or
takes long, and a process has to outlive its pushes. A communicator of these is watched by the
thread that uses it (`communicator`), so the variables TORCH_NCCL_* have no effect on a push."""

import ctypes
from functools import cache
from typing import NamedTuple

SUCCESS, IN_PROGRESS = 0, 7
BYTE = 1
MAGIC, CONFIG_VERSION = 0xCAFEBEEF, 21400
"""Of `ncclConfig_t`: of its fields NCCL reads those that this version had."""


class NcclError(RuntimeError):
    """A call of NCCL failed, or a rank of its communicator is gone."""


class UniqueId(ctypes.Structure):
    """`ncclUniqueId`, by which the ranks of a communicator meet."""

    _fields_ = [("internal", ctypes.c_byte * 128)]


class Config(ctypes.Structure):
    """The first fields of `ncclConfig_t`."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    ]


class Memory(NamedTuple):
    """Bytes of device memory, or none."""

    address: int
    num_bytes: int


@cache
def library() -> ctypes.CDLL:
    """Return NCCL: the library that torch has loaded."""
    everything = ctypes.CDLL(None)
    return everything if hasattr(everything, "ncclGetVersion") else ctypes.CDLL("libnccl.so.2")


def new_id() -> bytes:
    """Return the id of a new communicator, 128 bytes."""
    made = UniqueId()
    _succeed("ncclGetUniqueId", library().ncclGetUniqueId(ctypes.byref(made)))
    return bytes(made)


def begin_communicator(identifier: bytes, rank: int, size: int) -> ctypes.c_void_p:
    """Begin to create this rank's communicator on the current GPU; `error_of` says when it is
    there."""
    handle = ctypes.c_void_p()
    config = Config(ctypes.sizeof(Config), MAGIC, CONFIG_VERSION, 0)
    given = UniqueId.from_buffer_copy(identifier)
    code = library().ncclCommInitRankConfig(
        ctypes.byref(handle), ctypes.c_int(size), given, ctypes.c_int(rank), ctypes.byref(config)
    )
    _succeed("ncclCommInitRankConfig", code)
    return handle


def is_settled(handle: ctypes.c_void_p) -> bool:
    """Return whether no call of the communicator is being prepared. Raises NcclError for its
    error."""
    error = ctypes.c_int()
    _succeed("ncclCommGetAsyncError", library().ncclCommGetAsyncError(handle, ctypes.byref(error)))
    _succeed("NCCL", error.value)
    return error.value == SUCCESS


def exchange(
    handle: ctypes.c_void_p,
    sent: tuple[int, Memory] | None,
    received: tuple[int, Memory] | None,
    stream: int,
) -> None:
    """Enqueue a send to a rank and a receive from a rank, in one group."""
    nccl, target = library(), ctypes.c_void_p(stream)
    _succeed("ncclGroupStart", nccl.ncclGroupStart())
    for name, call in (("ncclSend", sent), ("ncclRecv", received)):
        if call is not None:
            peer, memory = call
            at, size = ctypes.c_void_p(memory.address), ctypes.c_size_t(memory.num_bytes)
            peer_rank = ctypes.c_int(peer)
            _succeed(name, getattr(nccl, name)(at, size, BYTE, peer_rank, handle, target))
    _succeed("ncclGroupEnd", nccl.ncclGroupEnd())


def abort(handle: ctypes.c_void_p) -> None:
    """End the communicator and all of its calls."""
    library().ncclCommAbort(handle)


def _succeed(name: str, code: int) -> None:
    if code not in (SUCCESS, IN_PROGRESS):
        describe = library().ncclGetErrorString
        describe.restype = ctypes.c_char_p
        raise NcclError(f"{name}: {describe(ctypes.c_int(code)).decode()} ({code})")
