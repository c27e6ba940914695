"""The printed bill, its JSON file and the documents that quote it."""

import json
import re

import pytest
from planned_jobs import LAPTOP, RECIPE, ROOT, real_job

from tools.plan.bill import Bill
from tools.plan.command import main


def test_the_documented_bill_is_the_one_that_is_printed(capsys):
    assert main([str(RECIPE)]) == 0
    document = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in document


def test_the_documented_time_of_every_stage_is_the_planned_one(capsys):
    text = (RECIPE.parent / "README.md").read_text(encoding="utf-8")
    stages = text.partition("## The stages")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in stages.splitlines() if line.startswith("| `")]
    units = {"hour": 3600, "minute": 60, "s a step": 1}
    compared = []
    for row in rows:
        if row[-1] == "not planned":
            continue
        unit = next(seconds for name, seconds in units.items() if name in row[-1])
        numbers = re.findall(r"[\d.]+(?=[ ,])", row[-1])
        steps = re.search(r"for ([\d,]+) steps", row[-1])
        for name, number in zip(re.findall(r"`(\w+)`", row[0]), numbers, strict=False):
            recipe = str(RECIPE.with_name(f"{name}.yaml"))
            assert main([recipe, "--gpus", row[-2].replace(",", "")]) == 0
            planned = printed_seconds(capsys.readouterr().out)
            planned *= int(steps[1].replace(",", "")) if steps else 1
            digits = len(number.partition(".")[2])
            assert round(planned / unit, digits) == float(number), name
            compared.append(name)
    assert len(compared) == 11


def printed_seconds(bill: str) -> float:
    """Of a run, or of a step where the recipe has no number of them."""
    units = {"hours": 3600, "minutes": 60, "s": 1}
    for pattern in (r"\nthe run of .*: ([\d,]+) (hours)", r"\n  (?:run|step) +([\d.,]+) (\w+)  "):
        if found := re.findall(pattern, bill):
            number, unit = found[-1]
            return float(number.replace(",", "")) * units[unit]
    raise AssertionError(bill)


@pytest.mark.parametrize("recipe", ["r1_zero", "all_scenarios_rl", "cold_start_sft", "helpful_rm"])
def test_every_number_of_the_json_file_has_its_formula(tmp_path, recipe):
    file = tmp_path / "plan.json"
    assert main([str(RECIPE.parent / f"{recipe}.yaml"), "--json", str(file)]) == 0
    sections = json.loads(file.read_text())["sections"]
    bare = [name for rows in sections.values() for name, row in rows.items() if not row["formula"]]
    assert bare == []


@pytest.mark.parametrize("recipe", ["r1_zero", "cold_start_sampling"])
def test_a_bill_without_room_has_no_impossible_numbers(tmp_path, capsys, recipe):
    file = tmp_path / "plan.json"
    path = str(RECIPE.parent / f"{recipe}.yaml")
    assert main([path, "--memory-gib", "20", "--json", str(file)]) == 1
    output = capsys.readouterr().out
    assert "GiB short" in output
    words = output.split()
    assert not {"inf", "nan", "nan%"} & set(words)
    assert not [word for word in words if word.startswith("-") and word[1:2].isdigit()]
    plan = json.loads(file.read_text(), parse_constant=pytest.fail)
    for name in ("rollout", "step"):
        missing = plan["sections"]["time"][name]
        assert missing["value"] is None and "no room for a sequence's cache" in missing["formula"]
    assert plan["sections"]["engine memory of a GPU"]["sequences at once"]["value"] == 0


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
            assert quantity.keys() == {"value", "unit", "formula"}, name
    phases = [rank[phase] for rank in plan["ranks"] for phase in ("training", "scoring")]
    assert max(sum(phase.values()) for phase in phases) == Bill(real_job()).worst.peak
