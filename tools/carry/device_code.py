"""The device code in a CUDA library: containers ("fatbins") with a program for each GPU."""

import re
import struct

# The format is not documented: a header before the programs, and one before each.
CONTAINER = struct.Struct("<8sQ")  # magic number, version and size of the header; bytes after it
PROGRAM = struct.Struct("<HHIQ12xI")  # kind, version, bytes of the header and after it, arch
MAGIC = bytes.fromhex("50ed55ba01001000")
PTX, ELF = 1, 2


def remove_other_programs(library: bytearray, arch: int) -> None:
    """Take out of each container what a GPU does not run; zeros fill the space after it.

    Args:
        library: the bytes of the file.
        arch: ten times the GPU's compute capability: 90."""
    for match in re.finditer(re.escape(MAGIC), bytes(library)):
        programs, begin = _programs(library, match.start()), match.end() + 8
        kept_programs = b"".join(library[at] for kind, of, at in programs if _runs(kind, of, arch))
        if programs:
            CONTAINER.pack_into(library, match.start(), MAGIC, len(kept_programs))
            library[begin : programs[-1][2].stop] = kept_programs.ljust(
                programs[-1][2].stop - begin, b"\0"
            )


def _runs(kind: int, of: int, arch: int) -> bool:
    """Whether a GPU runs a program: machine code of its own generation, PTX of any before, and
    what other kinds there are."""
    return kind not in (PTX, ELF) or (of <= arch and (kind == PTX or of // 10 == arch // 10))


def _programs(library: bytearray, start: int) -> list[tuple[int, int, slice]]:
    """Return kind, architecture and place of each program of a container; none of bytes that only
    look like the beginning of one."""
    begin, programs = start + CONTAINER.size, []
    end = begin + CONTAINER.unpack_from(library, start)[1]
    while begin < end <= len(library):
        kind, _, header_size, size, of = PROGRAM.unpack_from(library, begin)
        if header_size < PROGRAM.size:
            return []
        programs.append((kind, of, slice(begin, begin + header_size + size)))
        begin += header_size + size
    return programs if begin == end else []
