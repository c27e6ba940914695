"""Defects that only full size shows, planted in the recipe for 2,048 GPUs: a rehearsal refuses them
before anything starts."""

from pathlib import Path

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.rehearsal_checks import MAX_LINKS, check_full_size, check_links
from megatron_r1.config import load_recipe
from megatron_r1.push.matching import recipe_plan

RECIPE = Path(__file__).parents[3] / "examples/deepseek_r1/r1_zero.yaml"


def plant_all_pairs(monkeypatch):
    """Each part of what an engine rank receives comes from the least busy of its holders."""
    monkeypatch.setattr(recipe_plan, "max_group_fraction", lambda transport: 1e-9)


@pytest.mark.more
def test_a_trainer_rank_with_too_many_links_is_refused(monkeypatch):
    monkeypatch.chdir(RECIPE.parents[2])
    plant_all_pairs(monkeypatch)
    with refused("rollout.engines", Cause.TOO_LARGE, "at most 100"):
        check_full_size(load_recipe(RECIPE), "rl")


@pytest.mark.slow
def test_links_between_nearly_all_pairs_are_refused(monkeypatch):
    """Each engine by itself, as pushes were before sets of engines."""
    monkeypatch.chdir(RECIPE.parents[2])
    plant_all_pairs(monkeypatch)
    monkeypatch.setattr(recipe_plan, "MAX_SET_ENGINES", 1)
    with refused("rollout.engines", Cause.TOO_LARGE):
        check_full_size(load_recipe(RECIPE), "rl")


def test_a_store_with_millions_of_requests_is_refused():
    with refused("rollout.engines", Cause.TOO_LARGE, "1,433,600", "5,734,400"):
        check_links([700] * 2048, engine_ranks=65536)


def test_as_many_links_as_are_allowed_are_not_refused_and_one_more_is():
    check_links([MAX_LINKS, 1], engine_ranks=2)
    with refused("rollout.engines", Cause.TOO_LARGE, MAX_LINKS + 1):
        check_links([MAX_LINKS + 1, 1], engine_ranks=2)


def test_links_that_the_numbers_of_ranks_require_are_not_refused():
    check_links([64], engine_ranks=64)
    check_links([512] * 8, engine_ranks=2048)
