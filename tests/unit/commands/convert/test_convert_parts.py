"""How a conversion is divided."""

import pytest

from megatron_r1.commands.convert import conversion_parts
from megatron_r1.commands.convert.from_hf import FILE_BYTES, PlannedChunk, group_into_files


@pytest.mark.parametrize(
    ("shape", "multiple", "expected"),
    [
        ((7, 4), 1, [(0, 2), (2, 2), (4, 2), (6, 1)]),
        ((7, 4), 3, [(0, 3), (3, 3), (6, 1)]),
        ((20,), 1, [(0, 8), (8, 8), (16, 4)]),
        ((0, 4), 1, []),
    ],
)
def test_stripes_cover_a_tensor_and_end_with_it(monkeypatch, shape, multiple, expected):
    monkeypatch.setattr(conversion_parts, "STRIPE_ELEMENTS", 8)
    assert list(conversion_parts.row_stripes(shape, multiple)) == expected


def test_files_have_about_their_size_and_chunks_stay_in_order():
    half = FILE_BYTES // 2
    sizes = [half, half, 1, FILE_BYTES + 5, 3, 4]
    pieces = [PlannedChunk(None, (1,), (), size) for size in sizes]
    grouped = [[piece.num_bytes for piece in file] for file in group_into_files(pieces)]
    assert grouped == [[half, half], [1], [FILE_BYTES + 5], [3, 4]]
    assert group_into_files([]) == []
