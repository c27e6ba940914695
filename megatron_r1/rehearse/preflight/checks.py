"""Compares the measurements of all ranks, with each other and with the planner's rates."""

from collections.abc import Sequence

from megatron_r1.config import Config
from megatron_r1.rehearse.preflight.check_result import CheckResult
from megatron_r1.rehearse.preflight.facts import RankFacts
from megatron_r1.rehearse.preflight.node_checks import (
    controller_results,
    folder_results,
    memory_results,
    sandbox_result,
    version_results,
)
from megatron_r1.rehearse.preflight.rate_checks import (
    gloo_results,
    link_results,
    pair_results,
    product_result,
)
from megatron_r1.rehearse.settings import PreflightConfig


def check_facts(
    config: Config, settings: PreflightConfig, facts: Sequence[RankFacts]
) -> list[CheckResult]:
    """Return the findings, in the order of the table.

    Args:
        config: the recipe.
        settings: the limits that measurements are held to.
        facts: the measurements of all ranks, by rank.
    """
    nodes = [(rank_facts, rank_facts.node) for rank_facts in facts if rank_facts.node is not None]
    return [
        *version_results(nodes),
        *memory_results(facts, nodes),
        product_result(facts, settings),
        *link_results(facts, settings),
        *pair_results(facts, settings),
        *gloo_results(facts, settings),
        *folder_results(config, facts),
        *controller_results(config, nodes),
        sandbox_result(config, nodes),
    ]
