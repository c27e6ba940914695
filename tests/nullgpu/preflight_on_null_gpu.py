"""`preflight_on_null_gpu.py FOLDER RANK`: a rank of the preflight of a shipped recipe in miniature;
that rank loads FOLDER/libnccl.so.2."""

import json
import os
import sys
from pathlib import Path

from megatron_r1.base.files import atomic_write
from megatron_r1.commands import cli
from megatron_r1.config import dump_recipe, load_recipe
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.rehearse import miniature

ROOT = Path(__file__).parents[2]
LIMITS = {"slowest": 1e-6, "bandwidth": 1e-9, "output": "found.json"}
"""The null GPU has no rates."""


def main(folder: Path, other_rank: str) -> None:
    """Write the recipe, and run the preflight."""
    preloaded, other = os.environ["LD_PRELOAD"], str(folder / "libnccl.so.2")
    if os.environ["RANK"] == other_rank and other not in preloaded:
        os.environ["LD_PRELOAD"] = f"{other}:{preloaded}"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    os.chdir(ROOT)  # the recipe names its model so
    config = load_recipe(ROOT / "examples/deepseek_r1/r1_zero_fp8.yaml", {})
    small = miniature.make_miniature(
        config, read_hf_config(config.model.path, None), folder, 2, device="null-gpu"
    )
    os.chdir(folder)
    atomic_write(f"{small.config.model.path}/config.json", json.dumps(small.hf_config))
    recipe = atomic_write(f"{os.environ['RANK']}.yaml", dump_recipe(small.config))
    options = [f"--preflight.{key}={value}" for key, value in LIMITS.items()]
    print(f"status {cli.main(['preflight', str(recipe), *options])}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
