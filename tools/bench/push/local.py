"""The weight push, on this machine and at the real size.

From a real trainer rank to a real vLLM engine here through shared memory. Measured for every push:
the transfer (from the trainer's parameters to the engine's receive buffer, with checksums on both
sides, while the engine could generate) and the pause (checks, and vLLM's own post-processing, which
on a CPU packs every matrix for oneDNN). Before and after each push, one core copies as many bytes
in memory. Afterwards the alternative is measured: the trainer exports a Hugging Face folder and the
engine reloads it.

With --simulate: the order of pushes over NCCL at their real size, executed by a model of stream
queues. With --control-path: 256 processes that meet, push to each other, and die in the middle.
With --gloo: rates of gloo between processes here (`gloo_rates`)."""

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.multiprocessing

from megatron_r1.config import Config
from megatron_r1.controller.push.engine_links import EngineLinks
from megatron_r1.controller.push.pusher import WeightPusher
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.models.weights import hf_tensors
from megatron_r1.push.matching import EngineLayout
from megatron_r1.trainer.operations import CheckpointOperations
from tools.bench import host
from tools.bench.push.control import control_path
from tools.bench.push.gloo_rates import gloo_rates
from tools.bench.push.scale import simulate
from tools.bench.small_models import qwen2

WARM_UP = 2
"""Pushes before measuring: each of the two buffers is filled once."""


def model(hidden: int, layers: int, dtype: str) -> dict[str, Any]:
    """Return the config.json of a Qwen2 with heads of 64 and a quarter as many key-value heads.

    Args:
        hidden: the hidden size.
        layers: the number of layers.
        dtype: the dtype of the weights."""
    return qwen2(
        hidden,
        layers,
        heads=hidden // 64,
        vocab_size=32_000,
        intermediate_size=3 * hidden,
        num_key_value_heads=max(1, hidden // 256),
        torch_dtype=dtype,
    )


async def measure(
    folder: Path, shape: dict[str, Any], plain_matrices: bool, repeats: int, num_reloads: int
) -> dict[str, Any]:
    """Return medians of seconds, and their ratios.

    Args:
        folder: an empty folder for the run.
        shape: the model's config.json.
        plain_matrices: whether the engine keeps matrices unpacked.
        repeats: pushes to measure.
        num_reloads: exports and reloads to measure."""
    os.environ["OMP_WAIT_POLICY"] = "passive"
    dtype = shape["torch_dtype"]
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(shape))
    model_settings = {"path": str(folder / "model"), "init": "random", "dtype": dtype}
    config = Config.model_validate({"model": model_settings, "rollout": {"dtype": dtype}})
    trainer = TrainerClient(config, folder / "logs")
    trainer.launch()
    settings: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 4}
    settings["plain_matrices"] = plain_matrices
    try:
        await trainer.connect()
        await trainer.call(CheckpointOperations.export, folder=str(folder / "export"))
        async with EngineFleet(1, folder / "logs", dtype=dtype, **settings) as fleet:
            await fleet.start(folder / "export", policy_version=-1)
            return await _measure_pushes(
                trainer, fleet, config, shape, folder, repeats, num_reloads
            )
    finally:
        await trainer.close()


async def _measure_pushes(
    trainer: Any, fleet: Any, config: Any, shape: Any, folder: Path, repeats: int, num_reloads: int
) -> dict[str, Any]:
    shapes = hf_tensors(shape, with_mtp=False)
    tensors = [(name, size) for name, (size, _) in shapes.items()]
    width = 4 if config.rollout.dtype == "float32" else 2
    num_bytes = width * sum(torch.Size(size).numel() for _, size in tensors)
    links = EngineLinks(trainer, config.push, tensors, EngineLayout())
    pusher = WeightPusher(fleet, links)
    buffers = [torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2)]
    pushes, reloads = [], []
    cores_worth = [host.cores_worth()]
    for version in range(WARM_UP + repeats):
        before = _copy_seconds(*buffers)
        async with pusher.updating_weights():
            if not version:
                await pusher.open()
            start = time.perf_counter()
            seconds = await pusher.push(version)
            seconds["push"] = time.perf_counter() - start
        seconds["copy"] = (before + _copy_seconds(*buffers)) / 2
        pushes.append(seconds)
    cores_worth.append(host.cores_worth())
    # Not alternating with pushes: the disk stays busy for a while after an export.
    for _ in range(1 + num_reloads):
        reloads.append(await _export_and_reload(trainer, fleet, folder / "export"))
    pushes, reloads = pushes[WARM_UP:], reloads[1:]
    medians = {
        name: median(r[name] for r in rounds) for rounds in (pushes, reloads) for name in rounds[0]
    }
    transfer_quartiles, push_quartiles = (
        quantiles((r["copy"] / r[name] for r in pushes), n=4) for name in ("push/transfer", "push")
    )
    return {
        "model": f"Qwen2 shape, {num_bytes / 2e9 * 2 / width:.3g}B parameters in "
        f"{config.rollout.dtype}, {num_bytes / 1e9:.3g} GB",
        "memory copy, one core, GB/s": num_bytes / medians["copy"] / 1e9,
        "transfer, seconds": medians["push/transfer"],
        "transfer, GB/s": num_bytes / medians["push/transfer"] / 1e9,
        "transfer over memory copy": transfer_quartiles[1],
        "transfer over memory copy, quartiles": transfer_quartiles[::2],
        "pause, seconds": medians["push/pause"],
        "push, seconds": medians["push"],
        "push over memory copy": push_quartiles[1],
        "push over memory copy, quartiles": push_quartiles[::2],
        "export, seconds": medians["export"],
        "reload, seconds": medians["reload"],
        "all cores are worth, before and after the pushes": cores_worth,
        "export and reload over push": (medians["export"] + medians["reload"]) / medians["push"],
    }


def _copy_seconds(source: torch.Tensor, target: torch.Tensor) -> float:
    """Return the seconds in which one core copies, between pages that are already mapped."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    target.copy_(source)
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    return seconds


async def _export_and_reload(trainer: Any, fleet: Any, folder: Path) -> dict[str, float]:
    """Export a folder to disk, synced, and let vLLM's own reload_weights read it."""
    start = time.perf_counter()
    await trainer.call(CheckpointOperations.export, folder=str(folder))
    exported = time.perf_counter()
    client = fleet.engines[0].client
    await client.pause()
    rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    await client.request("POST", "/collective_rpc", rpc)
    await client.request("POST", "/reset_prefix_cache")
    await client.resume()
    return {"export": exported - start, "reload": time.perf_counter() - exported}


ENGINES = {
    "bf16-plain": ("bfloat16", True),
    "bf16": ("bfloat16", False),
    "fp32": ("float32", False),
}
"""The dtype of each variant, and whether matrices stay plain; else vLLM packs them for oneDNN."""


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--simulate", action="store_true", help="only the simulation at scale")
    options.add_argument("--control-path", action="store_true", help="only 256 processes")
    options.add_argument("--gloo", action="store_true", help="only gloo's rates here")
    options.add_argument("--repeats", type=int, default=30, help="pushes")
    options.add_argument("--reloads", type=int, default=5, help="exports and reloads")
    options.add_argument("--hidden", type=int, default=2048, help="of the model pushed here")
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return the measurements on this machine, or what an option selects."""
    if args.simulate:
        return simulate()
    if args.control_path:
        return control_path()
    if args.gloo:
        rates = {"two": gloo_rates(2), "four": gloo_rates(4)}
        _print_values({f"{n}: {k}": v for n, figures in rates.items() for k, v in figures.items()})
        return rates
    measurements = {}
    for name in args.engines:
        dtype, plain_matrices = ENGINES[name]
        shape = model(args.hidden, args.layers, dtype)
        with tempfile.TemporaryDirectory() as folder:
            measurement = measure(Path(folder), shape, plain_matrices, args.repeats, args.reloads)
            measurements[name] = asyncio.run(measurement)
        rounds = f"{args.repeats} pushes and {args.reloads} reloads, without the first"
        print(f"here, {name}: medians of {rounds}", flush=True)
        _print_values(measurements[name])
    return {"here": measurements}


def _print_values(measurements: dict[str, Any]) -> None:
    for key, value in measurements.items():
        values = value if isinstance(value, list) else [value]
        items = (item if isinstance(item, str) else f"{item:.4g}" for item in values)
        print(f"    {key:48} {' to '.join(items)}")
