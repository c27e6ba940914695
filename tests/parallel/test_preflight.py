"""Four processes, each a node: what is planted on one of them is named, and nothing else."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

from megatron_r1.plan.assumptions import Assumptions, link_rate
from megatron_r1.plan.calibration_file import apply_calibration
from megatron_r1.plan.hardware import HARDWARE

pytestmark = pytest.mark.more

HERE = Path(__file__).parent


def test_a_slow_rank_another_version_and_a_folder_of_its_own_are_named(tmp_path):
    output = run_ranks(HERE, 4, "preflight_ranks.py", str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    hosts = {f["check"]: (f["hosts"], f["problem"]) for f in found["findings"] if f["hosts"]}
    for own in ("host memory", "host names"):  # this machine's, and its resolver's
        hosts.pop(own, None)
    assert hosts == {
        "versions": (["node-3"], "torch: 1.0 on node-3; 2.13.0+cpu on the others"),
        "matrix products": (["node-2"], "slow: rank 2 on node-2"),
        "run folder": (
            ["node-1"],
            f"{tmp_path}/run is not the folder that rank 0 sees on node-1",
        ),
    }
    measured = {f["check"]: f["measured"] for f in found["findings"]}
    assert measured["CUDA libraries, attention, compilers"] == "no GPU"
    assert "versions, matrix products, run folder would spoil the run" in output
    assert not (tmp_path / "run").exists(), "the folder is as it was before"
    ranks = found["ranks"]
    assert [rank["folder"]["excluded"] for rank in ranks] == [None, None, True, True]
    groups = [{axis: link["ranks"] for axis, link in rank["links"].items()} for rank in ranks]
    assert groups[0] == {"tensor": [0, 1], "expert": [0, 1], "data": [0, 2]}
    assert groups[3] == {"tensor": [2, 3], "expert": [2, 3], "data": [1, 3]}
    assert [len(rank["pair_rates"]) for rank in ranks] == [2, 2, 2, 2]
    assert [len(rank["gloo_rates"]) for rank in ranks] == [2, 2, 2, 2]
    # With the file, the planner computes with the slowest rate that an axis has reached.
    hardware, assumptions, calibration = apply_calibration(
        HARDWARE["H800"], Assumptions(), tmp_path / "rates.yaml"
    )
    assert calibration.names == {"gpus_per_node", "network", "host_network"}
    assert hardware.gpus_per_node == 1
    assert hardware.host_network == min(max(rank["gloo_rates"]) for rank in ranks)
    tensor = {tuple(rank["links"]["tensor"]["ranks"]): 0.0 for rank in ranks}
    for rank in ranks:
        link = rank["links"]["tensor"]
        tensor[tuple(link["ranks"])] = link["rate"]
    assert link_rate(hardware, assumptions, 2) <= max(tensor.values()) * 1.001
