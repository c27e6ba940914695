"""Questions from CSV, JSON, a folder of `datasets` and the hub, with columns of other names."""

import json

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.data.dataset_files import parse_name
from megatron_r1.data.prompts import load_prompts
from megatron_r1.data.rows import read_canonical_rows

ROWS = [{"q": f"{i} + 1?", "meta": {"truth": str(i + 1)}} for i in range(7)]
COLUMNS = {"question": "q", "truth": "meta.truth"}


def train(path, columns=COLUMNS):
    prompts = load_prompts(path=path, columns=columns, heldout_fraction=0.0).train
    return [(prompt.question, prompt.truth) for prompt in prompts]


EXPECTED = [(row["q"], row["meta"]["truth"]) for row in ROWS]


def test_csv_and_json_hold_questions(tmp_path):
    (tmp_path / "p.csv").write_text('\ufeffFrage,Lösung\n"1, dann + 1?",2\n"a\nb",3\n')
    columns = {"question": "Frage", "truth": "Lösung"}
    assert train(tmp_path / "p.csv", columns) == [("1, dann + 1?", "2"), ("a\nb", "3")]
    (tmp_path / "p.csv").write_text('Frage;Lösung\n"1, dann + 1?";2\n')
    assert train(tmp_path / "p.csv", columns) == [("1, dann + 1?", "2")]
    (tmp_path / "p.csv").write_text("1 + 1?,2\n1 + 2?,3\n")
    with refused("data.path", Cause.MALFORMED, "p.csv:1", 2):
        train(tmp_path / "p.csv", columns)
    for byte_order_mark in ("", "\ufeff"):
        (tmp_path / "p.json").write_text(byte_order_mark + json.dumps({"data": ROWS}))
        assert train(tmp_path / "p.json") == EXPECTED
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert train(tmp_path / "lines.json") == EXPECTED
    (tmp_path / "cut.json").write_text(json.dumps(ROWS)[:-9])
    with refused("data.path", Cause.MALFORMED, ".jsonl"):
        train(tmp_path / "cut.json")
    (tmp_path / "latin.csv").write_bytes("Lösung\n2".encode("latin-1"))
    with refused("data", Cause.MALFORMED, "UTF-8"):
        list(read_canonical_rows(tmp_path / "latin.csv"))


def test_a_row_of_csv_is_named_by_its_line(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('question,truth\n"a\nb",3\n\n1 + 1?,2\n1, then + 1?,2\n')
    with refused("data", Cause.MALFORMED, "p.csv:6"):
        list(read_canonical_rows(path))
    path.write_text('question,truth\n"a\nb",3\n\n1 + 1?,2\n')
    assert [place for place, _ in read_canonical_rows(path)] == [f"{path}:3", f"{path}:5"]


def test_a_column_of_mappings_and_a_chat_of_one_message(tmp_path):
    path = tmp_path / "verl.jsonl"
    chat = [{"role": "user", "content": "1 + 1?"}]
    row = {"prompt": chat, "reward_model": {"style": "rule", "ground_truth": "2"}}
    path.write_text(json.dumps(row))
    columns = {"question": "prompt", "truth": "reward_model.ground_truth"}
    assert train(path, columns) == [("1 + 1?", "2")]
    with refused("columns.truth", Cause.NOT_FOUND, "reward_model.truth"):
        train(path, columns | {"truth": "reward_model.truth"})
    assert train(path, None) == [("1 + 1?", "2")]


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("hub:openai/gsm8k", ("openai/gsm8k", None, None)),
        ("hub:openai/gsm8k:main", ("openai/gsm8k", "main", None)),
        ("hub:openai/gsm8k:test", ("openai/gsm8k", None, "test")),
        ("hub:openai/gsm8k:train[:100]", ("openai/gsm8k", None, "train[:100]")),
        ("hub:openai/gsm8k:main:train[:100]", ("openai/gsm8k", "main", "train[:100]")),
        ("hub:folder::dev", ("folder", None, "dev")),
        ("folder", ("folder", None, None)),
    ],
)
def test_the_parts_of_a_hub_name(path, parts):
    assert parse_name(path) == parts


@pytest.mark.more
def test_datasets_reads_folders(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="make test-packages")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    saved, folder = tmp_path / "saved", tmp_path / "folder"
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(saved / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(saved / "both")
    folder.mkdir()
    rows.to_parquet(folder / "train-0.parquet")
    rows.select([2]).to_parquet(folder / "test-0.parquet")
    for path in (saved / "one", saved / "both", folder):
        assert train(path) == EXPECTED
    assert train(f"hub:{saved}/both:test") == EXPECTED[1:2]
    assert train(f"hub:{folder}:test") == EXPECTED[2:3]
    assert train(f"hub:{folder}:train[:2]") == EXPECTED[:2]
    with refused("data.path", Cause.UNKNOWN, "train", "test"):
        train(f"hub:{saved}/both::dev")
    with refused("data.path", Cause.UNKNOWN, "train", "test"):
        train(f"hub:{folder}::dev")


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with refused("datasets", Cause.NOT_INSTALLED, tmp_path):
        train(tmp_path)
