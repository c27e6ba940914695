"""The questions of the pretrained model's demo, its chain of stages, and the demos' table."""

import json
import operator
from pathlib import Path

import pytest

from examples import demo_parts
from examples.smollm2 import questions
from megatron_r1.commands import cli
from megatron_r1.config import Config
from megatron_r1.evaluation.prompt_sets import load_prompt_sets

ROOT = Path(__file__).parents[3]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


@pytest.mark.parametrize(
    ("write", "num_heldout", "sign", "least", "result"),
    [
        (questions.write, 200, " + ", 0, operator.add),
        (questions.write_products, 100, " * ", 1000, operator.mul),
    ],
)
def test_held_out_questions_are_not_trained_on_and_every_truth_is_right(
    tmp_path, write, num_heldout, sign, least, result
):
    write(str(tmp_path))
    train, heldout = (rows(tmp_path / f"{name}.jsonl") for name in ("train", "heldout"))
    asked = [row["question"] for row in train + heldout]
    assert (len(train), len(heldout)) == (2000, num_heldout)
    assert len(set(asked)) == 2000 + num_heldout
    for row in train + heldout:
        a, b = map(int, row["question"].split(sign))
        assert least <= min(a, b) and max(a, b) < 10_000 and int(row["truth"]) == result(a, b)


def test_worked_examples_are_training_questions_and_half_of_them_wrong(tmp_path, monkeypatch):
    class Text:
        def __init__(self, model, template):
            assert (model, template) == ("folder", "chat")

        render = staticmethod(lambda question: f"<{question}>")

    monkeypatch.setattr(questions, "PromptTokenizer", Text)
    questions.write(str(tmp_path))
    questions.write_examples(str(tmp_path), "folder")
    train = {row["question"]: row["truth"] for row in rows(tmp_path / "train.jsonl")}
    examples = rows(tmp_path / "examples.jsonl")
    for row in examples:
        question = row["prompt"][1:-1]
        assert row["response"].startswith(f"{question} = ") and question in train
    is_correct = [row["response"].endswith(f" = {train[row['prompt'][1:-1]]}") for row in examples]
    assert sum(is_correct) / len(is_correct) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("write", [questions.write, questions.write_products])
def test_eval_reads_the_held_out_file(write, tmp_path):
    write(str(tmp_path))
    file = tmp_path / "heldout.jsonl"
    entry = {"name": "examples.smollm2.questions:SUMS", "path": str(file)}
    config = Config.model_validate({"eval": {"benchmarks": [entry]}})
    (found,) = load_prompt_sets(config)
    assert [(p.question, p.truth) for p in found.prompts] == [
        (row["question"], row["truth"]) for row in rows(file)
    ]


@pytest.mark.parametrize(
    ("recipe", "lines"),
    [
        ("chain", ("# student, after answers", "# rl, after sft, questions")),
        ("python_tool", ("# rl, after questions", "# alone_after, after rl, questions")),
    ],
)
def test_every_stage_is_what_its_verb_reads(recipe, lines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    folder = ["--pipeline.folder", str(tmp_path / "run"), "--pipeline.dry"]
    assert cli.main(["pipeline", f"examples/smollm2/{recipe}.yaml", *folder]) == 0
    shown = capsys.readouterr().out
    assert all(line in shown for line in lines), shown


def test_the_table_has_the_first_and_the_last_evaluation_with_intervals(tmp_path, capsys):
    def evaluation(value: float) -> dict[str, float]:
        found = {"eval/response_length": 9.04}
        for name, mean in (("pass@1", value), ("cons@8", value + 0.1)):
            ends = {f"interval/{name}/low": mean - 0.05, f"interval/{name}/high": mean + 0.05}
            found |= {f"eval/{name}": mean, **ends}
        return found

    lines = [json.dumps(evaluation(value)) for value in (0.3, 0.5, 0.7)]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(lines))
    demo_parts.show_result(tmp_path, "before", 90.0, intervals=True)
    table = capsys.readouterr().out
    assert "1.5" in table and "50.0%" not in table
    assert "30.0% (25.0%-35.0%)    70.0% (65.0%-75.0%)" in table
    assert "40.0% (35.0%-45.0%)    80.0% (75.0%-85.0%)" in table and "9.0" in table
    demo_parts.show_result(tmp_path, "base", 90.0)
    assert "30.0%    70.0%" in capsys.readouterr().out
