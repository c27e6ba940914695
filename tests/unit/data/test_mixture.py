"""What an epoch of `sft` is made of, against counts worked out by hand."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from refusals import refused

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause
from megatron_r1.commands.parts.supervised_training import resolve_steps
from megatron_r1.commands.sft import load_sampler
from megatron_r1.config.sft import MixturePart
from megatron_r1.data.mixture import MixtureSampler, describe_mixture, epoch_counts, load_mixture

MIXTURES = yaml.safe_load(Path(__file__).with_name("mixtures.yaml").read_text(encoding="utf-8"))


def part(path="a", **size):
    return MixturePart(path=path, **size)


@pytest.mark.parametrize(("sizes_asked", "sizes", "counts"), MIXTURES["counts"])
def test_counts_of_an_epoch(sizes_asked, sizes, counts):
    assert epoch_counts([part(**size) for size in sizes_asked], sizes) == counts


def test_a_share_that_would_have_to_repeat_says_how_often():
    with refused("sft.data", Cause.TOO_LARGE, 5, 0.25, 10, "repeat: 2.00"):
        epoch_counts([part(), part("b", share=0.25)], [30, 5])


@pytest.fixture
def files(tmp_path):
    """Two files of 5 and 3 examples."""
    for name, size in (("x", 5), ("y", 3)):
        rows = [{"prompt": f"{name}{i}", "response": "r"} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl")


def drawn(sampler, n):
    return [example.prompt for example in sampler.next(n)]


@pytest.mark.parametrize("shuffled", [True, False])
def test_shares_are_exact_in_every_epoch_and_all_examples_come_up_equally(files, shuffled):
    x, y = files
    parts = load_mixture([part(x, count=2), part(y, count=7)])
    sampler = MixtureSampler(parts, seed=1, shuffled=shuffled)
    assert sampler.epoch_size == 9
    epochs = [drawn(sampler, 9) for _ in range(15)]
    for epoch in epochs:
        counts = Counter(epoch)
        assert sum(n for p, n in counts.items() if p[0] == "x") == 2
        # 7 of 3: each twice, and one of them once more.
        assert sorted(n for p, n in counts.items() if p[0] == "y") == [2, 2, 3]
        if not shuffled:
            assert epoch[:2] == sorted(epoch[:2]) and epoch[2:8] == ["y0", "y1", "y2"] * 2
    totals = Counter(itertools.chain(*epochs))
    assert {totals[f"x{i}"] for i in range(5)} == {15 * 2 // 5}
    assert {totals[f"y{i}"] for i in range(3)} == {15 * 7 // 3}
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_sampler_that_continues_draws_what_would_have_been_drawn(files):
    x, y = files

    def make(**size):
        return MixtureSampler(load_mixture([part(x, count=2), part(y, **size)]), seed=3)

    whole = drawn(make(repeat=1), 40)
    for stop in range(1, 12):
        first, again = make(repeat=1), make(repeat=1)
        assert drawn(first, stop) == whole[:stop]
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert drawn(again, 40 - stop) == whole[stop:]
    with refused("data", Cause.CHANGED):
        make(repeat=2).load_state_dict(make(repeat=1).state_dict())


def test_the_log_says_what_is_in_it(files):
    x, y = files
    lines = describe_mixture(load_mixture([part(x, repeat=3), part(y, count=5)]))
    for line, shown in zip(lines, (("15", x, "75.0%", "5"), ("5", y, "25.0%", "3")), strict=True):
        assert [text for text in shown if text not in line] == []


def test_a_recipe_is_written_as_it_is_read(files):
    x, y = files
    config = configuration.parse_recipe(
        {"sft": {"data": [x, {"path": y, "share": 0.25}], "epochs": 2}}
    )
    assert configuration.parse_recipe(config.model_dump()).sft == config.sft
    assert config.sft.data == [part(x), part(y, share=0.25)]


def test_epochs_are_steps(files):
    x, y = files

    def steps(run=None, **sft):
        tree = {"sft": {"data": [x, y], **sft}, "run": run or {}}
        config = configuration.parse_recipe(tree)
        return resolve_steps(config, "sft", load_sampler(config)[0].epoch_size).run.steps

    # 8 examples an epoch.
    assert steps(epochs=2, batch_size=4) == 4
    assert steps(epochs=2, batch_size=3) == 6  # 5 1/3: the last batch begins the third epoch
    assert steps(epochs=0.5, batch_size=4) == 1
    assert steps(batch_size=4) == configuration.Config().run.steps
    assert steps({"steps": 4}, epochs=2, batch_size=4) == 4  # as config.yaml of that run has it
    with refused("sft.epochs", Cause.CONFLICT, 2, 8, 4, 7):
        steps({"steps": 7}, epochs=2, batch_size=4)


def test_one_path_is_what_it_was(files):
    config = configuration.parse_recipe({"sft": {"data": files[0]}})
    sampler, contents = load_sampler(config)
    assert contents[0] == "5 examples" and len(sampler.items) == 5
