"""Seconds of a decoding pass.

vLLM decodes with a rank's share of DeepSeek-V3: its widths, the heads of one of 8 tensor ranks, and
so many experts that all are read. Random weights, CUDA graphs. The number of layers and that of
experts differ between engines, so that the time of a pass is split into that of its layers (the
reading of weights, and the rest) and what it takes besides them (scheduling, sampling, outputs):

    seconds = pass_seconds + layers x decode_latency_per_layer
              + bytes / (bandwidth x bandwidth_efficiency)

An engine is started where there is as much time left as the last one took; the numbers need three.
A process for each; where there is no GPU sizes are a miniature's, and times mean nothing."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from gpu_miniatures import (
    device_kind,
    hardware_name,
    recipe_miniature,
    widen_config,
    write_calibration,
)
from processes import error_in, output_of

from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.hf_config_names import published_names
from megatron_r1.models.memory import BYTES
from megatron_r1.plan.counts import ModelCounts
from megatron_r1.plan.hardware import HARDWARE, Hardware
from tools.bench.host import ROOT


class Variant(NamedTuple):
    """An engine: its decoder layers, of which the first is dense, and experts of the others."""

    layers: int
    experts: int


FEW, DEEP, WIDE = VARIANTS = (Variant(2, 8), Variant(6, 8), Variant(6, 40))
"""Two depths, and two sizes of layers. On a GPU of 80 GB the largest has 21 GB of weights."""
TENSOR = 8
"""Tensor ranks of the recipe's engines, of whose heads this is one's."""
SEQUENCES, PROMPT_TOKENS = 32, 16
"""Of the recipe's batch on 8 GPUs; short prompts, so that caches are small next to weights."""
TOKENS = {"gpu": 128, "null-gpu": 8, "cpu": 8}
"""Decoded by each sequence, and twice as many in a second run, by where it runs."""


def model(variant: Variant, small_hf_config: HFConfig) -> HFConfig:
    """Return the config.json of an engine's model.

    Args:
        variant: its layers and experts.
        small_hf_config: that of a miniature, whose sizes it has where there is no GPU."""
    sizes = {"num_hidden_layers": variant.layers, "n_routed_experts": variant.experts}
    if device_kind() != "gpu":
        return widen_config(small_hf_config, small_hf_config, **sizes)
    hf_config = read_hf_config(str(ROOT / "examples" / "deepseek_r1" / "model"))
    heads = hf_config["num_attention_heads"] // TENSOR
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    return widen_config(hf_config, small_hf_config, **sizes)


def layer_bytes(hf_config: HFConfig) -> int:
    """Return the bytes of the weights of a layer with experts, all of which are read."""
    deeper_hf_config = {**hf_config, "num_hidden_layers": hf_config["num_hidden_layers"] + 1}
    return (ModelCounts(deeper_hf_config).num_total - ModelCounts(hf_config).num_total) * BYTES[
        "bfloat16"
    ]


def pass_bytes(hf_config: HFConfig) -> int:
    """Return the bytes of the weights that a pass reads: all but the embedding, of which it reads
    a row for each sequence."""
    embedding = hf_config["vocab_size"] * hf_config["hidden_size"]
    return (ModelCounts(hf_config).num_total - embedding) * BYTES["bfloat16"]


def time_engine(folder: Path, tokens: int) -> float:
    """Return seconds of a decoding pass of `SEQUENCES` by an engine with random weights."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"gpu_memory_utilization": 0.7 if device_kind() == "gpu" else 0.1}
    engine = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=PROMPT_TOKENS + 2 * tokens + 16,
        max_num_seqs=SEQUENCES,
        enable_prefix_caching=False,
        enforce_eager=device_kind() != "gpu",
        cudagraph_capture_sizes=[SEQUENCES],
        **options,
    )
    prompts = [
        {"prompt_token_ids": [3 + (number + position) % 7 for position in range(PROMPT_TOKENS)]}
        for number in range(SEQUENCES)
    ]

    def run(count: int) -> float:
        settings = SamplingParams(
            temperature=1.0, max_tokens=count, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        engine.generate(prompts, settings, use_tqdm=False)
        return time.perf_counter() - start

    run(tokens)  # warms up
    return median((run(2 * tokens) - run(tokens)) / tokens for _ in range(3))


def evaluate(
    seconds: Mapping[Variant, float],
    num_bytes: Mapping[Variant, int],
    few_bytes: int,
    hardware: Hardware,
) -> dict[str, float]:
    """The three numbers. By engine: seconds of a pass, bytes of a layer with experts; few_bytes:
    what a pass of `FEW` reads."""
    layer = (seconds[DEEP] - seconds[FEW]) / (DEEP.layers - FEW.layers)
    wide_layer = (seconds[WIDE] - seconds[DEEP]) / (WIDE.layers - 1)
    assert layer > 0 and wide_layer > 0, "a pass does not take longer with more layers, or experts"
    rate = (num_bytes[WIDE] - num_bytes[DEEP]) / wide_layer
    latency = layer - num_bytes[DEEP] / rate
    efficiency = rate / hardware.memory_bandwidth
    assert 0 < efficiency <= 1, f"weights are read at {efficiency:.2f} of the bandwidth's peak"
    assert latency > 0, f"a layer takes {latency:.3g} s besides its weights"
    other_seconds = seconds[FEW] - FEW.layers * latency - few_bytes / rate
    assert other_seconds > 0, f"a pass takes {other_seconds:.3g} s besides its layers"
    return {
        "decode_latency_per_layer": latency,
        "bandwidth_efficiency": efficiency,
        "pass_seconds": other_seconds,
    }


def check(folder: Path, record_figures, seconds_left) -> None:
    """Time the engines for which there is time, and write what follows of all three."""
    name = hardware_name()
    small = recipe_miniature(folder, max_ranks=1).hf_config
    seconds, num_bytes, last = {}, {}, 0.0
    for variant in VARIANTS:
        if seconds_left() < last:
            return
        start = time.monotonic()
        hf_config = model(variant, small)
        engine_folder = folder / f"{variant.layers}x{variant.experts}"
        engine_folder.mkdir(parents=True, exist_ok=True)
        (engine_folder / "config.json").write_text(json.dumps(published_names(hf_config)))
        seconds[variant], num_bytes[variant] = _timed_apart(engine_folder), layer_bytes(hf_config)
        ms = 1e3 * seconds[variant]
        record_figures({f"ms of a pass, {variant.layers} x {variant.experts}": ms})
        last = time.monotonic() - start
    if device_kind() == "gpu":
        few_bytes = pass_bytes(model(FEW, small))
        values = evaluate(seconds, num_bytes, few_bytes, HARDWARE[name])
        record_figures(write_calibration(folder, name, values))


def _timed_apart(folder: Path) -> float:
    """What `time_engine` returns in a process of its own, which frees the GPU."""
    output = output_of([__file__, str(folder)], f"the engine {folder.name}")
    seconds_lines = [line for line in output.splitlines() if line.startswith(SECONDS)]
    assert seconds_lines, error_in(output)
    return float(seconds_lines[-1].removeprefix(SECONDS))


SECONDS = "seconds of a pass: "

if __name__ == "__main__":
    print(f"\n{SECONDS}{time_engine(Path(sys.argv[1]), TOKENS[device_kind()])}", flush=True)
