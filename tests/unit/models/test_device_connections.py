"""CUDA_DEVICE_MAX_CONNECTIONS of trainer ranks, against what the packages say that read it."""

import warnings
from importlib import metadata

import pytest

from megatron_r1.config import ParallelConfig
from megatron_r1.models.device_connections import CONNECTIONS_VARIABLE, trainer_connections

HOPPER, BLACKWELL = 9, 10


@pytest.mark.parametrize(
    ("layout", "architecture", "expected"),
    [
        ({"tensor": 4}, HOPPER, "1"),
        ({"context": 2}, 8, "1"),
        ({"tensor": 4}, BLACKWELL, None),
        ({"pipeline": 2, "expert": 2}, HOPPER, None),
        ({"tensor": 4, "expert": 8, "overlap_expert_exchange": True}, HOPPER, "32"),
        ({"expert": 8, "overlap_expert_exchange": True}, BLACKWELL, "32"),
        ({"tensor": 4}, None, None),
    ],
)
def test_the_number_follows_the_layout_and_the_gpu(layout, architecture, expected):
    parallel = ParallelConfig(**layout)
    chosen = trainer_connections(parallel, {}, architecture)
    assert chosen == ({CONNECTIONS_VARIABLE: expected} if expected else {})


def test_the_users_own_number_stays_and_a_conflict_is_named():
    parallel = ParallelConfig(tensor=4)
    with pytest.warns(UserWarning, match=f"{CONNECTIONS_VARIABLE}=8, and this layout wants 1"):
        assert trainer_connections(parallel, {CONNECTIONS_VARIABLE: "8"}, HOPPER) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer_connections(parallel, {CONNECTIONS_VARIABLE: "1"}, HOPPER) == {}


def test_megatron_still_relies_on_one_where_tensor_ranks_overlap():
    source = metadata.distribution("megatron-core").locate_file(
        "megatron/core/tensor_parallel/layers.py"
    )
    lines = source.read_text().splitlines()
    for number in (621, 640, 653):
        assert "we rely on CUDA_DEVICE_MAX_CONNECTIONS=1" in lines[number - 1]
