"""The examples of README, docs/rewards.md and docs/rewards/terms.md, executed."""

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml
from r1_grading.rewards import GRADERS

from megatron_r1 import config as configuration
from megatron_r1.commands.cli import main

DOCS = Path(__file__).parents[2] / "docs"
TERMS = ("format", "logic", "language", "conciseness", "repetition")
CELL = re.compile(r"(?P<ticks>`+)(?P<text>.*)(?P=ticks)(?: ×(?P<times>\d+))?")


def section(name):
    text = (DOCS / "rewards/terms.md").read_text(encoding="utf-8")
    return re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def rows():
    for term in TERMS:
        for line in section(term).splitlines():
            if not line.startswith(("| `", "| ``")):
                continue
            response, settings, reward = (cell.strip() for cell in line.strip("|").split("|"))
            cell = CELL.fullmatch(response)
            text = cell["text"].strip() if len(cell["ticks"]) == 2 else cell["text"]
            text = text.replace("↵", "\n") * int(cell["times"] or 1)
            yield term, text, yaml.safe_load("{" + settings.strip("`") + "}"), float(reward)


@pytest.mark.parametrize(("term", "response", "settings", "reward"), list(rows()))
def test_every_row_of_the_tables_holds(term, response, settings, reward):
    module, _, function = GRADERS[term].partition(":")
    grade = getattr(importlib.import_module(module), function)(response, None, **settings)
    assert grade.reward == pytest.approx(reward, abs=0.005), grade.reason


def blocks(language):
    index = (DOCS / "rewards.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", index, re.MULTILINE | re.DOTALL)


@pytest.mark.more
def test_the_example_of_score_gives_the_output_it_shows(tmp_path):
    given, expected = blocks("jsonl")
    source, target = tmp_path / "answers.jsonl", tmp_path / "graded.jsonl"
    source.write_text(given, encoding="utf-8")
    assert main(["score", str(source), str(target)]) == 0
    found = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    for line, shown in zip(found, map(json.loads, expected.splitlines()), strict=True):
        assert line | {"reason": ""} == shown | {"reason": ""}


@pytest.fixture
def example(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(blocks("python")[0], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_reward_that_is_shown_works_as_it_stands(example):
    lines = [
        {"response": "<think>1. a\n2. b</think>\n1. add\n2. check", "truth": None},
        {"response": "1. add", "wanted": 1},
        {"response": "1. add", "wanted": 0},
    ]
    source, target = example / "in.jsonl", example / "out.jsonl"
    text = "".join(json.dumps({"kind": "my_rewards:steps"} | line) + "\n" for line in lines)
    source.write_text(text)
    assert main(["score", str(source), str(target)]) == 0
    graded = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["reward"] for line in graded] == [pytest.approx(2 / 3), 1.0, 0.0]
    assert "my_rewards.py:" in graded[2]["reason"]


def test_the_recipe_that_is_shown_loads(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(blocks("yaml")[0])
    assert "my_rewards:steps" in configuration.load_recipe(path).rewards.weights


def test_the_reward_of_readme_grades_and_its_line_is_a_section_of_a_recipe(tmp_path, monkeypatch):
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    (line,) = re.findall(r"`(rewards: \{.*?\})`", readme)
    (tmp_path / "my_rewards.py").write_text(code, encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(line)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "my_rewards:brief" in configuration.load_recipe(tmp_path / "recipe.yaml").rewards.weights
    graded = tmp_path / "graded.jsonl"
    row = {"kind": "my_rewards:brief", "response": "so it is 11"}
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps(row | {"num_tokens": count}) + "\n" for count in (4, 30, 60))
    )
    assert main(["score", str(tmp_path / "in.jsonl"), str(graded)]) == 0
    assert [json.loads(each)["reward"] for each in graded.read_text().splitlines()] == [1, 1, 0.5]
