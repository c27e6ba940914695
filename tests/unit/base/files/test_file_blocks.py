"""Blocks of a file at equal distances, against slices of its content."""

from megatron_r1.base.files import file_blocks
from megatron_r1.base.files.file_blocks import sample_blocks


def test_blocks_go_from_the_first_to_the_last_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(file_blocks, "BLOCK_BYTES", 10)
    content = bytes(range(100))
    path = tmp_path / "weights"
    path.write_bytes(content)
    assert list(sample_blocks(path, 4)) == [content[at : at + 10] for at in (0, 30, 60, 90)]


def test_each_block_of_a_small_file_is_all_of_it(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"small")
    assert list(sample_blocks(path, 3)) == [b"small"] * 3
