"""tools/bench step: its figures worked out by hand, its lengths, what both systems are given."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1.config import load_recipe, parse_recipe
from tools.bench.step import cases, figures, page, pretrained, runs, systems, work
from tools.bench.step.cases import SETTINGS, WORKS
from tools.bench.step.work import Tail, write_model


def step(seconds: float, tokens: int, **phases: float) -> dict:
    return {"seconds": seconds, "core_seconds": 2 * seconds, "response_tokens": tokens, **phases}


def test_tokens_per_second_are_medians_of_steps_and_the_ratio_is_ours_over_theirs():
    compared = figures.compare_systems(
        ours=[step(1, 100), step(2, 100), step(1, 300)],
        trl=[step(10, 100), step(10, 300), step(10, 500)],
        slower=[step(10, 100)],
    )
    assert compared["ours"]["tokens_per_second"] == 100
    assert compared["trl"]["tokens_per_second"] == 30
    assert compared["ratio"] == pytest.approx(100 / 30)
    assert compared["ours"]["seconds"] == 1 and compared["ours"]["core_seconds"] == 2


def test_the_summary_has_both_ratios():
    both = figures.compare_systems(ours=[step(1, 600)], trl=[step(4, 400)])
    both["trl"]["core_seconds"] = 2.0
    text = page.summary("Some CPU", {"short": both})
    assert "Some CPU" in text and "6.00 x" in text and "1.50 x" in text


def test_the_summary_has_the_ratio_of_each_round():
    seconds = {"ours": (1.0, 2.0), "trl": (4.0, 4.0), "trl, 2 processes": (5.0, 3.0)}
    runs = {
        ("short", system): [{"steps": [step(each, 100)]} for each in rounds]
        for system, rounds in seconds.items()
    }
    compared = figures.compare_runs(runs, "short")
    assert compared["ratios"] == pytest.approx([4.0, 1.5])
    assert "(1.50 to 4.00 in 2 rounds)" in page.summary("Some CPU", {"short": compared})
    assert page.table({"short": compared}, None)


def test_an_overlapped_step_is_compared_with_the_slower_of_its_parts():
    phases = {"time/rollout": 2.0, "time/reward": 0.1, "time/train": 1.0, "time/push": 0.3}
    overlap = figures.overlap_ratio([step(3.5, 1, **phases)], [step(2.31, 1)])
    assert (overlap["rollout"], overlap["training"]) == (2.1, 1.3)
    assert overlap["ratio"] == pytest.approx(1.1)
    slower = phases | {"time/train": 4.0}
    assert figures.overlap_ratio([step(6.5, 1, **slower)], [step(4.3, 1)])["ratio"] == 1.0


def test_the_page_shows_the_figures_it_was_given():
    both = figures.compare_systems(ours=[step(1, 500)], trl=[step(4, 400)])
    phases = {"time/rollout": 2.0, "time/reward": 0.0, "time/train": 1.0, "time/push": 0.0}
    result = {
        "packages": {"trl": "1.2.3"},
        "processor": "Some CPU",
        "load": (0.25, 1.0),
        "cores are worth": (1.125, 1.875),
        "work": {name: vars(work) for name, work in WORKS.items()},
        "repeats": 3,
        "gib": {"short, ours": 1.25},
        "comparisons": {"short": both},
        "overlap": figures.overlap_ratio([step(3, 1, **phases)], [step(2.2, 1)]),
    }
    text = page.as_page(result, cores=3)
    for shown in (
        "trl 1.2.3",
        "Some CPU",
        "3 cores",
        "0.2 to 1.0",
        "1.1 to 1.9",
        "5.00",
        "2.20 s = 1.10 x",
        "at 256 tokens",
        "ran 3 times",
        "short, ours 1.2",
    ):
        assert shown in text


def test_a_comparison_that_was_stopped_continues_with_the_runs_that_are_missing(
    tmp_path, monkeypatch
):
    asked: list[tuple[str, int]] = []

    def run(system, seconds, stop_at):
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        asked.append((system, stop_at))
        return [step(seconds, 100)]

    def measured(stop_at, about):
        asked.clear()
        monkeypatch.setattr(cases, "run_ours", lambda *_: run("ours", 1, stop_at))
        monkeypatch.setattr(cases, "run_trl", lambda *given: run(f"trl {given[-1]}", 2, stop_at))
        chosen = Namespace(
            runs=tmp_path / "runs", cases=["short"], repeats=2, steps=1, peer_python=""
        )
        finished = runs.measure(chosen, about)
        return [system for system, _ in asked], figures.steps_of(finished)

    monkeypatch.setattr(runs.host, "cores_worth", lambda: 1.0)
    first, steps = measured(4, {"cpu": "a"})
    assert first == ["ours", "trl 1", "trl 2", "ours"]
    assert [len(steps["short"][name]) for name in ("ours", *systems.PEERS)] == [2, 1, 1]
    second, steps = measured(9, {"cpu": "a"})
    assert second == ["trl 1", "trl 2"]
    assert [len(steps["short"][name]) for name in ("ours", *systems.PEERS)] == [2, 2, 2]
    assert figures.compare_systems(**steps["short"])["ratio"] == 2.0
    with pytest.raises(SystemExit, match="--runs"):
        measured(9, {"cpu": "b"})


def test_every_recipe_of_ours_is_one_the_command_takes(tmp_path):
    for name, more in SETTINGS.items():
        made = systems.recipe(WORKS["short"], tmp_path, tmp_path / "q", tmp_path / "run", 3, more)
        config = parse_recipe(made, name)
        assert config.rollout.max_response_tokens == 32
        assert config.rl.staleness == (1 if name == "overlapped" else 0)
        assert config.rl.prompts_per_rollout * config.rl.group_size == WORKS["short"].num_responses


def test_the_work_travels_to_the_other_process_whole():
    given = replace(WORKS["long tail"], kl_beta=0.5)
    assert work.StepWork(**json.loads(json.dumps(vars(given)))) == given


def test_rewards_differ_and_questions_are_the_same_every_time(tmp_path):
    assert {work.reward(text) for text in ("", "a", "ab")} == {0.0, 1.0}
    first, again = (work.write_questions(tmp_path / name, 8).read_text() for name in "ab")
    assert first == again
    assert len({len(json.loads(line)["question"]) for line in first.splitlines()}) > 1


def test_both_systems_get_the_pretrained_models_prompts_as_its_recipe_writes_them(tmp_path):
    recipe = load_recipe(pretrained.PRETRAINED_RECIPE)
    first = json.loads(
        pretrained.write_prompts(tmp_path, recipe.data.template).read_text().splitlines()[0]
    )
    question = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["question"]
    assert first["question"].endswith(f"user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    assert pretrained.pretrained_work(recipe).num_responses == (
        recipe.rl.prompts_per_rollout * recipe.rl.group_size
    )
    more = pretrained.speed_settings_of(recipe)
    made = parse_recipe(
        systems.recipe(pretrained.pretrained_work(recipe), tmp_path, tmp_path, tmp_path, 3, more),
        "",
    )
    assert made.parallel.share_prompts
    assert made.rollout.kv_block_tokens == recipe.rollout.kv_block_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("step") / "model", Tail())


def test_transformers_gives_each_token_about_the_chance_to_be_the_last_that_is_asked_for(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocabulary = model.config.vocab_size
    torch.manual_seed(0)
    plain = torch.randint(3, vocabulary // 2, (16, 32))
    dwelling = torch.randint(vocabulary // 2, vocabulary, (16, 32))
    tail = Tail()
    cases = (plain, tail.end, tail.dwell), (dwelling, tail.end_dwelling, 1)
    with torch.no_grad():
        for tokens, end, dwells in cases:
            chances = model(tokens).logits.softmax(-1)
            # The last norm, by which both features are divided, differs with the context.
            assert chances[..., 1].mean().item() == pytest.approx(end, rel=0.35)
            kept = chances[..., vocabulary // 2 :].sum(-1).mean().item()
            assert kept == pytest.approx((1 - end) * dwells, rel=0.35)
            assert chances[..., [0, 2]].max().item() < 1e-6, "special tokens are never sampled"
