"""What is out of line among the facts of sixteen GPUs on four nodes, worked out by hand."""

import pytest

from megatron_r1.base.errors import UserError
from megatron_r1.config import parse_recipe
from megatron_r1.config.overrides import take_section
from megatron_r1.models.loaded_libraries import LoadedLibrary
from megatron_r1.plan.assumptions import Assumptions, link_rate
from megatron_r1.plan.hardware import GIB, HARDWARE
from megatron_r1.rehearse.preflight.facts import (
    Compilation,
    FolderFacts,
    LinkRate,
    MemoryUsage,
    NodeFacts,
    RankFacts,
    TrainerFacts,
)
from megatron_r1.rehearse.preflight.findings import measured_rates, preflight_results
from megatron_r1.rehearse.preflight.links import ring_partners
from megatron_r1.rehearse.preflight.rate_checks import hardware_of
from megatron_r1.rehearse.settings import PreflightConfig, PreflightRecipe

CONFIG = parse_recipe({"run": {"folder": "runs/x"}, "data": {"kind": "code"}})
SETTINGS = PreflightConfig()
# Of 4 GPUs a node at 450 GB/s within and 50 between: 0.78 x 450; 0.78 / ((3/4) / 50) over 16 ranks.
INSIDE, ACROSS = 351e9, 52e9


def facts() -> list[RankFacts]:
    return [
        RankFacts(
            rank=rank,
            node_index=rank // 4,
            host=f"host-{rank // 4}",
            device="cuda",
            memory=MemoryUsage(80 * GIB, 79 * GIB),
            product_flops=700e12,
            links={
                "tensor": LinkRate(
                    "all-reduce", list(range(rank // 4 * 4, rank // 4 * 4 + 4)), 300e9
                ),
                "data": LinkRate("all-reduce", list(range(rank % 4, 16, 4)), 45e9),
            },
            pair_rates=[40e9, 41e9],
            folder=FolderFacts("", True, rank != 0 or None, 900e6, 800e6, 0.001, 10**12),
            node=None
            if rank % 4
            else NodeFacts(
                {"GPU": "NVIDIA H100 80GB HBM3", "torch": "2.11.0"},
                MemoryUsage(100 * GIB, 95 * GIB),
                {},
                "",
                clock_offset=0.0,
                lookup_seconds=0.001,
                sandbox="",
                trainer=TrainerFacts("fused", "8 of 1 GiB", 8 * GIB),
                compilations={"Triton": Compilation("", 2.0), "NVRTC": Compilation("", 0.2)},
            ),
            seconds={},
            libraries=[
                LoadedLibrary("cuDNN", "9.20.0", "/lib/libcudnn.so.9"),
                LoadedLibrary("NVRTC", "13.0", "/lib/libnvrtc.so.13"),
            ],
        )
        for rank in range(16)
    ]


def blocking(found: list[RankFacts]) -> dict[str, tuple[str, ...]]:
    return {
        f.check: f.hosts for f in preflight_results(CONFIG, SETTINGS, found) if f.level == "block"
    }


def test_sound_nodes_have_nothing_out_of_line():
    assert {f.level for f in preflight_results(CONFIG, SETTINGS, facts())} == {"ok"}


def test_a_node_whose_resolver_does_not_answer_is_shown_and_blocks_nothing():
    found = facts()
    found[8].node.lookup_seconds = 5.0
    shown = [f for f in preflight_results(CONFIG, SETTINGS, found) if f.level != "ok"]
    assert [(f.check, f.level, f.hosts) for f in shown] == [("host names", "note", ("host-2",))]


def test_the_planners_rates_are_those_of_the_gpu_that_is_found():
    hardware = hardware_of(SETTINGS, facts())
    assert (hardware.name, hardware.gpus_per_node) == ("H100", 4)
    assert link_rate(hardware, Assumptions(), 4) == pytest.approx(INSIDE)
    assert link_rate(hardware, Assumptions(), 16) == pytest.approx(ACROSS)
    with pytest.raises(UserError, match="preflight.hardware"):
        take_section({"preflight.hardware": "H10"}, PreflightRecipe)


def test_a_slow_node_is_named_from_the_groups_that_only_it_is_in():
    found = facts()
    for rank in range(8, 12):
        found[rank].links["tensor"].rate = 90e9
    assert blocking(found) == {"tensor: all-reduce": ("host-2",)}


def test_a_slow_adapter_is_named_from_its_node_being_slow_to_both_neighbors():
    found = facts()
    for rank in range(16):
        node = rank // 4
        # Either neighbor of host-1 has one slow link, too.
        found[rank].pair_rates = {1: [8e9, 8e9], 3: [41e9, 41e9]}.get(node, [8e9, 41e9])
    assert blocking(found) == {"links between nodes": ("host-1",)}


def test_an_axis_far_below_the_planners_rate_blocks_though_its_groups_are_equal():
    found = facts()
    for each in found:
        each.links["data"].rate = 3e9
    problems = [f.problem for f in preflight_results(CONFIG, SETTINGS, found) if f.level == "block"]
    assert problems == [
        "5% of the planner's rate: does NCCL use the fast network (NCCL_DEBUG=INFO)?"
    ]


def test_memory_of_others_products_versions_ports_and_the_sandbox_name_their_hosts():
    found = facts()
    found[5].memory = MemoryUsage(80 * GIB, 60 * GIB, ["4711, 19000 MiB"])
    found[13].product_flops = 500e12
    found[4].node.versions = {**found[4].node.versions, "torch": "2.10.0"}
    found[0].node.ports = {"run.health_port": "port 9000: Address already in use"}
    found[8].node.unreachable = "host-0:20000: timed out"
    found[12].node.sandbox = "bwrap is missing"
    assert blocking(found) == {
        "versions": ("host-1",),
        "GPU memory": ("host-1",),
        "matrix products": ("host-3",),
        "controller's ports": ("host-2",),
        "sandbox": ("host-3",),
    }


def test_libraries_of_another_version_are_named_with_both_versions_and_their_files():
    found = facts()
    for rank in range(8, 12):  # a whole node, with another file, too
        found[rank].libraries[0] = LoadedLibrary("cuDNN", "9.19.0", "/old/libcudnn.so.9")
    found[13].libraries.append(LoadedLibrary("NVRTC", "13.5", "/other/libnvrtc.so.13"))
    found[2].libraries[1] = LoadedLibrary("NVRTC", "13.0", "/mnt/libnvrtc.so.13")  # the same one
    found[3].libraries.pop()
    rows = {f.check: f for f in preflight_results(CONFIG, SETTINGS, found)}
    assert blocking(found) == {"cuDNN": ("host-2",), "NVRTC": ("host-0", "host-3")}
    assert rows["cuDNN"].measured == "9.20.0: /lib/libcudnn.so.9"
    assert rows["cuDNN"].problem == (
        "9.19.0 on host-2 (rank 8: /old/libcudnn.so.9); 9.20.0 on the others"
    )
    assert rows["NVRTC"].problem == (
        "not loaded on host-0 (rank 3: ), 13.0 and 13.5 on host-3 "
        "(rank 13: /lib/libnvrtc.so.13, /other/libnvrtc.so.13); 13.0 on the others"
    )


def test_attention_that_differs_between_nodes_blocks():
    found = facts()
    found[8].node.trainer = TrainerFacts("unfused (as it is)", "8 of 1 GiB", 8 << 30)
    rows = {f.check: f for f in preflight_results(CONFIG, SETTINGS, found)}
    assert blocking(found) == {"attention": ("host-2",)}
    assert rows["attention"].problem == "unfused (as it is) on host-2; fused on the others"


def test_attention_that_a_trainer_refuses_and_a_compiler_that_fails_block():
    found = facts()
    found[4].node.trainer = TrainerFacts(fault="unfused: Could not open libnvrtc")
    found[4].node.compilations = {"Triton": Compilation("RuntimeError: no C compiler", 0.1)}
    rows = {f.check: f for f in preflight_results(CONFIG, SETTINGS, found)}
    assert blocking(found) == {"attention": ("host-1",), "compiler: Triton": ("host-1",)}
    assert rows["attention"].measured == "fused"
    assert rows["communicators"].measured == "8.0 GiB: 8 of 1 GiB"
    assert rows["attention"].problem == "on host-1: unfused: Could not open libnvrtc"
    assert rows["compiler: Triton"].problem == "not on host-1: RuntimeError: no C compiler"
    assert rows["compiler: Triton"].measured == "one kernel in at most 2.0 s"


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (FolderFacts(error="[Errno 30] Read-only file system: 'runs/x'"), "Read-only file system"),
        (FolderFacts(), "is not the folder that rank 0 sees on host-2"),
        (
            FolderFacts(shared=True, excluded=False),
            "no locks that hold between processes on host-2",
        ),
    ],
)
def test_a_folder_that_is_not_one_for_all_blocks(fault, problem):
    found = facts()
    found[8].folder = fault
    (finding,) = [f for f in preflight_results(CONFIG, SETTINGS, found) if f.level == "block"]
    assert problem in finding.problem and finding.hosts == ("host-2",)


def test_with_the_measured_rates_the_plan_gives_what_the_slowest_axis_has_reached():
    found = facts()
    values = measured_rates(hardware_of(SETTINGS, found), found)
    assert values.pop("hardware") == "H100" and values.pop("gpus_per_node") == 4
    # data over 13 ranks: 9/13 of its bytes leave the node; the links between nodes were slower
    assert values == {
        "nvlink": pytest.approx(300e9 / 0.78),
        "network": pytest.approx(min(45e9 * 9 / 13, 41e9) / 0.78),
    }
    assert HARDWARE["H100"].nvlink == 450e9


def test_the_host_network_is_planned_with_its_slowest_node_which_is_named():
    found = facts()
    assert not [f for f in preflight_results(CONFIG, SETTINGS, found) if f.check == "host network"]
    for each in found:
        each.gloo_rates = [1.2e9, 0.3e9]
    (finding,) = [
        f for f in preflight_results(CONFIG, SETTINGS, found) if f.check == "host network"
    ]
    assert (finding.level, finding.problem) == ("ok", ""), "75% of the planner's 1.6 GB/s"
    for each in found[4:8]:
        each.gloo_rates = [0.3e9, 0.3e9]
    assert blocking(found) == {"host network": ("host-1",)}
    assert measured_rates(hardware_of(SETTINGS, found), found)["host_network"] == 0.3e9
    for each in found:
        each.gloo_rates = [0.4e9]
    (finding,) = [
        f for f in preflight_results(CONFIG, SETTINGS, found) if f.check == "host network"
    ]
    assert finding.level == "note", "slow, but the run can be planned with it"
    words = "25% of the planner's host_network, so that what goes over it takes 4 times"
    assert words in finding.problem


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 5, 8])
def test_rounds_of_pairs_have_every_link_of_the_ring_once(num_nodes):
    rounds = zip(*(ring_partners(node, num_nodes) for node in range(num_nodes)), strict=True)
    links = []
    for partners in rounds:
        for node, partner in enumerate(partners):
            if partner is not None:
                assert partners[partner] == node, "a pair is one of both its nodes"
                links.append(frozenset((node, partner)))
    ring = {frozenset((node, (node + 1) % num_nodes)) for node in range(num_nodes)}
    ring.discard(frozenset((0,)))
    assert set(links) == ring and len(links) == 2 * len(ring)
