"""Bytes handed to a sandbox as an open file that has no name on the host."""

import fcntl
import os


class SealedFile:
    """An anonymous file in memory, sealed: neither side can change it. Close it after use."""

    def __init__(self, content: bytes) -> None:
        self.descriptor = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(self.descriptor, "wb", closefd=False) as file:
            file.write(content)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)

    def rewind(self) -> int:
        """The descriptor, to be read from the start: the position is shared with every reader."""
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        return self.descriptor

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> "SealedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
