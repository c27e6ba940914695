"""Rows in the shapes of public data sets (`tests/shapes`): read, filtered, and through `init`, as
JSON lines, as Parquet with its padding, compressed, and from a hub."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import yaml
from chat_tokenizer import chat_tokenizer
from r1_grading import Grade
from r1_grading.code.problem import parse_problem
from r1_grading.truths import accepted_answers, math_truth
from refusals import refused
from safetensors.numpy import save_file
from small_qwen2 import MODEL

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause
from megatron_r1.commands import cli
from megatron_r1.commands.init import rl_trial
from megatron_r1.commands.init import verb as init
from megatron_r1.commands.parts.node_resources import NodeResources
from megatron_r1.commands.rl_prompts import check_and_read_prompts
from megatron_r1.data.prompts import load_prompts
from megatron_r1.data.rows import read_canonical_rows
from megatron_r1.data.sft import load_examples
from megatron_r1.data.sft_tokenizer import SFTTokenizer

FOLDER = Path(__file__).parents[2] / "shapes"
SHAPES = yaml.safe_load((FOLDER / "shapes.yaml").read_text(encoding="utf-8"))
QUESTIONS = {name: case for name, case in SHAPES.items() if "questions" in case}
EXAMPLES = {name: case for name, case in SHAPES.items() if "learned" in case}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with a chat tokenizer, whose weights are empty."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(folder)
    settings = MODEL | {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({}, folder / "model.safetensors")
    return folder


def read(path, **settings):
    return load_prompts(path=path, heldout_fraction=0.0, **settings)


def stated(prompt):
    """Return a truth as its reward reads it: the first answer, or the number of tests."""
    if prompt.kind == "code":
        return len(parse_problem(prompt.truth, prompt.fields.get("language")).tests)
    return math_truth(accepted_answers(prompt.truth)[0])


def check(split, case):
    prompts, (report,) = split.train, split.reports
    assert [stated(prompt) for prompt in prompts] == [
        math_truth(t) if isinstance(t, str) else t for t in case["truths"]
    ]
    assert len(prompts) == case["questions"]
    assert sorted({prompt.kind for prompt in prompts}) == sorted(case["kinds"])
    left_out = sum(rows.count for rows in report.left_out.values())
    expected = case.get("duplicates", 0), case.get("left_out", 0)
    assert (report.num_duplicates, left_out) == expected
    assert all(bool(prompt.messages_before) == case.get("system", False) for prompt in prompts)
    assert all(str(report.source) in prompt.location for prompt in prompts)


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_are_read_without_a_map_of_columns(name):
    check(read(FOLDER / name), QUESTIONS[name])


@pytest.mark.parametrize("name", [name for name, case in QUESTIONS.items() if "where" in case])
def test_rows_are_filtered_by_their_columns(name):
    where, count = QUESTIONS[name]["where"]
    assert len(read(FOLDER / name, where=where).train) == count


@pytest.mark.parametrize("name", QUESTIONS)
def test_parquet_is_read_as_the_text_is(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [row for _, row in read_canonical_rows(FOLDER / name)]
    path = tmp_path / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    check(read(path), QUESTIONS[name])


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_one_pass_of_the_template(model, name):
    text = SFTTokenizer(str(model), None)
    tokenizer = chat_tokenizer()
    examples = load_examples(FOLDER / name)
    assert len(examples) == len(SHAPES[name]["learned"])
    for example, learned in zip(examples, SHAPES[name]["learned"], strict=True):
        ids, is_learned = text.encode(example)
        whole = tokenizer.apply_chat_template(example.messages, tools=example.tools)
        assert ids == list(whole["input_ids"])
        own = [token for token, mark in zip(ids, is_learned, strict=True) if mark]
        assert tokenizer.decode(own) == learned


@pytest.mark.parametrize("name", SHAPES)
def test_init_writes_a_recipe_that_its_verb_accepts(model, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init, "detect_node_resources", lambda: NodeResources(0, 16 * 2**30))

    async def graded(truths):  # by a worker with sympy, which takes seconds
        return [Grade(1.0, "")] * len(truths)

    monkeypatch.setattr(rl_trial, "_grade_truths", graded)
    assert cli.main(["init", str(model), str(FOLDER / name), "--out", "mine.yaml"]) == 0
    recipe = configuration.load_recipe("mine.yaml")
    output = capsys.readouterr().out
    if name in EXAMPLES:
        assert recipe.sft.data == str(FOLDER / name)
        assert cli.main(["sft", "mine.yaml", "--dry-run"]) == 0
        learned = SHAPES[name]["learned"][0].partition("<|im_end|>")[0].splitlines()
        assert f"«{learned[0]}" in (output := capsys.readouterr().out)
        assert learned[-1] + "<|im_end|>»" in output
        return
    _, prompts = check_and_read_prompts(recipe)
    found = prompts.train + prompts.heldout
    assert sorted(map(str, map(stated, found))) == sorted(
        str(math_truth(t) if isinstance(t, str) else t) for t in SHAPES[name]["truths"]
    )
    assert f"{len(found)} question" in output and "<|im_start|>user\n" in output
    if SHAPES[name].get("system"):
        assert found[0].messages_before[0]["content"] in output


def test_files_as_other_programs_write_them(tmp_path):
    rows = [json.dumps({"question": f"{n} + 1?", "answer": n + 1}) for n in range(3)]
    expected = [1, 2, 3]
    for name, content in {
        "bom.jsonl": "\ufeff" + "\n".join(rows),
        "crlf.jsonl": "\r\n\r\n".join(rows) + "\r\n",
        "list.jsonl": f"[{','.join(rows)}]",
        "pretty.jsonl": "[\n" + ",\n".join(rows) + "\n]",
        "lines.json": "\n".join(rows),
        "under.json": json.dumps({"data": [json.loads(row) for row in rows]}),
        "rows.ndjson": "\n".join(rows),
        "upper.JSONL": "\n".join(rows),
        "index.json": json.dumps({str(n): json.loads(row) for n, row in enumerate(rows)}),
        "names.json": json.dumps({f"q{n}": json.loads(row) for n, row in enumerate(rows)}),
        "any.json": json.dumps({"version": 1, "items": [json.loads(row) for row in rows]}),
        "columns.json": json.dumps(
            {
                k: {n: json.loads(row)[k] for n, row in enumerate(rows)}
                for k in ("question", "answer")
            }
        ),
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        assert [prompt.truth for prompt in read(tmp_path / name).train] == expected, name
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress(content.encode()))
        assert [prompt.truth for prompt in read(packed).train] == expected, packed
    (tmp_path / "tabs.tsv").write_text("question\tanswer\n0 + 1?\t1\n1 + 1?\t2\n2 + 1?\t3\n")
    assert [prompt.truth for prompt in read(tmp_path / "tabs.tsv").train] == ["1", "2", "3"]
    (tmp_path / "bars.csv").write_text("question|answer\n0 + 1, 2?|1\n")
    assert [prompt.truth for prompt in read(tmp_path / "bars.csv").train] == ["1"]
    (tmp_path / "blank.csv").write_text("question,answer\n0 + 1?,1\n,\n1 + 1?,2\n")
    assert [prompt.truth for prompt in read(tmp_path / "blank.csv").train] == ["1", "2"]
    (tmp_path / "twice.csv").write_text("question,answer,answer\n0 + 1?,1,2\n")
    with refused("data.path", Cause.DUPLICATE, "twice.csv:1", "answer"):
        read(tmp_path / "twice.csv")
    parts = tmp_path / "parts"
    parts.mkdir()
    for number, row in enumerate(rows):
        (parts / f"part-{number}.jsonl").write_text(row)
    assert [prompt.truth for prompt in read(parts / "part-*.jsonl").train] == expected
    assert [prompt.truth for prompt in read(parts).train] == expected


def test_a_folder_of_splits_is_read_by_their_names(tmp_path):
    for name in ("main/train-00000-of-00002", "main/train-00001-of-00002", "main/test", "hard/dev"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"question": f"{name}?", "answer": "1"}))

    def names(source):
        return [prompt.question.partition(".")[0] for prompt in read(source).train]

    two = ["main/train-00000-of-00002?", "main/train-00001-of-00002?"]
    assert names(tmp_path) == two
    assert names(f"hub:{tmp_path}:main:train[:1]") == two[:1]
    assert names(f"hub:{tmp_path}:main:train[50%:]") == two[1:]
    assert names(f"hub:{tmp_path}:main:test") == ["main/test?"]
    assert names(f"hub:{tmp_path}:hard") == ["hard/dev?"]
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: own\n  data_files:\n  - split: cot\n"
        "    path: main/train-*.jsonl\n---\n"
    )
    assert names(f"hub:{tmp_path}:cot") == two and names(tmp_path) == two
    shutil.rmtree(tmp_path / "main")
