"""Converted checkpoints next to Megatron's own, on these ranks: `saved_by_megatron.py FOLDER`.

FOLDER/NAME-hf are Hugging Face folders, FOLDER/NAME-converted what from-hf made of them, and
FOLDER/NAME-fp8 an FP8 folder whose values are FOLDER/NAME-fp8-values. Fails on the first thing that
is not equal; prints a line for each that is.
"""

import shutil
import sys
from pathlib import Path

from megatron_r1.models import platform

platform.prepare_process()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

from megatron_r1 import models  # noqa: E402
from megatron_r1.base.errors import Cause, UserError  # noqa: E402
from megatron_r1.config import Config  # noqa: E402
from megatron_r1.models import patches, weights  # noqa: E402
from megatron_r1.models.weights.formats.dcp import DistributedCheckpoint  # noqa: E402
from megatron_r1.models.weights.formats.hf_folder import HFWeights  # noqa: E402
from megatron_r1.models.weights.formats.megatron_weights import MegatronWeights  # noqa: E402
from megatron_r1.trainer import construction  # noqa: E402


def build(hf_config, tensor_parallel):
    config = models.transformer_config(hf_config, Config(parallel={"tensor": tensor_parallel}))
    model = models.build_model(hf_config, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model


def entries(model):
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found = model.sharded_state_dict(metadata={"dp_cp_group": group})
    return {name: entry for name, entry in found.items() if "_extra_state" not in name}


def same_parameters(a, b):
    held = dict(b.state_dict())
    for name, value in a.state_dict().items():
        if torch.is_tensor(value):
            bits = (t.contiguous().view(torch.uint8) for t in (value, held[name]))
            assert torch.equal(*bits), f"{name} differs"


def same_as_saved(name, folder, size):
    source, converted = folder / f"{name}-hf", folder / f"{name}-converted"
    hf_config = models.read_hf_config(source)
    model, other = build(hf_config, size), build(hf_config, size)
    weights.load_hf([model], hf_config, source)
    saved = folder / f"{name}-saved"
    if dist.get_rank() == 0:
        shutil.rmtree(saved, ignore_errors=True)
        saved.mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": entries(model)}, str(saved))
    dist.barrier()
    ours, theirs = DistributedCheckpoint(converted), DistributedCheckpoint(saved)
    assert ours.dtypes == theirs.dtypes, "other names or dtypes"
    for key, shape in theirs.shapes.items():
        if size == 1:
            assert ours.shapes[key] == shape, key
    for held in (MegatronWeights(saved, hf_config), MegatronWeights(converted, hf_config)):
        for tensor, (shape, _) in held.tensors.items():
            expected = HFWeights(source, hf_config).read(tensor, 0, 0, shape[0])
            assert torch.equal(held.read(tensor, 0, 0, shape[0]), expected), tensor
    print(f"{name} on {size}: saved = converted", flush=True)

    other.load_state_dict(
        dist_checkpointing.load({"model": entries(other)}, str(converted))["model"]
    )
    same_parameters(model, other)
    third = build(hf_config, size)
    weights.load_megatron([third], hf_config, saved)
    same_parameters(model, third)
    settings = {"path": str(source), "checkpoint": str(converted), "dtype": "bfloat16"}
    layout = {"tensor": size, "processes": size}
    recipe = Config(model=settings, parallel=layout)
    transformer = models.transformer_config(hf_config, recipe)
    groups = model.pg_collection
    same_parameters(model, construction.build_chunks(recipe, hf_config, transformer, groups)[0])
    print(f"{name} on {size}: Megatron loads what was converted", flush=True)
    damaged_is_refused(hf_config, settings, layout, groups, folder / f"{name}-damaged")
    print(f"{name} on {size}: a flipped bit is refused on every rank", flush=True)


def damaged_is_refused(hf_config, model, layout, groups, damaged):
    """One bit differs, in a file that one of the ranks verifies for all."""
    if dist.get_rank() == 0:
        shutil.copytree(model["checkpoint"], damaged)
        data = bytearray((damaged / "__0_0.distcp").read_bytes())
        data[len(data) // 2] ^= 1
        (damaged / "__0_0.distcp").write_bytes(data)
    dist.barrier()
    recipe = Config(model={**model, "checkpoint": str(damaged)}, parallel=layout)
    transformer = models.transformer_config(hf_config, recipe)
    try:
        construction.build_chunks(recipe, hf_config, transformer, groups)
    except UserError as error:
        assert (error.key, error.cause) == ("model.checkpoint", Cause.MALFORMED), error
        assert "__0_0.distcp" in str(error), error
    else:
        raise AssertionError("a damaged checkpoint was loaded")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(damaged)


def fp8_is_read_at_any_split(name, folder, size):
    source = folder / f"{name}-fp8"
    hf_config = models.read_hf_config(source)
    values = models.read_hf_config(folder / f"{name}-fp8-values")
    first, second = build(hf_config, size), build(values, size)
    weights.load_hf([first], hf_config, source)
    weights.load_hf([second], values, folder / f"{name}-fp8-values")
    same_parameters(first, second)
    print(f"{name} on {size}: FP8 read", flush=True)


def main(folder: Path) -> None:
    patches.install()
    dist.init_process_group(platform.distributed_backend())
    size = dist.get_world_size()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=size, expert_tensor_parallel_size=1
    )
    model_parallel_cuda_manual_seed(1)
    for converted in sorted(folder.glob("*-converted")):
        name = converted.name.removesuffix("-converted")
        same_as_saved(name, folder, size)
        if (folder / f"{name}-fp8").is_dir():
            fp8_is_read_at_any_split(name, folder, size)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
