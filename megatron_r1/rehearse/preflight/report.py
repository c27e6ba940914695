"""The results of a preflight: a table, a JSON file, and a file for `megatron-r1 plan
--calibrate`."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import msgspec
import yaml
from rich.console import Console
from rich.table import Table

from megatron_r1.base.errors import RunError
from megatron_r1.base.files import atomic_write
from megatron_r1.rehearse.preflight.facts import Facts
from megatron_r1.rehearse.preflight.judge import CheckFinding, hardware_of, measured_rates
from megatron_r1.rehearse.preflight.settings import PreflightConfig

WORDS = {"ok": "", "note": "out of line", "block": "blocks"}


def write(
    title: str, settings: PreflightConfig, facts: Sequence[Facts], findings: Sequence[CheckFinding]
) -> None:
    """Print the table and write the files that the settings name. Raises RunError where a finding
    blocks the run."""
    table = Table("check", "measured", "expected", "", title=f"preflight of {title}")
    for finding in findings:
        table.add_row(finding.check, finding.measured, finding.expected, WORDS[finding.level])
    console = Console(width=140, highlight=False)
    console.print(table)
    for finding in findings:
        if finding.problem:
            console.print(f"{finding.check}: {finding.problem}", soft_wrap=True, markup=False)
    seconds = facts[0].seconds
    print(f"{sum(seconds.values()):.0f} s, the longest: {max(seconds, key=lambda s: seconds[s])}")
    if settings.output:
        content = {
            "recipe": title,
            "findings": [asdict(finding) for finding in findings],
            "ranks": [msgspec.to_builtins(each) for each in facts],
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
    if blocking := [finding for finding in findings if finding.level == "block"]:
        hosts = list(dict.fromkeys(host for finding in blocking for host in finding.hosts))
        raise RunError(
            f"preflight: {', '.join(dict.fromkeys(f.check for f in blocking))} would spoil the run"
            + (f"; replace or repair {', '.join(hosts)}" if hosts else "")
        )
    print("nothing blocks the run")
