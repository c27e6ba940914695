"""What is carried to a machine without a network, and what is checked there."""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tools.carry import __main__ as carry
from tools.carry.arrived import wrong_libraries, wrong_packages
from tools.carry.device_code import ELF, PTX, remove_other_programs


def container(*programs: tuple[int, int, bytes]) -> bytes:
    """A fatbin as `cuobjdump` lists those of CUDA 13: 16 bytes, and 64 before each program."""
    parts = [
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(code), 0, 0, 0, 0, of).ljust(64, b"h") + code
        for kind, of, code in programs
    ]
    body = b"".join(parts)
    return bytes.fromhex("50ed55ba01001000") + struct.pack("<Q", len(body)) + body


@pytest.mark.parametrize(
    ("kind", "of", "runs"),
    [
        (ELF, 90, True),  # also sm_90a
        (ELF, 89, False),
        (ELF, 100, False),
        (PTX, 80, True),  # the driver compiles it
        (PTX, 90, True),
        (PTX, 120, False),
        (8, 75, True),  # what is not known stays
    ],
)
def test_programs_for_other_gpus_are_taken_out(kind, of, runs):
    first, ours = (kind, of, b"code" * 8), (ELF, 90, b"ours")
    library = bytearray(b"before" + container(first, ours) + b"after")
    size, kept = len(library), container(first, ours) if runs else container(ours)
    remove_other_programs(library, 90)
    assert library == b"before" + kept + bytes(size - len(kept) - 11) + b"after"


def test_bytes_that_only_look_like_a_container_stay():
    library = container((ELF, 80, b"code"))[:-1]
    copy = bytearray(library)
    remove_other_programs(copy, 90)
    assert copy == library


def test_links_on_the_way_are_carried(tmp_path):
    real = Path(os.path.realpath(tmp_path))
    (real / "versions/1/bin").mkdir(parents=True)
    (real / "versions/1/bin/python").write_text("")
    (real / "current").symlink_to("versions/1")
    (real / "python").symlink_to(f"{real}/current/bin/../bin/python")
    assert carry.steps(f"{real}/versions/../python") == (
        f"{real}/python",
        f"{real}/current",
        f"{real}/versions/1/bin/python",
    )


def test_libraries_that_carried_ones_name_are_carried(tmp_path):
    for name, text in {
        "libcudnn.so.9": "libcudnn_engines.so.%d",
        "libcudnn_engines.so.9": "libnvrtc-builtins.so",
        "libnvrtc-builtins.so.13.0": "",
        "libcufft.so.12": "",
    }.items():
        (tmp_path / name).write_text(f"\0{text}\0")
    opened, *others = (f"{tmp_path}/{path.name}" for path in sorted(tmp_path.iterdir()))
    assert carry.named_libraries({opened}, others) == {
        f"{tmp_path}/libcudnn_engines.so.9",
        f"{tmp_path}/libnvrtc-builtins.so.13.0",
    }


def unpack(folder) -> str:
    command = ["sh", folder / "unpack.sh", folder / "root"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_a_damaged_piece_is_named_and_nothing_is_unpacked(tmp_path):
    shutil.copy(Path(carry.__file__).with_name("unpack.sh"), tmp_path)
    for name in ("piece.00", "piece.01"):
        (tmp_path / name).write_text(name)
    sums = subprocess.check_output(["sha256sum", "piece.00", "piece.01"], cwd=tmp_path)
    (tmp_path / "SHA256SUMS").write_bytes(sums)
    (tmp_path / "piece.01").write_text("piece.00")
    (tmp_path / "piece.00").unlink()
    errors = unpack(tmp_path)
    assert "piece.00: No such file" in errors and "a piece is missing or not what was" in errors
    assert not (tmp_path / "root").exists()


def test_packages_of_other_versions_than_the_locks_are_named():
    lock = "# of == 3.11\na-b==1.0\nc==2.0\n"
    assert wrong_packages(lock, {"a_b": "1.0", "C": "2.1", "not-in-it": "5"}) == [
        "C: 2.1, in the lock 2.0"
    ]


class MixedCudnn(dict):
    """cuDNN next to an attention library of another version: status 1004 of its function."""

    def __getitem__(self, name):
        return lambda: 1004 * (name == "cudnnAdvVersionCheck")

    def cudnnGetVersion(self):  # noqa: N802
        return 92000


def test_libraries_of_cudnn_of_two_versions_are_named():
    assert wrong_libraries(MixedCudnn()) == ["cuDNN's Adv library is not of version 92000"]
