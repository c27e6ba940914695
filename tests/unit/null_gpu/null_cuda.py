"""CUDA and NCCL of the null GPU through ctypes, for the programs that the tests run."""

import ctypes
import os
import threading
from collections.abc import Sequence

library = ctypes.CDLL(os.environ["NULL_GPU_LIBRARY"], mode=ctypes.RTLD_GLOBAL)
HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
OUT_OF_MEMORY, NOT_READY = 2, 600
NON_BLOCKING = 1
DEFAULT = 0
FLOAT, BYTE, SUM = 7, 1, 0
INVALID_USAGE, REMOTE_ERROR, IN_PROGRESS = 5, 6, 7


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


def call(name: str, *arguments) -> int:
    """Call a function of CUDA or NCCL; return its error."""
    return getattr(library, name)(
        *(ctypes.c_ssize_t(a) if isinstance(a, int) else a for a in arguments)
    )


def done(name: str, *arguments) -> None:
    """Call one that has to succeed."""
    if error := call(name, *arguments):
        raise RuntimeError(f"{name}: {error}")


def made(name: str, *arguments) -> int:
    """Call one that writes a handle or an address to its first argument; return that."""
    handle = ctypes.c_size_t()
    done(name, ctypes.byref(handle), *arguments)
    return handle.value


def device_memory(content: bytes) -> int:
    address = made("cudaMalloc", len(content))
    done("cudaMemcpy", address, content, len(content), 4)
    return address


def pinned(content: bytes) -> int:
    address = made("cudaHostAlloc", len(content), 0)
    ctypes.memmove(address, content, len(content))
    return address


def content(address: int, size: int) -> bytes:
    """Return what is there at once, without waiting for any stream."""
    return ctypes.string_at(address, size)


def stream(flags: int = 0) -> int:
    return made("cudaStreamCreateWithFlags", flags)


def is_ready(of: int) -> bool:
    return call("cudaStreamQuery", of) == 0


def copy(to: int, source: int, size: int, on: int) -> None:
    done("cudaMemcpyAsync", to, source, size, 4, on)


def fill(address: int, value: int, size: int, on: int) -> None:
    done("cudaMemsetAsync", address, value, size, on)


class Gate:
    """Holds a stream up, by a function of the host in it, until it is opened."""

    def __init__(self, on: int) -> None:
        self.is_reached, self._is_open = threading.Event(), threading.Event()
        self._function = HostFunction(self._wait)
        done("cudaLaunchHostFunc", on, self._function, None)

    def _wait(self, argument: object) -> None:
        self.is_reached.set()
        self._is_open.wait()

    def open(self) -> None:
        self._is_open.set()


def in_background(function, *arguments) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def communicator(name: str, size: int, rank: int) -> int:
    """Join the communicator of this name, on the GPU of this thread."""
    return made("ncclCommInitRank", size, UniqueId(name.encode()), rank)


def send(address: int, size: int, peer: int, comm: int, on: int) -> None:
    done("ncclSend", address, size, BYTE, peer, comm, on)


def receive(address: int, size: int, peer: int, comm: int, on: int) -> None:
    done("ncclRecv", address, size, BYTE, peer, comm, on)


def asynchronous_error(comm: int) -> int:
    error = ctypes.c_int()
    done("ncclCommGetAsyncError", comm, ctypes.byref(error))
    return error.value


def floats(values: Sequence[float]) -> bytes:
    return bytes((ctypes.c_float * len(values))(*values))


def as_floats(address: int, number: int) -> list[float]:
    return list((ctypes.c_float * number).from_address(address))
