"""Starts vLLM engines on null GPUs, pushes other weights to them, has them sleep while this process
takes a GPU's memory, and pushes those that they were started on:
`engine_push.py FOLDER TRANSPORT ENGINES [fp8]`. With `fp8` a DeepSeek in FP8 blocks, whose experts
are DeepGEMM's, too.

Prints a line of JSON: of each engine vLLM's checksums of the tensors in use before, between and
after, and the GiB that the first GPU has left while its engine is awake, asleep, and awake again.
One engine is on the trainer's GPU. Several have GPUs of their own and stay awake: they are one set,
each of which receives a part and passes it on to the others."""

import asyncio
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import torch
from file_trainer import FilePusher
from host_compute import compute_everywhere
from random_weights import write_random
from test_push_fp8_engine import write_fp8
from vllm_needs import DEEPSEEK, QWEN

from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server.environment_variables import fp8_scale_environment
from megatron_r1.push.matching.tensors import pushed_tensors
from tools.null_gpu.launch import ON_HOST

EVERYWHERE = Path(__file__).parents[2] / "tools" / "null_gpu" / "everywhere"
GPU = 0  # of the first engine
GIB = 2**30


def settings(transport: str, is_fp8: bool) -> dict:
    return {
        "device": "cuda",
        "dtype": "bfloat16",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "gpu_memory": 0.02,
        "enable_sleep_mode": True,
        "weight_transfer_backend": f"megatron_r1_{transport}",
        # Nothing can be captured or compiled where kernels do not run.
        "extra_args": ["--enforce-eager", *(["--moe-backend", "deep_gemm"] if is_fp8 else [])],
        "extra_env": {
            **ON_HOST,
            **(fp8_scale_environment(DEEPSEEK) if is_fp8 else {}),
            "VLLM_NCCL_SO_PATH": os.environ["LD_PRELOAD"],
            "PYTHONPATH": f"{EVERYWHERE}:{os.environ['PYTHONPATH']}",
        },
    }


async def checksums(fleet: EngineFleet) -> list[dict]:
    """Return vLLM's own checksums of the tensors that each engine computes with."""
    found = []
    for engine in fleet.engines:
        answer = await engine.client.request("POST", "/weight_checker", {"action": "checksum"})
        found.append(msgspec.json.decode(answer)["checksums"])
    return found


async def asleep(fleet: EngineFleet, gib_left_awake: float) -> float:
    """Have the engines sleep; return the GiB that are left then, of which a trainer on the same GPU
    can take more than was left before."""
    await fleet.sleep()
    left = gib_left()
    size = int((gib_left_awake + left) / 2 * GIB)
    taken = torch.empty(size, dtype=torch.uint8, device=f"cuda:{GPU}")
    del taken
    torch.cuda.empty_cache()
    return left


def gib_left() -> float:
    return torch.cuda.mem_get_info(GPU)[0] / GIB


async def main(folder: Path, transport: str, num_engines: int, is_fp8: bool = False) -> None:
    compute_everywhere()
    # Of 2 GPUs an engine the first is its own, as it has one rank.
    trainer_gpu = GPU if num_engines == 1 else 1
    torch.cuda.set_device(trainer_gpu)
    # The trainer's calls run in these threads here; each would begin with GPU 0.
    threads = ThreadPoolExecutor(initializer=partial(torch.cuda.set_device, trainer_gpu))
    asyncio.get_running_loop().set_default_executor(threads)
    model, dtype = (DEEPSEEK, torch.float32) if is_fp8 else (QWEN, torch.bfloat16)
    first, other = (write_random(folder / f"model{seed}", model, seed, dtype) for seed in range(2))
    stored, push = first, {}
    if is_fp8:
        stored, push = folder / "fp8", {"fp8": True, "tensors": pushed_tensors(model, fp8=True)}
        write_fp8(first, stored)
    async with EngineFleet(num_engines, folder / "fleet", **settings(transport, is_fp8)) as fleet:
        await fleet.start(stored)
        # Over NCCL the receive buffer is on a shared GPU only during a push.
        colocated = transport == "nccl" and num_engines == 1
        pusher = FilePusher(model, fleet, transport=transport, colocated=colocated, **push)
        found, left = [await checksums(fleet)], []
        if colocated:
            await fleet.sleep()  # as `controller.rl_run` does before engines are connected
        await pusher.push(other)
        assert [len(one.engines) for one in pusher.pusher.links.sets] == [num_engines]
        found.append(await checksums(fleet))
        left.append(gib_left())
        if num_engines == 1:
            left.append(await asleep(fleet, left[0]))
        await pusher.push(first)
        found.append(await checksums(fleet))
        left.append(gib_left())
    print(json.dumps({"checksums": found, "GiB left": left}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), "fp8" in sys.argv[4:]))
