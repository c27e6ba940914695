"""tools/plan against published figures, Megatron's own schedule and the weight table."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_r1 import config as configuration
from megatron_r1 import weights
from megatron_r1.config.hardware import GIB, HARDWARE
from megatron_r1.models import read_hf_config
from megatron_r1.weights.layout import layout_of
from tools.plan.activations import in_flight, layer_activations
from tools.plan.bill import Bill
from tools.plan.command import main
from tools.plan.communication import groups
from tools.plan.flops import forward_flops
from tools.plan.job import Job
from tools.plan.memory import GPU_CHUNK_ELEMENTS, GPU_CHUNK_TOKENS, rank_memory
from tools.plan.parameters import ModelCounts, RankCounts
from tools.plan.push import engine_layout, push_section
from tools.plan.push_sets import set_links
from tools.plan.quantity import Quantity
from tools.plan.rollout import Engines, cache_bytes_per_token, samples_section
from tools.plan.search import even_layout, nearest

ROOT = Path(__file__).parents[3]

ONE_GPU = ["--rollout.tensor", "1", "--rollout.data", "1"]
RECIPE = ROOT / "examples/deepseek_r1/r1_zero.yaml"
LAPTOP = [str(ROOT / "examples/laptop/r1_zero.yaml")]
LAPTOP += ["--model.path", str(ROOT / "examples/laptop/model")]
V3 = read_hf_config(ROOT / "examples/deepseek_r1/model")
LLAMA_405B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
}
QWEN_72B = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def real_job(**parallel) -> Job:
    config = configuration.load(RECIPE, {f"parallel.{k}": v for k, v in parallel.items()})
    return Job(V3, config, 2048, HARDWARE["H800"])


def test_an_engine_is_laid_out_as_the_recipe_says_or_as_vllm_serves_such_models():
    config = configuration.load(RECIPE)
    given = engine_layout(Job(V3, config, 2048, HARDWARE["H800"]))
    assert (given.tensor, given.data, given.expert_parallel) == (8, 16, True)
    changed = {"rollout.tensor": 16, "rollout.data": 8}
    wide = engine_layout(Job(V3, configuration.load(RECIPE, changed), 2048, HARDWARE["H800"]))
    assert (wide.tensor, wide.data, wide.engines) == (16, 8, 16)
    silent = {"rollout.tensor": 1, "rollout.data": 1, "rollout.expert_parallel": False}
    assumed = engine_layout(Job(V3, configuration.load(RECIPE, silent), 2048, HARDWARE["H800"]))
    assert assumed == given


def planned(**overrides) -> Job:
    """The real job with settings of the recipe such as push__fp8; rollout_gpus: the engines'."""
    gpus = overrides.pop("rollout_gpus", 0)
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    return Job(V3, configuration.load(RECIPE, changed), 2048, HARDWARE["H800"], rollout_gpus=gpus)


def test_the_reference_lies_in_host_memory_or_on_the_gpu():
    host, device = (
        rank_memory(planned(parallel__reference_offload=place))[0] for place in ("host", "device")
    )
    assert host.host["reference"] == device.training["reference"] > 0
    assert "reference" not in host.training and "reference" not in device.host


def test_an_fp8_push_is_planned_with_fp8_s_bytes_and_its_engines_with_fp8_weights():
    gloo = {"push__transport": "gloo"}
    plain, fp8 = (Bill(planned(push__fp8=value, **gloo)).sections() for value in (False, True))
    assert plain["push"]["in FP8"].value == fp8["push"]["into an engine GPU"].value
    assert "in FP8" not in fp8["push"] and "FP8" in fp8["push"]["into an engine GPU"].formula
    for name in ("into an engine GPU", "into all engines", "receive buffer"):
        assert fp8["push"][name].value < 0.55 * plain["push"][name].value, name
    assert fp8["push"]["out of a trainer rank"].value < plain["push"]["out of a trainer rank"].value
    assert fp8["push"]["over what is needed"].value == 1
    seconds = [plan["time"]["push"].value for plan in (plain, fp8)]
    assert seconds[1] == pytest.approx(fp8["push"]["into an engine GPU"].value / 1.2e9)
    assert seconds[1] < 0.55 * seconds[0]
    gpu = [plan["engine memory of a GPU"] for plan in (plain, fp8)]
    freed = gpu[0]["weights"].value - gpu[1]["weights"].value
    assert gpu[1]["weights"].value == fp8["push"]["into an engine GPU"].value
    assert gpu[1]["KV cache"].value - gpu[0]["KV cache"].value == freed > 7e9


def test_an_fp8_decoding_step_skips_idle_experts_of_one_byte_a_value():
    engines = Engines(planned(push__fp8=True))
    read = [engines._weights_read(sequences) for sequences in (0, 1e6)]
    assert read[1] == pytest.approx(engines.weights)
    routed = engines.counts.routed + engines.counts.mtp_routed  # the drafter's experts too
    assert read[1] - read[0] == pytest.approx(routed / 128)


def test_a_pass_with_a_draft_takes_one_layer_more_and_gives_more_tokens():
    """By hand, where only the latency of layers counts: 61 layers, 1 of MTP, 85% accepted."""
    no_limits = replace(HARDWARE["H800"], memory_bandwidth=1e30, bf16=1e30)
    for tokens, expected in ((1, 62 / 1.85), (2, 63 / (1.85 + 0.85**2)), (0, 61)):
        method = "mtp" if tokens else "none"
        job = planned(rollout__speculative={"method": method, "tokens": tokens or 1})
        engines = Engines(replace(job, hardware=no_limits))
        assert engines.step_seconds(32) == pytest.approx(expected * 0.00015)
    ngram = Engines(planned(rollout__speculative={"method": "ngram", "tokens": 4}))
    assert "nothing is saved by rollout.speculative.method=ngram" in ngram.seconds()[1]


def test_sampling_without_a_trainer_has_no_fp8_push():
    changed = {"push.fp8": True, "push.transport": "cuda_ipc"}
    config = configuration.load(RECIPE, changed)
    engines = Engines(Job(V3, config, 2048, HARDWARE["H800"], verb="sample"))
    assert engines.weights == Engines(planned()).weights and not engines.receive_buffer


@pytest.mark.parametrize(
    "transport, gib",
    [("shm", None), ("gloo", 2.0), ("cuda_ipc", None), ("cuda_ipc", 2.0)],
)
def test_the_receive_buffer_is_where_the_transport_writes(transport, gib):
    any_share = {"rollout__gpu_memory": None}
    bill = Bill(planned(push__transport=transport, push__memory_gib=gib, **any_share))
    sections, limit = bill.sections(), math.inf if gib is None else gib * GIB
    buffer = min(limit, bill.engines.weights)
    assert sections["push"]["receive buffer"].value == buffer
    formula = sections["push"]["receive buffer"].formula
    assert f"({transport})" in formula and ("engines pause" in formula) == (gib == 2)
    assert ("is for one host" in formula) == (transport in ("shm", "cuda_ipc"))
    default = Bill(planned(push__transport="gloo", **any_share))
    before = default.engines.cache
    trainer = sections[f"memory of pipeline rank {bill.worst.rank}, the fullest"]
    host = sections["host memory of a node"]
    if transport == "cuda_ipc":
        assert "receive buffer" not in host and "on its GPU" in formula
        assert before - bill.engines.cache == trainer["receive buffer"].value == buffer
        assert bill.worst.peak == default.worst.peak + buffer
    else:
        assert host["receive buffer"].value == 8 * buffer and "on its host" in formula
        assert bill.engines.cache == before and "receive buffer" not in trainer


def test_over_nccl_colocated_engines_receive_in_the_place_of_their_cache():
    """Weights in transit, and two rounds of 64 MiB of each engine of a set of 16."""
    bill = Bill(planned(push__transport="nccl"))
    sections, engines = bill.sections(), bill.engines
    assert "in the place of its KV cache" in sections["push"]["receive buffer"].formula
    assert not engines.receive_buffer and bill.problems() == []
    for section in sections.values():
        assert "receive buffer" not in section or section is sections["push"]
    needed = engines.weights + 2 * GIB
    gpu = engines.weights + engines.resident + 6 * GIB + needed
    hardware = replace(HARDWARE["H800"], memory=gpu - GIB)
    fits_engine = planned(push__transport="nccl", rollout__gpu_memory=None)
    share, push = Bill(replace(fits_engine, hardware=hardware)).problems()[-2:]
    assert "rollout.gpu_memory is not set, and vLLM takes 0.92" in share
    assert "a push over nccl needs 21.85 GiB" in push and "which has 20.85 GiB" in push
    assert "set rollout.gpu_memory" not in push  # the trainer leaves no larger share
    # A difference needs all of the push before, so its memory is kept.
    assert Bill(planned(push__transport="nccl", push__delta=True)).engines.receive_buffer


def test_a_larger_share_of_the_gpu_is_the_remedy_where_the_trainer_leaves_it(capsys):
    fewer = ["--gpus", "512", "--rollout.engines", "4", "--rl.schedule", "[]"]
    assert main([str(RECIPE), *fewer, "--rollout.gpu_memory", "0.55"]) == 1
    remedy = re.search(
        r"cache, which has .*: set (rollout.gpu_memory) to (0\.\d+), or", capsys.readouterr().out
    )
    assert main([str(RECIPE), *fewer, f"--{remedy[1]}", remedy[2]]) == 0
    less = f"{float(remedy[2]) - 0.01:.2f}"
    assert main([str(RECIPE), *fewer, f"--{remedy[1]}", less]) == 1


@pytest.mark.parametrize("colocated", [True, False])
def test_gradients_are_the_engines_memory_while_these_compute(colocated):
    bill = Bill(planned(rollout__colocated=colocated, rl__importance_cap=2.0))
    rank = max(bill.ranks, key=lambda rank: rank.resident)
    kinds = ["parameters", "optimizer"] + ["gradients"] * (not colocated)
    assert bill.engines.resident == sum(rank.training[kind] for kind in kinds)
    assert ("gradients" in rank.scoring) != colocated and "gradients" in rank.training


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("reference", {"parallel__reference_offload": "device"}),
        ("fp8 copies", {"fp8__recipe": "blockwise"}),
    ],
)
def test_all_that_the_trainer_keeps_on_a_gpu_is_not_the_engines(kind, changed):
    bill, plain = Bill(planned(**changed, rollout__gpu_memory=None)), Bill(planned())
    more = max(rank.training.get(kind, 0) for rank in bill.ranks)
    assert bill.engines.resident > plain.engines.resident + more / 2 > 0


def test_an_engine_that_takes_more_of_a_gpu_than_the_trainer_leaves_is_named():
    most = Bill(planned()).sections()["engine memory of a GPU"]["share, at most"]
    assert str(most) == "75.0%"
    (problem,) = Bill(planned(rollout__gpu_memory=0.9)).problems()
    assert problem.startswith("rollout.gpu_memory=0.9: of each GPU's 74.51 GiB the trainer")
    assert problem.endswith("set at most 0.75")
    less = Bill(planned(rollout__gpu_memory=0.5)).engines
    assert less.cache == round(0.5 * HARDWARE["H800"].memory - 3 * GIB - less.weights)


def test_receive_buffers_of_engines_on_their_own_gpus_are_not_the_trainers():
    alone = {"rollout_gpus": 2048, "rollout__colocated": False}
    host = Bill(planned(**alone, push__transport="gloo")).sections()
    assert "receive buffer" not in host["host memory of a node"]
    engines = host["host memory of an engines' node"]["receive buffer"]
    assert engines.value == 8 * host["push"]["receive buffer"].value
    bill = Bill(planned(**alone, push__transport="cuda_ipc"))
    assert bill.worst.peak == Bill(planned(**alone)).worst.peak
    assert bill.engines.receive_buffer == bill.engines.weights
    assert "host memory of an engines' node" not in bill.sections()


def test_a_receive_buffer_that_does_not_fit_is_named_with_its_remedy():
    hardware = replace(HARDWARE["H800"], memory=50 * GIB)
    job = replace(planned(push__transport="cuda_ipc"), hardware=hardware)
    trainer, _, cache = Bill(job).problems()
    assert "pipeline rank 3 needs 71.26 GiB of 50.00 GiB" in trainer
    assert "of receive buffer" in cache and "set push.memory_gib below 19.9, or give" in cache
    hardware = replace(HARDWARE["H800"], host_memory=15 * GIB)
    alone = {"rollout_gpus": 2048, "push__transport": "gloo"}
    problem = Bill(replace(planned(**alone), hardware=hardware)).problems()[-1]
    assert (
        "a host needs 158.83 GiB of 120.00 GiB" in problem
        and "set push.memory_gib below" in problem
    )
    job = planned(**alone, push__delta=True, checkpoint__asynchronous=False)
    trainer, engines = Bill(replace(job, hardware=hardware)).problems()
    assert "158.83 GiB of it sent last: set push.delta to false, or raise" in trainer
    assert engines.endswith("of it receive buffer: give each engine more GPUs")


def test_what_deltas_keep_is_counted_and_windows_beside_them_are_refused(capsys):
    options = {"push__transport": "gloo", "push__delta": True}
    sections = Bill(planned(**options)).sections()
    push = sections["push"]
    assert push["sent last"].value == push["out of a trainer rank"].value
    kept = sections["host memory of a node"]["sent last"].value
    assert kept == pytest.approx(8 * push["into all engines"].value / 2048)
    for without in ({}, {**options, "push__full_every": 1}):
        sections = Bill(planned(**without)).sections()
        assert "sent last" not in sections["push"]
        assert "sent last" not in sections["host memory of a node"]
    delta = ["--push.transport", "gloo", "--push.delta", "true", "--push.memory_gib", "2"]
    assert main([str(RECIPE), *delta]) == 1
    assert "push.memory_gib=2 brings 19.9 GiB of weights in windows" in capsys.readouterr().out


def test_what_a_push_moves_beyond_need_and_how_evenly_is_counted(monkeypatch):
    push = push_section(planned())
    assert push["over what is needed"].value == push["busiest engine GPU"].value == 1
    assert str(push["over what is needed"]) == "1.00 x"
    # One of 128 GPUs with half as much again: 1.5 / (128.5 / 128).
    each = push["into an engine GPU"].value

    def uneven(*arguments, **named):
        return replace(set_links(*arguments, **named), received=[1.5 * each] + 127 * [each])

    monkeypatch.setattr("tools.plan.push.set_links", uneven)
    push = push_section(planned())
    assert push["over what is needed"].value == pytest.approx(128.5 / 128)
    assert push["busiest engine GPU"].value == pytest.approx(1.5 / (128.5 / 128))


def test_numbers_of_gpus_below_one_engine_are_not_tried(capsys):
    layout = ("--parallel.pipeline", "1", "--parallel.pipeline_layout", "null")
    experts = ("--parallel.tensor", "4", "--parallel.expert", "64", "--rollout.data", "64")
    assert main([str(RECIPE), *layout, *experts]) == 1
    assert "512 ranks" in capsys.readouterr().out


def test_a_push_is_priced_as_sets_of_engines_execute_it():
    """By hand: 2,048 positions' shares, from the plan's largest; requests by kind of rank."""
    push = push_section(planned(push__transport="nccl"))
    alone = push_section(planned(push__transport="nccl", push__delta=True))
    whole = push["into an engine GPU"].value
    # The mean is whole / 16; a rank sends more of it where much stays in its node.
    assert whole / 16 < push["out of a trainer rank"].value < 3 * whole / 16
    assert alone["out of a trainer rank"].value > 5 * push["out of a trainer rank"].value
    assert push["links of a rank"].value <= 17
    # An offer, table, plan and group of each engine rank; two requests of each trainer rank; four
    # of each of 4 to 9 pairs into an engine rank.
    assert 2048 * (6 + 1 + 2 + 4 * 4) < push["store requests"].value < 2048 * (6 + 1 + 2 + 4 * 9)
    assert 2.5 < push["set-up"].value < 10
    assert whole / 37.5e9 < push["push"].value < 1.1 * whole / 37.5e9


def test_a_push_within_a_node_goes_over_the_node_s_links():
    hf = read_hf_config(ROOT / "examples/laptop/model")
    h800, seconds = HARDWARE["H800"], {}
    for transport in ("shm", "cuda_ipc", "gloo", "nccl"):
        changed = {"push.transport": transport}
        config = configuration.load(ROOT / "examples/laptop/r1_zero.yaml", changed)
        bill = Bill(Job(hf, config, 1, h800))
        seconds[transport] = bill.times.push()
        assert "one host" not in bill.sections()["push"]["receive buffer"].formula
    each = 0.75 / bill.engines.weights
    rates = [h800.host_link, h800.nvlink, h800.host_network, h800.network]
    assert [1 / s for s in seconds.values()] == pytest.approx([rate * each for rate in rates])
    over_hosts = ("cuda_ipc", "gloo", "nccl")
    many = [Bill(planned(push__transport=name)).times.push() for name in over_hosts]
    assert many[0] == many[1] == pytest.approx(many[2] * h800.network / h800.host_network)


@pytest.mark.parametrize("staleness", ["0", "1"])
def test_engines_that_are_not_colocated_are_told_what_gives_them_gpus(capsys, staleness):
    options = ["--rollout.colocated", "false", "--rl.staleness", staleness]
    options += ["--rl.importance_cap", "2", "--push.transport", "gloo"]
    assert main([str(RECIPE), *options]) == 0
    output = " ".join(capsys.readouterr().out.split())
    advice = re.search(r"rollout.colocated is false.* pass (--rollout-gpus 2048) assumed", output)
    assert advice and "on the same GPUs, in turn" in output
    assert main([str(RECIPE), *options, *advice[1].split()]) == 0
    output = capsys.readouterr().out
    assert "on GPUs of their own" in output and "rollout.colocated" not in output
    assert main([str(RECIPE)]) == 0
    assert "rollout.colocated" not in capsys.readouterr().out


def test_the_documented_bill_is_the_one_that_is_printed(capsys):
    assert main([str(RECIPE)]) == 0
    document = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in document


def test_the_documented_time_of_every_stage_is_the_planned_one(capsys):
    text = (RECIPE.parent / "README.md").read_text(encoding="utf-8")
    stages = text.partition("## The stages")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in stages.splitlines() if line.startswith("| `")]
    units = {"hour": 3600, "minute": 60, "s a step": 1}
    compared = []
    for row in rows:
        if row[-1] == "not planned":
            continue
        unit = next(seconds for name, seconds in units.items() if name in row[-1])
        numbers = re.findall(r"[\d.]+(?=[ ,])", row[-1])
        steps = re.search(r"for ([\d,]+) steps", row[-1])
        for name, number in zip(re.findall(r"`(\w+)`", row[0]), numbers, strict=False):
            recipe = str(RECIPE.with_name(f"{name}.yaml"))
            assert main([recipe, "--gpus", row[-2].replace(",", "")]) == 0
            planned = printed_seconds(capsys.readouterr().out)
            planned *= int(steps[1].replace(",", "")) if steps else 1
            digits = len(number.partition(".")[2])
            assert round(planned / unit, digits) == float(number), name
            compared.append(name)
    assert len(compared) == 11


def printed_seconds(bill: str) -> float:
    """Of a run, or of a step where the recipe has no number of them."""
    units = {"hours": 3600, "minutes": 60, "s": 1}
    for pattern in (r"\nthe run of .*: ([\d,]+) (hours)", r"\n  (?:run|step) +([\d.,]+) (\w+)  "):
        if found := re.findall(pattern, bill):
            number, unit = found[-1]
            return float(number.replace(",", "")) * units[unit]
    raise AssertionError(bill)


def test_the_configuration_is_deepseek_v3_s_as_transformers_knows_it():
    code = (
        "import json; from transformers import DeepseekV3Config\n"
        "print(json.dumps(DeepseekV3Config().to_dict()))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    theirs = json.loads(done.stdout)
    ours = {name: V3[name] for name in V3.keys() & theirs.keys()}
    differing = {name for name, value in ours.items() if value != theirs[name]}
    # The published file allows 163,840 = 40 x 4,096 tokens by YaRN; the default is without.
    assert differing == {"architectures", "max_position_embeddings", "transformers_version"}
    assert (
        V3["rope_scaling"]["factor"] * V3["rope_scaling"]["original_max_position_embeddings"]
        == (V3["max_position_embeddings"])
    )
    assert V3["quantization_config"]["weight_block_size"] == [128, 128]


@pytest.mark.parametrize(
    "count, published",
    [
        # DeepSeek-V3's README_WEIGHTS.md: 671B; 36.6B active, the head's 0.9B among them; MTP 11.5B
        # of its own, "14B of the Multi-Token Prediction (MTP) Module weights" with its copies.
        ("total", 671e9),
        ("multiplied", 36.6e9),
        ("mtp_own", 11.5e9),
        ("active", 37e9),
    ],
)
def test_deepseek_v3_has_its_published_parameters(count, published):
    assert getattr(ModelCounts(V3), count) == pytest.approx(published, rel=0.02)


def test_the_released_685b_are_671b_and_the_mtp_layers_with_their_copies():
    counts = ModelCounts(V3)
    assert counts.total == 671_026_419_200
    assert round(counts.mtp / 1e9) == 13 and round((counts.total + counts.mtp) / 1e9) == 684
    # Two copies: of the embedding and of the head.
    assert counts.mtp - counts.mtp_own == 2 * 129_280 * 7168


@pytest.mark.parametrize("hf", [V3, LLAMA_405B, {**QWEN_72B, "tie_word_embeddings": True}])
def test_counts_are_those_of_the_weight_table(hf):
    main_model = weights.hf_tensors(hf, with_mtp=False)
    assert ModelCounts(hf).total == sum(math.prod(shape) for shape, _ in main_model.values())
    every = weights.hf_tensors(hf)
    assert ModelCounts(hf).total + ModelCounts(hf).mtp == sum(
        math.prod(shape) for shape, _ in every.values()
    )


@pytest.mark.parametrize(
    "hf, gflop", [(V3, 250), (LLAMA_405B, 2448)], ids=["DeepSeek-V3", "Llama-3.1-405B"]
)
def test_training_flops_per_token_are_the_published_ones(hf, gflop):
    # arXiv 2505.09343, table 2: training, 4,096 tokens.
    assert 3 * forward_flops(hf, 4096) / 1e9 == pytest.approx(gflop, rel=0.015)


@pytest.mark.parametrize(
    "hf, num_bytes", [(V3, 70_272), (QWEN_72B, 327_680), (LLAMA_405B, 516_096)]
)
def test_the_cache_of_a_token_is_the_published_one(hf, num_bytes):
    # arXiv 2505.09343, table 1: bf16.
    assert cache_bytes_per_token(hf) == num_bytes


def test_every_rank_s_count_is_its_layout_s():
    job = real_job(tensor=2, context=4, expert=4)
    counts = RankCounts(job)
    for rank in (0, 3, 15):
        expected = 0
        for chunk in job.stages[rank]:
            at = {"tp": (0, 2), "ep": (0, 4), "etp": (0, 1)}
            entries = weights.layout(V3, weights.Shard(**{**vars(chunk), **at}))
            expected += sum(math.prod(entry.shape) for entry in entries.values())
        found = counts.of_rank(rank)
        assert found.parameters + found.buffers == expected, rank


@pytest.mark.parametrize(
    "pipeline, virtual, microbatches", [(4, 1, 9), (4, 1, 2), (4, 2, 9), (8, 3, 8)]
)
def test_micro_batches_in_flight_are_those_of_megatron_s_schedule(pipeline, virtual, microbatches):
    from megatron.core.pipeline_parallel.schedules import (
        get_pp_rank_microbatches,
        get_schedule_table,
    )

    for rank in range(pipeline):
        group = SimpleNamespace(size=lambda: pipeline, rank=lambda rank=rank: rank)
        place = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None
        )
        total, _, warmup, _ = get_pp_rank_microbatches(
            microbatches, virtual, pipeline, p2p_communicator=place
        )
        held = in_flight(rank, pipeline, virtual, microbatches)
        forwards = get_schedule_table(microbatches, virtual, pipeline)[: min(total, warmup + 1)]
        chunks = [chunk for _, chunk in forwards]
        assert held == [chunks.count(chunk) for chunk in range(virtual)], rank


def test_constants_taken_from_the_kernels_are_theirs():
    from r1_kernels import linear_head

    assert linear_head.GPU_CHUNK_TOKENS == GPU_CHUNK_TOKENS
    assert linear_head.GPU_CHUNK_ELEMENTS == GPU_CHUNK_ELEMENTS


def test_recomputing_a_module_frees_its_tensors_and_full_leaves_the_input():
    job = real_job()
    layer = layer_activations(job, sparse=True)
    tokens = 33_280 // 2 // 4

    def kept(recompute, *modules):
        changed = job.with_parallel(recompute=recompute, recompute_modules=list(modules))
        return layer.kept(changed.parallel)

    assert kept("full") == tokens * 7168 * 2
    # Queries and keys of 192 and values of 128, 32 heads of each on a rank, of all its tokens.
    assert kept("none") - kept("selective", "mla_up_proj") == 16_640 * 32 * 512 * 2
    assert kept("selective", "moe") == kept("selective", "moe", "moe_act", "shared_experts")
    assert kept("none") > kept("selective", "moe_act") > kept("selective", "moe") > kept("full")


def test_what_a_rank_sends_by_hand():
    sent = groups(real_job(), 3)
    # 512 samples of 8,704 tokens over 16 replicas in 16 micro-batches, over context 2 and tensor 4.
    split = 32 * 8704 / 16 / 8
    assert sent["pipeline"].microbatch == pytest.approx(split * 7168 * 2 * 2 * 2)
    assert sent["expert"].forward == pytest.approx(4 * 2 * 8 * 1.2 * split * 7168 * 2 * 7 / 8)
    assert sent["data"].size == 32 and sent["data"].microbatch == 0


def test_a_rollout_s_routing_is_58_layers_of_8_experts_a_token():
    sent = samples_section(real_job())
    assert sent["routed experts"].value == 8192 * 8704 * 58 * 8
    assert sent["ids, log-probabilities"].value == 8192 * (8704 + 8192) * 4


def test_virtual_stages_round_micro_batches_up_and_pay_for_it():
    # 278,528 tokens of a replica: 16 micro-batches fill a round of 16 stages, 17 begin another.
    sixteen, seventeen = real_job(), real_job(tokens_per_microbatch=16_384)
    assert (sixteen.num_microbatches, sixteen.slots) == (16, 16)
    assert (seventeen.num_microbatches, seventeen.slots) == (17, 32)
    assert Bill(sixteen).times.bubble(16, 16) == pytest.approx(15 / 47)
    assert Bill(seventeen).step.number > Bill(sixteen).step.number
    plain = Bill(real_job(virtual_pipeline=1, pipeline_layout="Et*4|(t*4|)*14tmL"))
    assert plain.times.bubble(16, plain.job.slots) == pytest.approx(15 / 31)


def test_the_real_recipe_fits_and_leaves_room_for_65536_tokens():
    bill = Bill(real_job())
    assert bill.job.data == 16 and bill.problems() == []
    config = configuration.load(RECIPE, {"rollout.max_response_tokens": 65_536})
    assert Bill(Job(V3, config, 2048, HARDWARE["H800"])).problems() == []


def test_a_layout_that_cannot_work_names_the_number_and_those_that_can(capsys):
    assert main([str(RECIPE), "--gpus", "2048", "--parallel.recompute", "none"]) == 1
    output = capsys.readouterr().out
    assert (
        "does not fit: pipeline rank" in output
        and "of it activations: set parallel.recom" in output
    )
    assert "--parallel.recompute full" in output
    job = real_job(recompute="none")
    for found in nearest(job, 3):
        assert Bill(job.with_parallel(**found.changes)).problems() == []


@pytest.mark.parametrize(
    "options, status, message",
    [
        (["--parallel.tensor", "6"], 1, "2048 trainer ranks cannot be divided into groups of 192"),
        (["--parallel.expert", "3"], 1, "parallel.expert=3 does not divide|groups of"),
        (["--parallel.pipeline_layout", "Et"], 1, "pipeline_layout='Et'"),
        (["--rollout.engines", "2048", *ONE_GPU], 1, "1.19 TiB short, for KV cache beside"),
        (["--rollout.engines", "3", *ONE_GPU], 1, "does not divide 2,048 GPUs; choose 2 or 4"),
        (["--rollout.tensor", "3"], 1, "rollout.tensor=3 does not divide num_attention_heads=128"),
        (["--rollout.pipeline", "2"], 1, "mtp with rollout.pipeline=2: a drafter behind stages"),
        (
            ["--rl.minibatches", "1024"],
            1,
            "8 samples of an optimizer step cannot be spread over 16",
        ),
        (["--gpus", "-1"], 2, "--gpus: -1"),
        (["--memory-gib", "0"], 2, "--memory-gib: 0.0 is not a finite number above 0"),
        (["--rollout.max_response_tokens", "67584"], 2, "or raise rollout.max_model_len"),
        (["--response-tokens", "99999"], 2, "above rollout.max_response_tokens=32768"),
        (["--parallel.tensr", "2"], 2, "did you mean parallel.tensor"),
        (["--gpuss", "8"], 2, "unknown option --gpuss; did you mean --gpus?"),
        (["--memory-gib", "nan"], 2, "--memory-gib: nan is not a finite number"),
        (["--prompt-tokens", "2049"], 2, "there is room for 2048; lower it, or raise rollout.max"),
        (
            ["--host-memory-gib", "1", "--push.memory_gib", "2"],
            1,
            "being written: set checkpoint.asynchronous to false",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(capsys, monkeypatch, options, status, message):
    monkeypatch.setattr("tools.plan.command.nearest", lambda job: [])
    assert main([str(RECIPE), "--gpus", "2048", *options]) == status
    captured = capsys.readouterr()
    assert any(part in captured.out + captured.err for part in message.split("|"))


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("r1_zero", ["--gpus", "512"]),
        ("r1_zero", ["--gpus", "1024"]),
        ("r1_zero", ["--gpus", "2047"]),
        ("r1_zero", ["--gpus", "100000"]),
        ("r1_zero", ["--gpus", "64"]),
        ("r1_zero", ["--rollout.engines", "32"]),
        ("r1_zero", ["--rollout-gpus", "1000"]),
        ("cold_start_sampling", ["--gpus", "2048"]),
        ("helpful_pairs", ["--gpus", "2048"]),
        ("rejection_sampling", ["--gpus", "2000"]),
        ("safety_labels", ["--gpus", "7"]),
        ("../distill/qwen2.5-32b_rl", ["--gpus", "2048"]),
        ("../distill/qwen2.5-math-7b_on_policy", ["--gpus", "2048"]),
        ("../distill/qwen2.5-math-7b_on_policy", ["--gpus", "7"]),
    ],
)
def test_engines_that_do_not_make_up_the_gpus_are_told_how_many_would(capsys, recipe, options):
    path = str(RECIPE.parent / f"{recipe}.yaml")
    assert main([path, *options]) == 1
    advice = capsys.readouterr().out.rpartition("; set ")[2].strip()
    for way in advice.partition(", or lower")[0].split(" or "):
        main([path, *options, *way.split()])
        assert "rollout.engines=" not in capsys.readouterr().out


def test_too_few_samples_are_told_what_gives_more_of_them_and_how_many_gpus_they_feed(capsys):
    few = ["--rl.questions_per_rollout", "1", "--rl.group_size", "8", "--rl.minibatches", "1"]
    assert main([str(RECIPE), *few]) == 1
    output = capsys.readouterr().out
    assert "8 samples of an optimizer step cannot be spread over 16 data-parallel ranks" in output
    assert "raise rl.questions_per_rollout, raise" in output and "use at most 1,024 GPUs" in output


def test_engines_are_told_the_nearest_numbers_on_both_sides(capsys):
    assert main([str(RECIPE), "--gpus", "2047"]) == 1
    output = capsys.readouterr().out
    assert "rollout.engines=16 of 128 GPUs (rollout.tensor=8 x rollout.data=16)" in output
    assert "are 2,048 GPUs, not 2,047" in output
    assert "--gpus 1920 --rollout.engines 15 or --gpus 2048 --rollout.engines 16" in output


@pytest.mark.parametrize(
    ("recipe", "options", "sizes"),
    [
        ("distill/llama-3.1-8b", ["--gpus", "7"], ["--gpus 4", "--gpus 8"]),
        ("distill/llama-3.1-8b", ["--gpus", "100000"], ["--gpus 256"]),
        ("deepseek_r1/cold_start_sft", ["--gpus", "8"], ["--gpus 512"]),
        (
            "deepseek_r1/r1_zero",
            ["--gpus", "128", "--rollout.engines", "1"],
            ["--gpus 1024 --rollout.engines 8"],  # the 64K part does not fit on 512
        ),
    ],
)
def test_where_no_layout_fits_the_numbers_of_gpus_that_do_are_named(capsys, recipe, options, sizes):
    path = str(ROOT / f"examples/{recipe}.yaml")
    assert main([path, *options]) == 1
    named = capsys.readouterr().out.rpartition("the recipe's layout fits with ")[2].strip()
    assert named.split(" or ") == sizes
    for size in sizes:
        assert main([path, *options, *size.split()]) == 0, size


@pytest.mark.parametrize("recipe", ["r1_zero", "all_scenarios_rl", "cold_start_sft", "helpful_rm"])
def test_every_number_of_the_json_file_has_its_formula(tmp_path, recipe):
    file = tmp_path / "plan.json"
    assert main([str(RECIPE.parent / f"{recipe}.yaml"), "--json", str(file)]) == 0
    sections = json.loads(file.read_text())["sections"]
    bare = [name for rows in sections.values() for name, row in rows.items() if not row["formula"]]
    assert bare == []


@pytest.mark.parametrize("recipe", ["r1_zero", "cold_start_sampling"])
def test_a_bill_without_room_has_no_impossible_numbers(tmp_path, capsys, recipe):
    file = tmp_path / "plan.json"
    path = str(RECIPE.parent / f"{recipe}.yaml")
    assert main([path, "--memory-gib", "20", "--json", str(file)]) == 1
    output = capsys.readouterr().out
    assert "GiB short" in output
    words = output.split()
    assert not {"inf", "nan", "nan%"} & set(words)
    assert not [word for word in words if word.startswith("-") and word[1:2].isdigit()]
    plan = json.loads(file.read_text(), parse_constant=pytest.fail)
    for name in ("rollout", "step"):
        missing = plan["sections"]["time"][name]
        assert missing["value"] is None and "no room for a sequence's cache" in missing["formula"]
    assert plan["sections"]["engine memory of a GPU"]["sequences at once"]["value"] == 0


def test_room_for_less_than_one_sequence_is_no_room():
    config = configuration.load(RECIPE, {"rollout.gpu_memory": None})
    job = Job(V3, config, 128, HARDWARE["H800"], verb="sample")
    full = Engines(job)
    one_sequence = full.token_bytes * (512 + 8192 / 2)
    for part, seconds in ((0.9, False), (1.1, True)):
        engines = Engines(job, resident=round(full.cache - part * one_sequence))
        assert (engines.seconds()[0] is not None) == bool(engines.at_once) == seconds, part


def test_one_of_a_thing_is_not_named_in_the_plural(capsys):
    assert main(LAPTOP) == 0
    output = capsys.readouterr().out
    assert "1 engine of 1 GPU" in output and "V = 1 chunk, P = 1 stage" in output
    nouns = "GPUs|ranks|chunks|stages|layers|slots|tokens|samples|engines|micro-batches"
    assert not re.findall(rf"(?<![\d.,])1 (?:{nouns})\b", output)


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.004, "14.4 s"), (0.25, "15 minutes"), (7.25, "7.2 hours"), (1053, "1,053 hours")],
)
def test_hours_of_a_run_have_a_unit_that_leaves_digits(hours, text):
    assert str(Quantity(hours, "hours", "")) == text


def test_several_recipes_have_a_bill_each_and_a_verdict_at_the_end(capsys):
    recipes = [RECIPE.parent / f"{n}.yaml" for n in ("cold_start_sampling", "pipeline", "r1_zero")]
    assert main([*map(str, recipes), "--gpus", "128"]) == 2
    captured = capsys.readouterr()
    assert [line[3:-3] for line in captured.out.splitlines() if line.startswith("== ")] == [
        str(path) for path in recipes
    ]
    verdicts = [line.rsplit(maxsplit=1) for line in captured.out.splitlines()[-3:]]
    assert verdicts == [
        ["fits", str(recipes[0])],
        ["refused", str(recipes[1])],
        ["does not fit", str(recipes[2])],
    ]
    assert "pipeline.yaml is a pipeline; plan the recipes of its stages" in captured.err
    assert main([str(recipes[0]), str(recipes[2]), "--gpus", "128"]) == 1
    assert main([str(recipes[0])] * 2) == 0
    capsys.readouterr()
    assert main([*map(str, recipes), "--json", "plan.json"]) == 2
    assert "--json: one recipe at a time, 3 are named" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("deepseek_r1", [], "is a folder; name a recipe in it"),
        ("deepseek_r1/cold_start_sft.yaml", ["--rollout-gpus", "8"], "sft has no engines; leave"),
        ("deepseek_r1/helpful_pairs.yaml", ["--rollout-gpus", "8"], "beside its engines; use --g"),
        ("distill/qwen2.5-math-7b_on_policy.yaml", ["--teacher.path", "gone"], "teacher.path must"),
        ("laptop/eval.yaml", [], "eval.yaml is for eval (eval.benchmarks, and neither"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(capsys, recipe, options, message):
    assert main([str(ROOT / "examples" / recipe), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_in_place_of_the_json_file_is_refused(tmp_path, capsys):
    assert main([*LAPTOP, "--json", str(tmp_path)]) == 2
    assert f"--json: {tmp_path} cannot be written: Is a directory" in capsys.readouterr().err


def test_a_teacher_that_cannot_be_counted_is_planned_without(tmp_path, capsys):
    teacher, file = tmp_path / "teacher", tmp_path / "plan.json"
    teacher.mkdir()
    config = {"architectures": ["OtherForCausalLM"], "max_position_embeddings": 32_768}
    (teacher / "config.json").write_text(json.dumps(config))
    recipe = str(ROOT / "examples/distill/qwen2.5-math-7b_on_policy.yaml")
    assert main([recipe, "--teacher.path", str(teacher), "--json", str(file)]) == 0
    weights_of = json.loads(file.read_text())["sections"]["engine memory of a teacher's GPU"]
    assert weights_of["weights"]["value"] is None
    assert "OtherForCausalLM" in weights_of["weights"]["formula"]


@pytest.mark.parametrize("gpus", [1, 4, 7, 8, 12])
def test_an_assumed_engine_uses_all_its_gpus_and_divides_the_heads(gpus):
    hf = read_hf_config(ROOT / "examples/laptop/model")
    config = configuration.load(ROOT / "examples/laptop/r1_zero.yaml")
    layout = engine_layout(Job(hf, config, gpus, HARDWARE["H800"]))
    assert hf["num_attention_heads"] == 2 and layout.tensor in (1, 2)
    assert layout.tensor * layout.data == gpus
    assert layout.tensor == (2 if gpus % 2 == 0 else 1)


def test_advice_is_not_what_the_recipe_does_or_its_model_cannot(capsys):
    dense = str(ROOT / "examples/distill/qwen2.5-32b_rl.yaml")
    assert main([dense, "--memory-gib", "20"]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "recompute full" in output and "of it activations: raise parallel.context" in output
    assert "parallel.expert" not in output and "raise rollout.tensor=8 (more GPUs" in output
    assert main([*LAPTOP, "--memory-gib", "6.1"]) == 1
    assert "1.04 GiB of it activations: set parallel.recompute to full" in capsys.readouterr().out
    assert main([*LAPTOP, "--memory-gib", "5"]) == 1
    assert "of it reserved: use GPUs with more memory" in capsys.readouterr().out


def test_json_holds_every_number_with_its_formula(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main([str(RECIPE), "--json", str(file)]) == 0
    capsys.readouterr()
    plan = json.loads(file.read_text())
    total = plan["sections"]["parameters"]["total"]
    assert total["value"] == 671_026_419_200 and "weight table" in total["formula"]
    assert len(plan["ranks"]) == 16
    for section in plan["sections"].values():
        for name, quantity in section.items():
            assert quantity.keys() == {"value", "unit", "formula"}, name
    phases = [rank[phase] for rank in plan["ranks"] for phase in ("training", "scoring")]
    assert max(sum(phase.values()) for phase in phases) == Bill(real_job()).worst.peak


def test_more_ranks_never_need_more_of_one_gpu():
    peaks = {}
    for expert in (4, 8, 16):
        peaks[expert] = max(rank.resident for rank in rank_memory(real_job(expert=expert)))
    assert peaks[4] > peaks[8] > peaks[16]


@pytest.mark.parametrize("chunks", [2, 4, 8, 16, 32])
def test_suggested_layouts_hold_every_layer(chunks):
    layout = even_layout(61, 1, chunks)
    stages = weights.pipeline_stages(61, chunks, num_mtp=1, layout=layout)
    PipelineParallelLayerLayout(layout, chunks).validate_layer_layout(61, 1)
    lengths = [len(stage.layers) for rank in stages for stage in rank]
    assert sum(lengths) == 61 and max(lengths[:-1]) - min(lengths[:-1]) <= 1
    assert 1 <= lengths[-1] <= max(lengths)


def test_every_recipe_of_a_dense_or_small_model_can_be_planned(capsys):
    assert main(LAPTOP) == 0
    assert "pipeline 1 x 1" in capsys.readouterr().out


def test_bf16_moments_take_two_bytes_each(capsys):
    bills = []
    for moments in ("float32", "bfloat16"):
        assert main([str(RECIPE), "--optimizer.moments", moments]) == 0
        bills.append(capsys.readouterr().out)
    assert "12 B x (dense" in bills[0] and "8 B x (dense" in bills[1]


def test_planning_needs_no_torch():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tools.plan.command import main\n"
        f"main([{str(RECIPE)!r}])\n"
        "assert not {'torch', 'megatron'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_adapters_alone_have_gradients_an_optimizer_and_a_reference():
    whole, lora = (rank_memory(planned(**{"model.lora": x}))[1] for x in (None, {"rank": 16}))
    job = planned(**{"model.lora": {"rank": 16}})
    layers = [layer for chunk in job.stages[1] for layer in chunk.layers]
    held = sum(
        math.prod(entry.shape)
        for layer in layers
        for entry in layout_of(job.adapters, rank_shard(job, layer)).values()
    )
    assert lora.counts.trained == held > 0
    assert lora.counts.frozen == whole.counts.parameters
    assert lora.training["gradients"] < 0.02 * whole.training["gradients"]
    assert lora.training["optimizer"] < 0.02 * whole.training["optimizer"]
    buffers = 4 * lora.counts.buffers  # the routers' bias
    assert lora.host["reference"] == held * job.parameter_bytes + buffers
    assert lora.host["checkpoint being written"] < 0.02 * whole.host["checkpoint being written"]
    assert lora.training["parameters"] > whole.training["parameters"]


def rank_shard(job: Job, layer: int) -> weights.Shard:
    parallel = job.parallel
    sizes = {"tp": parallel.tensor, "ep": parallel.expert, "etp": parallel.expert_tensor}
    return weights.Shard((layer,), **{axis: (0, size) for axis, size in sizes.items()})
