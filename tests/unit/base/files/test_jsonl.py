"""Files of JSON lines: what a crash leaves, what is no line, and what JSON cannot hold."""

import asyncio
import json

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.base.files.json_lines import (
    append_lines,
    filter_lines,
    read_lines,
    to_strict_json,
    write_lines,
)
from megatron_r1.base.files.line_writer import LineWriter


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_a_torn_last_line_is_not_read_and_does_not_swallow_the_next(path):
    append_lines(path, [{"step": 1}, {"step": 2}])
    with open(path, "a") as file:
        file.write('{"step": 3')
    assert list(read_lines(path)) == [{"step": 1}, {"step": 2}]
    append_lines(path, [{"step": 3}])
    assert list(read_lines(path)) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_missing_file_has_no_lines(path):
    append_lines(path, [])
    assert list(read_lines(path)) == [] and filter_lines(path, bool) == 0
    assert not path.exists()


@pytest.mark.parametrize("line", ["{", "[1]", ""])
def test_any_other_line_that_is_no_object_is_refused_by_its_number(path, line):
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with refused("metrics.jsonl", Cause.MALFORMED, path, "line 2"):
        list(read_lines(path))
    with refused("metrics.jsonl", Cause.MALFORMED, path, "line 2"):
        filter_lines(path, bool)


def test_dropping_lines_rewrites_the_file_only_where_one_is_dropped(path):
    write_lines(path, [{"step": step} for step in range(5)])
    inode = path.stat().st_ino
    assert filter_lines(path, lambda record: True) == 0 and path.stat().st_ino == inode
    assert filter_lines(path, lambda record: record["step"] < 3) == 2
    assert [record["step"] for record in read_lines(path)] == [0, 1, 2]


def test_numbers_that_json_does_not_have_are_named(path):
    append_lines(path, [{"kl": float("nan"), "of": [1.5, float("-inf")]}])
    (record,) = read_lines(path)
    assert record == {
        "kl": None,
        "of": [1.5, None],
        "nonfinite": {"kl": "nan", "of[1]": "-inf"},
    }
    with pytest.raises(ValueError, match="a.b.*object"):
        to_strict_json({"a": {"b": object()}})


def test_half_an_emoji_is_written_as_a_question_mark(path):
    append_lines(path, [{"text": "a\ud83d"}])
    assert json.loads(path.read_bytes()) == {"text": "a?"}


def test_lines_added_in_the_background_are_there_after_closing(path):
    async def run():
        writer = LineWriter(path)
        for step in range(100):
            writer.add({"step": step})
            await asyncio.sleep(0)
        await writer.close()

    asyncio.run(run())
    assert [record["step"] for record in read_lines(path)] == list(range(100))
