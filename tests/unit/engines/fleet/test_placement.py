"""What is said of engines before they start."""

import os

import pytest

from megatron_r1.config import RolloutConfig
from megatron_r1.engines.fleet.placement import check_room
from megatron_r1.engines.server import gpu


@pytest.mark.parametrize(
    ("rollout", "is_said"),
    [({"engines": 2}, False), ({"engines": 3}, True), ({"engines": 1, "tensor_parallel": 4}, True)],
)
def test_more_engine_processes_than_cores_are_said_with_numbers(
    monkeypatch, capsys, rollout, is_said
):
    monkeypatch.setattr(gpu, "engine_device", lambda: "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    check_room(RolloutConfig(**rollout))
    said = capsys.readouterr().err
    assert ("rollout.engines" in said) is is_said and ("2 cores" in said) is is_said
    check_room(RolloutConfig(**rollout, placement="hosts"))
    assert capsys.readouterr().err == ""
