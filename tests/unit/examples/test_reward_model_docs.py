"""What docs/reward_models.md shows is accepted as it stands."""

import re
from pathlib import Path

import yaml

from megatron_r1 import config as configuration
from megatron_r1.commands.reward_model import IMPLIED_SETTINGS, REQUIRED_KEYS
from megatron_r1.data.preferences import read_preferences

PAGE = (Path(__file__).parents[3] / "docs/reward_models.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def test_the_recipe_is_one(tmp_path):
    recipe, rewards = blocks("yaml")
    (tmp_path / "helpful.yaml").write_text(recipe)
    config = configuration.load_recipe(
        tmp_path / "helpful.yaml", IMPLIED_SETTINGS, required=REQUIRED_KEYS
    )
    assert config.reward_model.scored_part == "summary" and config.model.head == "score"
    assert "<|im_end|>" in config.reward_model.template
    settings = yaml.safe_load(rewards)["rewards"]
    settings["options"]["helpful"]["template"] = config.reward_model.template
    options = configuration.parse_recipe({"rewards": settings}).rewards.options
    assert options["helpful"]["shift"] == 3.0


def test_the_rows_are_rows_of_their_kinds(tmp_path):
    lines = next(b for b in blocks("") if b.startswith('{"question"')).splitlines()
    for kind, line in zip(("pairwise", "pointwise"), lines, strict=True):
        (tmp_path / "rows.jsonl").write_text(line)
        (row,) = read_preferences(tmp_path / "rows.jsonl", kind)
        assert row.question == "How do I boil an egg?" and row.labels[0] == 1.0


def test_the_keys_it_names_exist():
    known = configuration.known_keys()
    named = re.findall(r"`((?:reward_model|critic|eval|model)\.\w+)`", PAGE)
    assert len(named) > 5 and not [key for key in named if key not in known]
