"""Mistakes of a first day: each is named before anything starts, with what to do."""

import json
import shutil
from pathlib import Path

import psutil
import pytest

from megatron_r1 import cli
from megatron_r1 import config as configuration
from megatron_r1.commands.rl_checks import naming_renamed_columns
from megatron_r1.commands.rl_questions import show_padded_truths
from megatron_r1.commands.training_run import run_training
from megatron_r1.config import RolloutConfig
from megatron_r1.data.prompts import load_prompts
from megatron_r1.engine.errors import EngineError
from megatron_r1.engine.temporary_files import temporary_logs
from megatron_r1.errors import UserError
from megatron_r1.evaluation.prompt_sets import load_prompt_sets
from megatron_r1.first_recipe.columns import guess_columns
from megatron_r1.fleet.placement import check_room
from megatron_r1.models.hf_config import hub_hint
from megatron_r1.rewards import resolve
from megatron_r1.rewards.base import Grade
from megatron_r1.rewards.combine import combine
from megatron_r1.rewards.terms import RewardUnusable

QUESTIONS = [{"question": f"{a} + 1", "truth": str(a + 1)} for a in range(40)]


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "file, what", [("curation.json", "a sampling"), ("identity.json", "an evaluation or a samplin")]
)
def test_the_folder_of_a_sampling_is_refused(tmp_path, file, what):
    (tmp_path / file).write_text("{}")
    config = configuration.from_overrides({"run.folder": str(tmp_path)})
    with pytest.raises(UserError, match=f"is that of {what}.*: give the training a folder of its"):
        run_training(config, "rl", ["model"], None)


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
        fail(UserError("no engine"))
    assert not failed.value.logs.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["rl", "r.yaml", "--dryrun"], "--dryrun needs a value; did you mean --dry-run?"),
        (["rl", "r.yaml", "--dryrun", "--rl.kl_beta", "0"], "did you mean --dry-run?"),
        (["rl", "r.yaml", "--rl.groupsize", "4"], "command line: unknown key rl.groupsize; did"),
        (["rl", "wrong.yaml", "--rl.kl_beta", "0"], "wrong.yaml: unknown key rl.groupsize"),
        (["eval", "r.yaml"], "eval.benchmarks must be set, such as [gym/arithmetic]; your own: [{"),
        (["init"], "MODEL_FOLDER is missing; usage: megatron-r1 init MODEL_FOLDER DATA"),
        (["init", "model"], "DATA is missing; usage: megatron-r1 init MODEL_FOLDER DATA"),
        (["init", "model", "--out", "x"], "DATA is missing; usage"),
    ],
)
def test_the_command_line_is_corrected(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("run: {folder: runs/x}\nmodel: {path: m}\n")
    Path("wrong.yaml").write_text("rl: {groupsize: 4}\n")
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_questions_are_checked(tmp_path):
    with pytest.raises(UserError, match="data.path is missing: give a file of questions"):
        load_prompts()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="the file is empty"):
        load_prompts(path=tmp_path / "empty.jsonl")
    rows = [{"question": "a", "truth": "1"}, {"question": "b", "truth": None}]
    with pytest.raises(UserError, match="^x.jsonl: row 2: 'truth' is None; give one, or remove"):
        guess_columns("x.jsonl", rows)
    rows = [{"question": q, "truth": t} for q, t in (("a", "1"), ("A ", "2"), ("b", "3"))]
    split = load_prompts(path=write(tmp_path / "q.jsonl", [*rows, rows[2]]), heldout_fraction=0.0)
    assert [(kept.truth, other.truth) for kept, other in split.contradictions] == [("1", "2")]


def test_truths_with_spaces_at_an_end_are_counted_for_a_reward_of_ones_own(tmp_path, capsys):
    rows = [{"question": q, "truth": t} for q, t in (("a", " lion "), ("b", "oak"), ("c", "elm "))]
    path = write(tmp_path / "odd.jsonl", rows)
    for kind in ("odd:one", "math"):
        show_padded_truths(path, load_prompts(path=path, kind=kind, heldout_fraction=0.0))
    said = capsys.readouterr().err
    assert f"{path}: 2 truths begin or end with a space, which odd:one gets with it: 'a'" in said
    assert said.count("\n") == 1 and said.endswith("has ' lion '\n")


def test_a_column_that_is_read_under_another_name_is_named():
    def lacking(*names):
        return RewardUnusable(
            f"question 'q': its odd:one answer cannot be graded: reward 'odd:one' "
            f"needs {', '.join(names)}: give it in the row, or for all rows as rewards.options",
            names,
        )

    columns = {"question": "words", "truth": "truth"}
    said = "'words' is read as question .data.columns.*parameter question$"
    with pytest.raises(UserError, match=said), naming_renamed_columns(columns):
        raise lacking("size", "words")
    for names, known in (("size", columns), ("words", None), ("truth", columns)):
        with pytest.raises(UserError) as unchanged, naming_renamed_columns(known):
            raise lacking(names)
        assert str(unchanged.value) == str(lacking(names))


@pytest.mark.parametrize("kind", ["sub.mine.unit", "sub/mine.py:unit"])
def test_the_form_of_an_own_reward_is_shown(kind):
    with pytest.raises(UserError, match="did you mean 'sub.mine:unit'"):
        resolve(kind)


def test_a_run_that_is_not_there_is_no_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "hf download runs/mine" in hub_hint("runs/mine")
    Path("runs").mkdir()
    assert hub_hint("runs/mine") == "; runs/ has no run or model of that name yet"


def test_a_cache_that_no_host_has_room_for_is_named():
    much = psutil.virtual_memory().total // 2**30 + 1
    with pytest.raises(UserError, match=f"rollout.kv_cache_gib={much}"):
        check_room(RolloutConfig(kv_cache_gib=much))


def test_own_questions_are_a_benchmark(tmp_path):
    def loaded(entry, **data):
        tree = {"eval": {"benchmarks": [entry], "samples": 2}, "data": data}
        return load_prompt_sets(configuration.parse(tree))[0]

    path = write(tmp_path / "q.jsonl", QUESTIONS)
    held_out = loaded("questions", path=path, heldout_fraction=0.3).prompts
    assert held_out == load_prompts(path=path, heldout_fraction=0.3).heldout
    assert held_out
    other = write(tmp_path / "o.jsonl", [{"ask": "1 + 1", "result": "2"}])
    columns = {"question": "ask", "truth": "result"}
    mine = loaded({"name": "questions", "path": other}, path=path, kind="a:b", columns=columns)
    assert [(p.question, p.kind, p.truth) for p in mine.prompts] == [("1 + 1", "a:b", "2")]
    assert mine.num_samples == 2
    with pytest.raises(UserError, match="data holds no questions out; give it a path"):
        loaded("questions", path=path, heldout_fraction=0.0)


def test_reasons_of_terms_without_a_weight_are_left_out():
    grades = {"accuracy": Grade(0.0, "wrong"), "format": Grade(0.0, "bad format")}
    assert combine(grades, {"accuracy": 1.0}).reason == "wrong"
    assert combine(grades).reason == "wrong; bad format"


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
TURNS = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": CHAT, "answer": "2"}, "a chat of one user message.*into data.template"),
        ({"messages": TURNS}, "'messages' has chats; a question is a text.*columns of their own"),
    ],
)
def test_a_chat_that_is_no_question_is_refused_with_what_to_write(row, message):
    with pytest.raises(UserError, match=message):
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
    "name, content, message",
    [
        ("a.tsv", "question\ttruth\n", "tabs are read in a .csv: rename it"),
        ("a.jsonl", '[{"question": "1 + 1", "truth": "2"}]', "a file that is one list is .json"),
        (
            "a.csv",
            "question,truth\nHow many, now?,2\n",
            "csv:2: .*put a field with a ',' in it bet",
        ),
        ("b.csv", "question,truth\n1 + 1,\n", "csv:2: 'truth' is ''; give one, or remove the row"),
    ],
)
def test_a_file_of_questions_that_is_not_read_says_what_to_change(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_prompts(path=tmp_path / name)


def test_an_empty_truth_has_the_name_of_its_column(tmp_path):
    (tmp_path / "own.csv").write_text("Problem,Answer\n1 + 1,\n")
    columns = {"question": "Problem", "truth": "Answer"}
    with pytest.raises(UserError, match="csv:2: 'Answer' is ''; give one"):
        load_prompts(path=tmp_path / "own.csv", columns=columns)


def test_an_option_that_a_command_lacks_is_named_with_those_it_has(capsys):
    assert cli.main(["init", "model", "data.csv", "--force"]) == 2
    assert "unknown option --force; init has --out, --question" in capsys.readouterr().err


def test_an_option_that_is_given_twice_is_named(capsys):
    assert cli.main(["chat", "run", "--question", "a", "--question=b"]) == 2
    assert "--question is given 2 times; give it once" in capsys.readouterr().err
