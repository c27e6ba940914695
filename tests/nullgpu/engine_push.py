"""Starts a vLLM engine on the null GPU and pushes to it through shared memory: other weights, then
those it was started on: `engine_push.py FOLDER`. Prints a line of JSON with the checksums of the
tensors in use before, between and after."""

import asyncio
import json
import os
import sys
from pathlib import Path

import msgspec
import torch
from file_trainer import FileBridge
from safetensors.torch import save_file
from vllm_needs import QWEN

from megatron_r1.fleet.rollout_fleet import RolloutFleet
from megatron_r1.weights import hf_tensors

HERE = Path(__file__).parent
ENGINE = {
    "device": "cuda",
    "dtype": "bfloat16",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "gpu_memory": 0.02,
    "weight_transfer_backend": "megatron_r1_shm",
    # Nothing can be captured or compiled where kernels do not run.
    "extra_args": ["--enforce-eager"],
    "extra_env": {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "PYTHONPATH": f"{HERE}/in_engine:{HERE}:{os.environ['PYTHONPATH']}",
    },
}


def write_model(folder: Path, seed: int) -> Path:
    draw = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(QWEN))
    shapes = {name: shape for name, (shape, _) in hf_tensors(QWEN).items()}
    save_file(
        {name: torch.randn(shape, generator=draw).bfloat16() for name, shape in shapes.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


async def checksums(fleet: RolloutFleet) -> dict:
    """Return vLLM's own checksums of the tensors that the engine computes with."""
    answer = await fleet.engines[0].client.request(
        "POST", "/weight_checker", {"action": "checksum"}
    )
    return msgspec.json.decode(answer)["checksums"]


async def main(folder: Path) -> None:
    first, other = (write_model(folder / f"model{seed}", seed) for seed in range(2))
    async with RolloutFleet(1, folder / "fleet", **ENGINE) as fleet:
        await fleet.start(first)
        bridge = FileBridge(QWEN, fleet, transport="shm")
        found = [await checksums(fleet)]
        for model in (other, first):
            await bridge.push(model)
            found.append(await checksums(fleet))
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
