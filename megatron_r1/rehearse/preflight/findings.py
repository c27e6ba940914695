"""The findings of the preflight: the measurements of all ranks, compared with each other and with
the planner's rates.

They are printed as a table, and written to a JSON file and one for `megatron-r1 plan --calibrate`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median_high

import msgspec
import yaml
from rich.console import Console
from rich.table import Column, Table

from megatron_r1.base.errors import RunError
from megatron_r1.base.files import atomic_write
from megatron_r1.config import Config
from megatron_r1.plan.assumptions import Assumptions
from megatron_r1.plan.hardware import Hardware, intra_node_fraction
from megatron_r1.rehearse.preflight.check_result import CheckResult
from megatron_r1.rehearse.preflight.cuda_checks import (
    compiler_results,
    library_results,
    trainer_results,
)
from megatron_r1.rehearse.preflight.facts import COMPILATIONS, RankFacts
from megatron_r1.rehearse.preflight.links import AXIS_COLLECTIVES
from megatron_r1.rehearse.preflight.node_checks import (
    controller_results,
    folder_results,
    memory_results,
    sandbox_result,
    version_results,
)
from megatron_r1.rehearse.preflight.rate_checks import (
    gloo_results,
    group_rates,
    hardware_of,
    link_results,
    node_rates,
    pair_results,
    product_result,
)
from megatron_r1.rehearse.settings import PreflightConfig

LEVEL_LABELS = {"ok": "", "note": "out of line", "block": "blocks"}


def preflight_results(
    config: Config, settings: PreflightConfig, facts: Sequence[RankFacts]
) -> list[CheckResult]:
    """Return the findings, in the order of the table.

    Args:
        config: the recipe.
        settings: the limits that measurements are held to.
        facts: the measurements of all ranks, by rank."""
    nodes = [(rank_facts, rank_facts.node) for rank_facts in facts if rank_facts.node is not None]
    return [
        *version_results(nodes),
        *library_results(facts),
        *trainer_results(nodes),
        *compiler_results(nodes),
        *memory_results(facts, nodes),
        product_result(facts, settings),
        *link_results(facts, settings),
        *pair_results(facts, settings),
        *gloo_results(facts, settings),
        *folder_results(config, facts),
        *controller_results(config, nodes),
        sandbox_result(config, nodes),
    ]


def measured_rates(hardware: Hardware, facts: Sequence[RankFacts]) -> dict[str, object]:
    """Return {name: value} for `megatron-r1 plan --calibrate`. The rates of links within a node
    (`nvlink`) and between nodes (`network`) are such that rate x the planner's `link_efficiency` is
    the rate measured on the slowest axis; `host_network` is the slowest node's over gloo, as
    measured."""
    efficiency, gpus = Assumptions().link_efficiency, hardware.gpus_per_node
    intra_node: list[float] = []
    inter_node: list[float] = []
    for axis in AXIS_COLLECTIVES:
        if groups := group_rates(facts, axis):
            span = max(max(ranks) - min(ranks) + 1 for ranks in groups)
            fraction = intra_node_fraction(gpus, span)
            rate = median_high(groups.values()) / efficiency
            (intra_node if fraction == 1 else inter_node).append(rate * (1 - fraction) or rate)
    inter_node += [rate / efficiency for rate in node_rates(facts, "pair_rates").values()]
    values: dict[str, object] = {"hardware": hardware.name, "gpus_per_node": gpus}
    if intra_node:
        values["nvlink"] = min(intra_node)
    if inter_node:
        values["network"] = min(inter_node)
    if gloo := node_rates(facts, "gloo_rates"):
        values["host_network"] = min(gloo.values())
    return values


def write_preflight_report(
    title: str,
    settings: PreflightConfig,
    facts: Sequence[RankFacts],
    results: Sequence[CheckResult],
) -> None:
    """Print the table and write the files that the settings name.

    Args:
        title: the recipe's name.
        settings: the section `preflight`.
        facts: what each rank has measured, by rank.
        results: the results of the checks.

    Raises:
        UserError: the parent of a file to write is not a folder.
        RunError: a finding blocks the run."""
    measured = Column("measured", overflow="fold")  # paths are longer than a line
    table = Table("check", measured, "expected", "", title=f"preflight of {title}")
    for result in results:
        table.add_row(result.check, result.measured, result.expected, LEVEL_LABELS[result.level])
    console = Console(width=140, highlight=False)
    console.print(table)
    for result in results:
        if result.problem:
            console.print(f"{result.check}: {result.problem}", soft_wrap=True, markup=False)
    seconds = dict(facts[0].seconds)
    compiled = seconds.pop(COMPILATIONS, 0.0)
    print(
        f"{sum(seconds.values()):.0f} s, the longest: {max(seconds, key=lambda s: seconds[s])}; "
        f"compilations {compiled:.0f} s"
    )
    if settings.output:
        content = {
            "recipe": title,
            "findings": [asdict(result) for result in results],
            "ranks": [msgspec.to_builtins(rank_facts) for rank_facts in facts],
        }
        atomic_write(settings.output, json.dumps(content, indent=1) + "\n")
    if settings.calibration:
        header = (
            f"# Measured by preflight on {len(facts)} ranks: rates that, times the planner's\n"
            "# link_efficiency, are what the slowest axis has reached; host_network as it is.\n"
        )
        rates = yaml.safe_dump(measured_rates(hardware_of(settings, facts), facts), sort_keys=False)
        path = atomic_write(settings.calibration, header + rates)
        print(f"{path}: for megatron-r1 plan --calibrate")
    if blocking := [result for result in results if result.level == "block"]:
        hosts = list(dict.fromkeys(host for result in blocking for host in result.hosts))
        raise RunError(
            f"preflight: {', '.join(dict.fromkeys(f.check for f in blocking))} would spoil the run"
            + (f"; replace or repair {', '.join(hosts)}" if hosts else "")
        )
    print("nothing blocks the run")
