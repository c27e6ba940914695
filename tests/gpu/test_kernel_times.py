"""`linear_policy_loss` at DeepSeek-V3's output layer: five rounds, with their spread."""

import json
import sys

import pytest
from gpu_miniatures import device_kind
from r1_kernels_bench.implementations import OURS

from tools.bench.host import ROOT, run_to_end

COMMAND = (str(ROOT / "tools" / "bench"), "kernels", "--repeats", "5")
COMMAND += ("--only", "linear_policy_loss")
SMALL = ("--tokens", "256", "--vocab", "512", "--hidden", "128")
EAGER = "eager PyTorch"
WORSE, ROUNDING = 4.0, 1e-6
"""Errors against fp64 may be so many times eager PyTorch's, and this more."""


@pytest.mark.slow
def test_linear_policy_loss(check_folder, record_figures, seconds_left):
    file = check_folder / "kernels.json"
    minutes = str(min(2.0, (seconds_left() - 5) / 60))
    sizes = () if device_kind() == "gpu" else SMALL
    command = [sys.executable, *COMMAND, *sizes, "--minutes", minutes, "--json", str(file)]
    print(run_to_end(command), flush=True)
    (case,) = json.loads(file.read_text())["cases"]
    assert not case["failed"]
    rows = {row["name"]: row for row in case["rows"]}
    for name, row in rows.items():
        times = [1e3 * seconds for seconds in row["seconds"]]
        rounds = f"{min(times):.4g} to {max(times):.4g} in {len(times)} rounds" if times else ""
        record_figures({f"ms, {name}": rounds or row["not_run"]})
    ours, eager = rows[OURS], rows[EAGER]["errors"]
    assert ours["seconds"], ours["not_run"]
    record_figures({"of the bound": ours["share_of_bound"], "errors": ours["errors"]})
    for quantity in ours["errors"].keys() & eager.keys():
        assert ours["errors"][quantity] <= WORSE * eager[quantity] + ROUNDING, quantity
