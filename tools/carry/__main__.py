"""Packs what the checks for GPUs need, for a machine with a GPU and without a network.

    .venv-cuda/bin/python -m tools.carry OUT [--arch 90] [PYTHON_ARGUMENTS]

The checks run on the null GPU, traced. Carried are the files that they open, the repository's and
Python's library. As a GPU has more compiled and loaded than the null GPU, each distribution of
which a file was opened comes whole but for its libraries, and of these come those that a carried
one names. Programs for other GPUs are taken out."""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from shlex import quote
from typing import IO

from tools.carry.device_code import remove_other_programs
from tools.opened_files import run_traced

ROOT = Path(__file__).resolve().parents[2]
CHECKS = ("tools/null_gpu", "tools/gpu_check")
LOADER = "/lib64/ld-linux-x86-64.so.2"  # which Linux opens for a program, without a call
SYSTEM = ("/usr/", "/lib", "/bin/", "/sbin/", "/etc/")
LIBRARY = re.compile(r"\.so[.\d]*$|\.a$")
STEM = re.compile(rb"lib[\w+-]+(?=\.so)")
MAX_PIECES, PIECE_BYTES = 20, 60_000_000


def carried_files(opened: Iterable[str]) -> set[str]:
    """Return the absolute names of all files to be carried, and of the links to them."""
    roots = (*SYSTEM, sys.prefix, sys.base_prefix)
    files = {LOADER, *(name for name in opened if name.startswith(roots))}
    real = {steps(name)[-1] for name in files}
    package_files: set[str] = set()
    for distribution in distributions(path=[sysconfig.get_path("purelib")]):
        own = {str(file.locate()) for file in distribution.files or ()}
        if any(".dist-info/" not in name for name in real & {steps(name)[-1] for name in own}):
            package_files |= own
    files |= {name for name in package_files if not LIBRARY.search(name)}
    files |= named_libraries(real, {name for name in package_files if LIBRARY.search(name)})
    links: set[str] = set()
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("include"), sys.prefix):
        for place, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if name != "site-packages"]
            inside = {f"{place}/{name}" for name in (*names, *folders)}
            links |= set(filter(os.path.islink, inside))
            files |= inside - links
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT)
    files |= {f"{ROOT}/{name}" for name in os.fsdecode(tracked).split("\0")}
    # Those of CUDA_HOME lead to all libraries of CUDA.
    return links | {step for name in files if os.path.isfile(name) for step in steps(name)}


def named_libraries(opened: Iterable[str], candidates: Iterable[str]) -> set[str]:
    """Return those of `candidates` whose names are in an opened library, as it links them or opens
    them by name, or in one of these."""
    by_stem = defaultdict(set)
    for name in candidates:
        by_stem[os.path.basename(name).partition(".so")[0]].add(name)
    carried: set[str] = set()
    unread = {name for name in opened if LIBRARY.search(name)}
    while unread:
        stems = set(map(os.fsdecode, STEM.findall(Path(unread.pop()).read_bytes())))
        new = set().union(*(by_stem[stem] for stem in stems & by_stem.keys())) - carried
        carried |= new
        unread |= {name for name in new if os.path.isfile(name)}
    return carried


@cache
def steps(name: str) -> tuple[str, ...]:
    """Return the links over which an absolute name leads, then the name without links."""
    if name == "/":
        return (name,)
    *links, folder = steps(os.path.dirname(name))
    place = os.path.normpath(os.path.join(folder, os.path.basename(name)))
    if not os.path.islink(place):
        return (*links, place)
    return (*links, place, *steps(os.path.join(folder, os.readlink(place))))


def write_tar(files: Iterable[str], stream: IO[bytes], arch: int) -> None:
    """Write files and links, without the programs for other GPUs, and close the stream."""
    with stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for name in files:
            entry = tar.gettarinfo(name)
            data = bytearray(Path(name).read_bytes() if entry.isreg() else b"")
            if data.startswith(b"\x7fELF"):
                remove_other_programs(data, arch)
            tar.addfile(entry, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools.carry", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--arch", type=int, default=90, help="ten times the compute capability")
    args, command = parser.parse_known_args()
    args.out.mkdir(parents=True)
    # Through a shell, which enter.sh needs.
    python = ["sh", "-c", 'exec "$0" "$@"', sys.executable]
    status, opened = run_traced([*python, *(command or CHECKS)])
    files = carried_files(opened)
    # The level is in XZ_OPT: -6 by default, -0 is ten times as fast.
    split = f"xz -T0 | split -d --bytes={PIECE_BYTES} - piece."
    with subprocess.Popen(split, shell=True, cwd=args.out, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        write_tar(sorted(files), process.stdin, args.arch)
    pieces = list(args.out.glob("piece.*"))
    for name in ("unpack.sh", "enter.sh"):
        shutil.copy(Path(__file__).with_name(name), args.out)
    (args.out / "paths").write_text(f"repository={quote(str(ROOT))}\nbin={quote(sys.prefix)}/bin\n")
    sums = subprocess.check_output(["sha256sum", *sorted(os.listdir(args.out))], cwd=args.out)
    (args.out / "SHA256SUMS").write_bytes(sums)
    print(f"the checks ended with status {status}; {len(files)} files in {len(pieces)} pieces")
    if len(pieces) > MAX_PIECES:
        sys.exit(f"more than {MAX_PIECES} pieces: name fewer checks by --only, or set XZ_OPT=-9")
    if status:
        sys.exit("files that the rest of the checks would have opened are not in the pieces")


if __name__ == "__main__":
    main()
