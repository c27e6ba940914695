"""Recipes that `init` writes: the columns that it guesses, what `rl` thinks of them, its errors."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from refusals import refused
from safetensors.numpy import save_file

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause
from megatron_r1.commands import cli, reward_model
from megatron_r1.commands.init import rl_draft
from megatron_r1.commands.init import verb as init
from megatron_r1.commands.init.recipe_draft import recipe_text
from megatron_r1.commands.parts.guessed_settings import (
    Guess,
    guess_layout,
    guess_lengths,
    tensor_parallel_size,
)
from megatron_r1.commands.parts.node_resources import NodeResources
from megatron_r1.commands.parts.trained_template import guess_template
from megatron_r1.data.columns import guess_columns
from megatron_r1.data.preference_tokenizer import PreferenceTokenizer
from megatron_r1.models import read_hf_config
from tests.harness.small_qwen2 import MODEL

LAPTOP = Path(__file__).parents[3] / "examples/laptop/model"
COLUMNS = yaml.safe_load(Path(__file__).with_name("columns.yaml").read_text(encoding="utf-8"))
SUMS = [(f"{a} + {b}", a + b) for a in range(2, 8) for b in range(3, 8)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, a CSV of sums with odd columns, and a node without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init, "detect_node_resources", lambda: NodeResources(0, 16 * 2**30))
    model = tmp_path / "model"
    shutil.copytree(LAPTOP, model)
    vocabulary = len(json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]) + 8
    settings = MODEL | {"vocab_size": vocabulary, "max_position_embeddings": 128}
    (model / "config.json").write_text(json.dumps(settings))
    save_file({}, model / "model.safetensors")
    with Path("my sums.csv").open("w", newline="") as file:
        rows = [(f"#{i}", question, truth) for i, (question, truth) in enumerate(SUMS)]
        csv.writer(file).writerows([("Ref.", "Math task", "The result"), *rows])
    return tmp_path


@pytest.mark.more
def test_the_recipe_loads_and_says_why(here, capsys):
    assert cli.main(["init", "model", "my sums.csv"]) == 0
    text = Path("my sums.yaml").read_text()
    recipe = configuration.load_recipe("my sums.yaml")
    assert recipe.data.columns == {"question": "Math task", "truth": "The result"}
    assert (recipe.data.kind, recipe.data.template) == ("math", "plain")
    assert (recipe.model.dtype, recipe.rollout.dtype) == ("float32", "float32")
    # 128 positions, of which the longest prompt takes some.
    assert 0 < recipe.rollout.max_response_tokens < 128 == recipe.rollout.max_model_len
    assert recipe.rewards.reading == "auto" and recipe.rewards.weights == {"accuracy": 1.0}
    output = capsys.readouterr().out
    comments = " ".join(text.replace("\n  # ", " ").split())
    assert "30 rows" in output and "30 rows" in comments
    assert "megatron-r1 rl 'my sums.yaml' --dry-run" in output and "'my sums.yaml'" in text
    assert "20 of 20 truths" in output


@pytest.mark.more
def test_rows_that_repeat_a_question_are_counted_and_said(here, capsys):
    rows = [{"question": q, "answer": a} for q, a in SUMS]
    repeated = [rows[0], rows[3] | {"question": f"  {rows[3]['question']} "}, rows[3]]
    lines = [json.dumps(row) for row in rows + repeated]
    Path("sums.jsonl").write_text("\n".join(lines) + "\n")
    assert cli.main(["init", "model", "sums.jsonl"]) == 0
    said = next(li for li in capsys.readouterr().out.splitlines() if li.startswith("data.path"))
    assert all(number in said for number in ("33 rows", "30 different", "3 that repeat"))


JUDGED = {
    "pairwise": [{"question": "Hi", "chosen": f"Hello {n}", "rejected": "No"} for n in range(3)],
    "pointwise": [{"prompt": "Hi", "completion": "Hello", "label": n > 0} for n in range(3)],
}


@pytest.mark.parametrize("kind", JUDGED)
def test_judged_responses_get_a_recipe_for_a_reward_model(here, capsys, kind):
    Path("judged.jsonl").write_text("\n".join(map(json.dumps, JUDGED[kind])))
    assert cli.main(["init", "model", "judged.jsonl"]) == 0
    recipe = configuration.load_recipe("judged.yaml", reward_model.IMPLIED_SETTINGS)
    settings = recipe.reward_model
    assert (settings.data, settings.kind) == ("judged.jsonl", kind)
    text = PreferenceTokenizer("model", settings.template, settings.scored_part, settings.max_chars)
    rows = reward_model.load_rows(recipe, text, read_hf_config("model", "score"))
    assert len(rows.train) + len(rows.heldout) == 3
    output = capsys.readouterr().out
    assert "megatron-r1 reward-model judged.yaml" in output and "--dry-run" not in output
    assert "3 rows" in output and "User: Hi" in output


def test_a_file_that_is_neither_is_named_with_what_it_has(here):
    Path("rows.jsonl").write_text(json.dumps({"question": "Hi", "chosen": "a", "best": "b"}))
    with refused("--truth", Cause.NOT_FOUND, "did you mean chosen? It has\n"):
        cli._dispatch_command(["init", "model", "rows.jsonl", "--truth", "chose"])


def test_a_chat_model_and_a_run_keep_their_own_template(here):
    def guessed(folder):
        return {guess.key: guess.value for guess in rl_draft._guess_answers(Path(folder), 10**10)}

    settings = Path("model/tokenizer_config.json")
    plain = json.loads(settings.read_text())
    settings.write_text(json.dumps(plain | {"chat_template": "{{ messages[0].content }}!"}))
    assert guessed("model")["data.template"] == "chat"
    Path("run").mkdir()
    Path("model").rename("run/hf")
    Path("run/hf/tokenizer_config.json").write_text(json.dumps(plain))
    weights = {"accuracy": 1.0, "format": {"weight": 0.5, "from_step": 3, "to_step": None}}
    trained = {"data": {"template": "Q: {question}"}, "rewards": {"reading": "boxed"}}
    trained["rewards"]["weights"] = weights
    Path("run/config.yaml").write_text(json.dumps(trained))
    expected = {"data.template": "Q: {question}", "rewards.reading": "boxed"}
    assert guessed("run/hf") == expected | {"rewards.weights": weights}
    Path("run/config.yaml").write_text(json.dumps({"sft": {"data": "sft.jsonl"}}))
    prompts = [{"prompt": f"Pupil: {q}\nTeacher: ", "response": "x"} for q, _ in SUMS]
    Path("sft.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    template = guessed("run/hf")["data.template"]
    assert template == "Pupil: {question}\nTeacher: "
    text = recipe_text(["title"], [Guess("data.template", template, "reason")])
    assert text == '# title\ndata:\n  # reason\n  template: "Pupil: {question}\\nTeacher: "\n'


def test_a_small_model_is_said_to_need_worked_examples(here):
    def reason(parameters):
        guesses = rl_draft._guess_answers(Path("model"), parameters)
        return next(guess.reason for guess in guesses if guess.key == "data.template")

    assert "{question}" in reason(135_000_000)
    assert "{question}" not in reason(7_000_000_000)


@pytest.mark.more
def test_the_reward_of_the_run_that_made_the_model_is_taken_over(here):
    Path("run").mkdir()
    Path("model").rename("run/hf")
    Path("mine.py").write_text(
        "from r1_grading import Grade\n"
        "def unit(response, truth, **entry):\n"
        "    return Grade(1.0, 'fine')\n"
    )
    data = {"kind": "mine:unit", "template": "Q: {question}"}
    Path("run/config.yaml").write_text(json.dumps({"data": data}))
    assert cli.main(["init", "run", "my sums.csv", "--out", "again.yaml"]) == 0
    assert configuration.load_recipe("again.yaml").data.kind == "mine:unit"
    assert cli.main(["init", "run", "my sums.csv", "--out", "other.yaml", "--kind", "math"]) == 0
    assert configuration.load_recipe("other.yaml").data.kind == "math"


@pytest.mark.parametrize("case", COLUMNS, ids=lambda case: " ".join(case["row"]))
def test_columns_are_guessed_by_name_and_content(case):
    found = guess_columns("data", [case["row"], dict(case["row"])])
    assert [found.question, found.truth, found.kind] == case["columns"]


def test_a_column_that_numbers_the_rows_is_neither():
    rows = [{"n": i, "x": f"{i} + 1 = ?", "y": i + 1.5} for i in range(1, 5)]
    found = guess_columns("data", rows)
    assert (found.question, found.truth) == ("x", "y")


def test_columns_that_cannot_be_told_apart_are_listed():
    row = {"a": "1 + 1", "b": "2", "c": "x"}
    with refused("--question", Cause.MISSING, "a: 1 + 1\n", "b: 2"):
        guess_columns("data", [row])
    with refused("--truth", Cause.MISSING, "'a'"):
        guess_columns("data", [row], question="a")
    assert guess_columns("data", [row], question="a", truth="c").truth == "c"


@pytest.mark.parametrize("blank", [None, "", float("nan")])
def test_a_row_without_a_truth_is_no_obstacle(blank):
    rows = [{"question": "1 + 1?", "answer": "2"}, {"question": "1 + 2?", "answer": blank}]
    assert guess_columns("data", rows).truth == "answer"  # the row is left out when it is read
    with refused("--question", Cause.EMPTY, "data: row 1"):
        guess_columns("data", [{"question": "", "answer": "2"}])


def test_sizes_follow_the_node():
    hf_config = MODEL | {"num_attention_heads": 32, "num_key_value_heads": 8}
    eight = NodeResources(8, 80 * 10**9)
    assert (
        tensor_parallel_size(hf_config, 7 * 10**9, eight) == 2
    )  # (6 / 2 + 12 / 8) x 7e9 = 31.5 GB of 48
    assert tensor_parallel_size(hf_config, 32 * 10**9, eight) == 8
    values = {guess.key: guess.value for guess in guess_layout(hf_config, 10**9, eight)}
    assert values["parallel.processes"] == values["rollout.engines"] == 8
    assert "parallel.tensor" not in values
    large = {guess.key: guess.value for guess in guess_layout(hf_config, 7 * 10**9, eight)}
    # A tenth for contexts; (2 + 2) B / 2 for weights and receive buffer, 12 B / 8 of optimizer.
    assert large["rollout.gpu_memory"] == 0.55  # 0.9 - 3.5 x 7e9 / 80e9 = 0.594, in steps of 0.05
    response, total = guess_lengths(100, 131_072, eight)
    assert (response.value, total.value) == (4096, 4224)
    response, total = guess_lengths(500, 512, NodeResources(0, 0))
    assert (response.value, total.value) == (32, 512)


def test_a_template_is_found_in_supervised_prompts():
    assert guess_template([f"User: A {i} =\nAssistant: " for i in "12"]) == (
        "User: {question}\nAssistant: "
    )
    assert guess_template(["User: x\nAssistant:", "User: y\nAssistant:"]) == "plain"
    assert guess_template(["x", "y"]) is None
