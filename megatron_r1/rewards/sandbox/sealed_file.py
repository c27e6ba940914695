"""Bytes passed to a sandbox as an open file that has no name on the host."""

import fcntl
import os


class SealedFile:
    """An anonymous file in memory (memfd), sealed so that no process can change it."""

    def __init__(self, content: bytes) -> None:
        self.fd = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(self.fd, "wb", closefd=False) as file:
            file.write(content)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)

    def rewind(self) -> int:
        """Return the descriptor, positioned at the start: all readers share its position."""
        os.lseek(self.fd, 0, os.SEEK_SET)
        return self.fd

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> "SealedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
