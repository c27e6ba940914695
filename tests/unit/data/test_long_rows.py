"""Rows that are too long for memory, in every format of a file."""

import json
import tracemalloc

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.data import table_files
from megatron_r1.data.table_files import read_rows

LIMIT = 1 << 16


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    monkeypatch.setattr(table_files, "MAX_ROW_BYTES", LIMIT)


def rows(text):
    return [{"question": "short", "truth": "1"}, {"question": text, "truth": "2"}]


def write(path, text):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(text)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows(text)))
    elif path.suffix == ".csv":
        path.write_text("question,truth\n" + "".join(f"{r['question']},1\n" for r in rows(text)))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows(text)), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_row_beyond_the_limit_is_refused_and_named(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", "x" * (LIMIT - 200))
    assert len(list(read_rows(path))) == 2
    write(path, "x" * (LIMIT + 1))
    with refused("data", Cause.TOO_LARGE, path.name):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_line_that_does_not_end_is_not_read_to_its_end(tmp_path, name):
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b"question,truth\n" if path.suffix == ".csv" else b"")
        file.truncate(100 << 20)  # zeros, which take no room on disk
    tracemalloc.start()
    try:
        with refused("data", Cause.TOO_LARGE, path.name):
            list(read_rows(path))
        assert tracemalloc.get_traced_memory()[1] < 100 * LIMIT
    finally:
        tracemalloc.stop()


def test_a_json_file_too_large_to_be_read_whole_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "MAX_JSON_BYTES", 1000)
    with refused("data", Cause.TOO_LARGE, ".jsonl"):
        list(read_rows(write(tmp_path / "rows.json", "x" * 2000)))


def test_a_quote_that_is_not_closed_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,truth\n"open,1\n' + "more,1\n" * LIMIT)
    with refused("data", Cause.MALFORMED, path):
        list(read_rows(path))
