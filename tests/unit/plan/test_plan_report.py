"""The printed estimate and its JSON file."""

import json
import re

import pytest
from planned_jobs import LAPTOP, RECIPE, ROOT, real_job

from megatron_r1.commands.plan import main
from megatron_r1.plan.estimate import JobEstimate


@pytest.mark.more
@pytest.mark.parametrize("recipe", ["r1_zero", "all_scenarios_rl", "cold_start_sft", "helpful_rm"])
def test_every_number_of_the_json_file_has_its_formula(tmp_path, recipe):
    file = tmp_path / "plan.json"
    assert main([str(RECIPE.parent / f"{recipe}.yaml"), "--json", str(file)]) == 0
    sections = json.loads(file.read_text())["sections"]
    bare = [name for rows in sections.values() for name, row in rows.items() if not row["formula"]]
    assert bare == []


@pytest.mark.parametrize(
    "recipe", [pytest.param("r1_zero", marks=pytest.mark.more), "cold_start_sampling"]
)
def test_a_bill_without_room_has_no_impossible_numbers(tmp_path, capsys, recipe):
    file = tmp_path / "plan.json"
    path = str(RECIPE.parent / f"{recipe}.yaml")
    assert main([path, "--memory-gib", "20", "--json", str(file)]) == 1
    output = capsys.readouterr().out
    words = output.split()
    assert not {"inf", "nan", "nan%"} & set(words)
    assert not [word for word in words if word.startswith("-") and word[1:2].isdigit()]
    plan = json.loads(file.read_text(), parse_constant=pytest.fail)
    for name in ("rollout", "step"):
        missing = plan["sections"]["time"][name]
        assert missing["value"] is None and missing["formula"]
    assert plan["sections"]["engine memory of a GPU"]["sequences at once"]["value"] == 0


@pytest.mark.more
@pytest.mark.parametrize(
    ("block", "options", "status"), [(0, [], 0), (1, ["--parallel.recompute", "none"], 1)]
)
def test_the_worked_example_of_the_docs_is_printed(capsys, block, options, status):
    """Each line in its order, up to the … that marks what is left out."""
    text = (ROOT / "docs/plan.md").read_text().partition("## Worked example")[2]
    shown = text.split("```")[2 * block + 1].splitlines()
    assert main([str(RECIPE), *options]) == status
    printed = iter(capsys.readouterr().out.splitlines())
    for line in shown:
        if line.endswith("…"):
            start = line[:-1].rstrip()
            assert any(each.startswith(start) for each in printed), line
        elif line:
            assert line in printed, line


def test_one_of_a_thing_is_not_named_in_the_plural(capsys):
    assert main(LAPTOP) == 0
    output = capsys.readouterr().out
    assert "1 engine of 1 GPU" in output and "V = 1 chunk, P = 1 stage" in output
    nouns = "GPUs|ranks|chunks|stages|layers|slots|tokens|samples|engines|micro-batches"
    assert not re.findall(rf"(?<![\d.,])1 (?:{nouns})\b", output)


def test_json_holds_every_number_with_its_formula(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main([str(RECIPE), "--json", str(file)]) == 0
    capsys.readouterr()
    plan = json.loads(file.read_text())
    total = plan["sections"]["parameters"]["total"]
    assert total["value"] == 671_026_419_200 and "weight table" in total["formula"]
    assert len(plan["ranks"]) == 16
    for section in plan["sections"].values():
        for name, quantity in section.items():
            assert quantity.keys() - {"low", "high"} == {"value", "unit", "formula"}, name
            assert ("low" in quantity) == ("high" in quantity), name
    step = plan["sections"]["time"]["step"]
    assert step["low"] < step["value"] < step["high"]
    phases = [rank[phase] for rank in plan["ranks"] for phase in ("training", "logprobs")]
    peak = JobEstimate(real_job(tokens_per_microbatch=9216)).peak_rank.peak_bytes
    assert max(sum(phase.values()) for phase in phases) == peak
