"""Mistakes of a first day: each is named before anything starts, with what to do."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from r1_grading import Grade
from r1_grading.rewards import resolve_reward
from r1_grading.terms import RewardUnusable, combine
from refusals import refused

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.commands.parts.training_run import training_run
from megatron_r1.commands.rl_prompts import explain_renamed_columns, show_padded_truths
from megatron_r1.data.columns import guess_columns
from megatron_r1.data.prompts import load_prompts
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.server import temporary_logs
from megatron_r1.evaluation.prompt_sets import load_prompt_sets
from megatron_r1.models.hf_config_file import hub_hint

QUESTIONS = [{"question": f"{a} + 1", "truth": str(a + 1)} for a in range(40)]


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("file", ["sample.json", "curation.json", "identity.json"])
def test_the_folder_of_a_sampling_is_refused(tmp_path, file):
    (tmp_path / file).write_text("{}")
    config = configuration.from_overrides({"run.folder": str(tmp_path)})

    async def start():
        async with training_run(config, "rl", ["model"]):
            raise AssertionError("it has started")

    with refused("run.folder", Cause.EXISTS, tmp_path):
        asyncio.run(start())


def test_the_log_of_an_engine_that_failed_stays():
    def fail(error):
        with temporary_logs() as logs:
            (logs / "engine_0.log").write_text("why")
            error.logs = logs
            raise error

    with pytest.raises(EngineError) as failed:
        fail(EngineError("from its log"))
    assert (failed.value.logs / "engine_0.log").read_text() == "why"
    shutil.rmtree(failed.value.logs)
    with pytest.raises(UserError) as failed:
        fail(UserError("no engine", key="rollout", cause=Cause.FAILED))
    assert not failed.value.logs.exists()


def test_questions_are_checked(tmp_path):
    with refused("data.path", Cause.MISSING):
        load_prompts()
    (tmp_path / "empty.jsonl").touch()
    with refused("data.path", Cause.EMPTY, "empty.jsonl"):
        load_prompts(path=tmp_path / "empty.jsonl")
    rows = [{"question": q, "truth": t} for q, t in (("a", "1"), ("a ", "2"), ("b", "3"))]
    split = load_prompts(path=write(tmp_path / "q.jsonl", [*rows, rows[2]]), heldout_fraction=0.0)
    assert [(kept.truth, other.truth) for kept, other in split.contradictions] == [("1", "2")]


def test_truths_with_spaces_at_an_end_are_counted_for_a_reward_of_ones_own(tmp_path, capsys):
    rows = [{"question": q, "truth": t} for q, t in (("a", " lion "), ("b", "oak"), ("c", "elm "))]
    path = write(tmp_path / "odd.jsonl", rows)
    for kind in ("odd:one", "math"):
        show_padded_truths(path, load_prompts(path=path, kind=kind, heldout_fraction=0.0))
    said = capsys.readouterr().err
    assert all(word in said for word in (f"{path}: 2 truths", "odd:one", "'a'", "' lion '"))
    assert said.count("\n") == 1


def test_a_column_that_is_read_under_another_name_is_named():
    def lacking(*names):
        return RewardUnusable(
            f"question 'q': its odd:one answer cannot be graded: reward 'odd:one' "
            f"needs {', '.join(names)}: give it in the row, or for all rows as rewards.options",
            names,
        )

    columns = {"question": "words", "truth": "truth"}
    shown = "data.columns.question", Cause.CONFLICT, "'words'"
    with refused(*shown), explain_renamed_columns(columns):
        raise lacking("size", "words")
    for names, known in (("size", columns), ("words", None), ("truth", columns)):
        with pytest.raises(UserError) as unchanged, explain_renamed_columns(known):
            raise lacking(names)
        assert str(unchanged.value) == str(lacking(names))


@pytest.mark.parametrize("kind", ["sub.mine.unit", "sub/mine.py:unit"])
def test_the_form_of_an_own_reward_is_shown(kind):
    with refused("kind", Cause.UNKNOWN, kind, "'sub.mine:unit'"):
        resolve_reward(kind)


def test_a_run_that_is_not_there_is_no_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "hf download runs/mine" in hub_hint("runs/mine")
    Path("runs").mkdir()
    assert "hf download" not in hub_hint("runs/mine")


def test_own_questions_are_a_benchmark(tmp_path):
    def loaded(entry, **data):
        tree = {"eval": {"benchmarks": [entry], "samples": 2}, "data": data}
        return load_prompt_sets(configuration.parse_recipe(tree))[0]

    path = write(tmp_path / "q.jsonl", QUESTIONS)
    held_out = loaded("questions", path=path, heldout_fraction=0.3).prompts
    assert held_out == load_prompts(path=path, heldout_fraction=0.3).heldout
    assert held_out
    other = write(tmp_path / "o.jsonl", [{"ask": "1 + 1", "result": "2"}])
    columns = {"question": "ask", "truth": "result"}
    mine = loaded({"name": "questions", "path": other}, path=path, kind="a:b", columns=columns)
    assert [(p.question, p.kind, p.truth) for p in mine.prompts] == [("1 + 1", "a:b", "2")]
    assert mine.num_samples == 2
    with refused("path", Cause.MISSING, "questions"):
        loaded("questions", path=path, heldout_fraction=0.0)


def test_reasons_of_terms_without_a_weight_are_left_out():
    grades = {"accuracy": Grade(0.0, "wrong"), "format": Grade(0.0, "bad format")}
    assert combine(grades, {"accuracy": 1.0}).reason == "wrong"
    assert combine(grades).reason == "wrong; bad format"


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
TURNS = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    "row, cause",
    [
        ({"prompt": [*CHAT, TURNS[1]], "answer": "2"}, Cause.EMPTY),
        ({"dialog": TURNS}, Cause.UNSUPPORTED),
    ],
)
def test_a_chat_that_is_no_question_is_refused(row, cause):
    with refused("--question", cause, repr(next(iter(row)))):
        guess_columns("chats.jsonl", [row])


def test_columns_within_columns_are_found_at_any_depth():
    rows = [
        {"data": {"question": {"text": f"{n} + 1 = ?"}, "answer": {"value": n}}} for n in (5, 9)
    ]
    found = guess_columns("deep.jsonl", rows)
    assert (found.question, found.truth) == ("data.question.text", "data.answer.value")
    row = {"question": "Add.", "truth": {"tests": [{"stdin": "1", "stdout": "2"}]}}
    assert guess_columns("code.jsonl", [row]).truth == "truth"


@pytest.mark.parametrize(
    "name, content, key, cause",
    [
        ("a.txt", "question\ttruth\n", "data.path", Cause.UNSUPPORTED),
        ("a.jsonl", '[{"question": "1 + 1", "truth": "2"}', "data.path", Cause.MALFORMED),
        ("a.csv", "question,truth\nHow many, now?,2\n", "data.path", Cause.MALFORMED),
        ("b.csv", "question,truth\n1 + 1,\n", "truth", Cause.EMPTY),
    ],
)
def test_a_file_of_questions_that_cannot_be_read_is_refused(tmp_path, name, content, key, cause):
    (tmp_path / name).write_text(content)
    with refused(key, cause, tmp_path / name):
        load_prompts(path=tmp_path / name)


def test_an_empty_truth_has_the_name_of_its_column(tmp_path):
    (tmp_path / "own.csv").write_text("Problem,Answer\n1 + 1,\n")
    columns = {"question": "Problem", "truth": "Answer"}
    with refused("Answer", Cause.EMPTY, "csv:2"):
        load_prompts(path=tmp_path / "own.csv", columns=columns)
