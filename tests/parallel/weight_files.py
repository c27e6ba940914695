"""Files that do not fit, and files of other shapes, on two ranks: `weight_files.py ORACLE OUT`.

Fails on the first expectation that does not hold; prints the name of each that does.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
from pathlib import Path

from megatron_r1.models import platform

platform.prepare_process()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from megatron_r1 import models  # noqa: E402
from megatron_r1.config import Config  # noqa: E402
from megatron_r1.models import patches, weights  # noqa: E402


@contextlib.contextmanager
def grid(**sizes):
    """Megatron's process groups of these sizes, and a function that builds a model on them."""
    names = {"tp": "tensor", "pp": "pipeline", "ep": "expert"}
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.get("tp", 1),
        pipeline_model_parallel_size=sizes.get("pp", 1),
        expert_model_parallel_size=sizes.get("ep", 1),
        expert_tensor_parallel_size=1,
    )
    model_parallel_cuda_manual_seed(1)
    parallel = {names[axis]: size for axis, size in sizes.items()}

    def build(hf_config, dtype="float32", with_mtp=True):
        model = {"dtype": dtype, "mtp": "frozen" if with_mtp else "none"}
        config = models.transformer_config(hf_config, Config(model=model, parallel=parallel))
        return [models.build_model(hf_config, config)]

    yield build
    parallel_state.destroy_model_parallel()


def refuses(action, *parts):
    try:
        action()
    except ValueError as error:
        missing = [part for part in parts if part not in str(error)]
        assert not missing, f"{error} does not mention {missing}"
    else:
        raise AssertionError(f"nothing was refused; expected an error about {parts}")


def on_rank_zero(action):
    # Before as well: another rank may still be reading what `action` changes.
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def checkpoints_that_do_not_fit_are_named(build, oracle, out):
    source, bad = oracle / "qwen-untied", out / "bad"
    hf_config = models.read_hf_config(source)
    chunks = build(hf_config)

    def spoil():
        shutil.copytree(source, bad)
        tensors = load_file(source / "model.safetensors")
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = torch.zeros(3, 48)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(72, 48, dtype=torch.int8)
        tensors["surprise"] = torch.zeros(1)
        save_file(tensors, bad / "model.safetensors")

    on_rank_zero(spoil)
    refuses(
        lambda: weights.load_hf(chunks, hf_config, bad),
        "missing (1): model.norm.weight",
        "unexpected (1): surprise",
        "lm_head.weight is (3, 48), config.json says (67, 48)",
        "up_proj.weight is I8, only F32, BF16, F16",
    )
    refuses(
        lambda: weights.load_hf(chunks, hf_config, out / "nowhere"), "has neither model.safetensors"
    )
    on_rank_zero(
        lambda: (bad / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
        )
    )
    refuses(
        lambda: weights.load_hf(chunks, hf_config, bad), "lacks: model-00001-of-00002.safetensors"
    )


def a_checkpoint_without_mtp_is_refused_with_the_remedy(build, oracle, out):
    source = oracle / "deepseek-plain-noqlora"
    hf_config = {**models.read_hf_config(source), "num_nextn_predict_layers": 1}
    refuses(lambda: weights.load_hf(build(hf_config), hf_config, source), "missing", "model.mtp")
    weights.load_hf(build(hf_config, with_mtp=False), hf_config, source)


def a_model_without_mtp_is_exported_without(build, oracle, out):
    source = oracle / "deepseek-yarn-mtp"
    hf_config = models.read_hf_config(source)
    chunks = build(hf_config, with_mtp=False)
    weights.load_hf(chunks, hf_config, source)
    weights.save_hf(chunks, hf_config, source, out / "no-mtp", torch.float32)
    written = models.read_hf_config(out / "no-mtp")
    assert written["num_nextn_predict_layers"] == 0
    expected = load_file(source / "model.safetensors")
    got = load_file(out / "no-mtp" / "model.safetensors")
    assert got.keys() == weights.hf_tensors(written).keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def bfloat16_files_keep_the_correction_bias_in_float32(build, oracle, out):
    source = oracle / "deepseek-yarn-mtp"
    hf_config = models.read_hf_config(source)
    chunks = build(hf_config)
    weights.load_hf(chunks, hf_config, source)
    weights.save_hf(chunks, hf_config, source, out / "bf16", torch.bfloat16)
    assert json.loads((out / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (out / "bf16" / "generation_config.json").is_file()
    expected = load_file(source / "model.safetensors")
    for name, tensor in load_file(out / "bf16" / "model.safetensors").items():
        kept = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert tensor.dtype == kept, name
        assert torch.equal(tensor, expected[name].to(kept)), name
    # And back: a bfloat16 model reads and writes the same bytes.
    half = build(hf_config, "bfloat16")
    weights.load_hf(half, hf_config, out / "bf16")
    weights.write_hf(half, hf_config, out / "again.safetensors", dtype=torch.bfloat16)
    again = load_file(out / "again.safetensors")
    for name, tensor in load_file(out / "bf16" / "model.safetensors").items():
        assert torch.equal(tensor, again[name]), name


def a_subset_can_be_written_and_a_full_disk_raises_on_every_rank(build, oracle, out):
    hf_config = models.read_hf_config(oracle / "llama3")
    chunks = build(hf_config)
    names = ["lm_head.weight", "model.layers.3.self_attn.k_proj.weight"]
    weights.write_hf(chunks, hf_config, out / "some.safetensors", dtype=torch.float32, names=names)
    with safe_open(out / "some.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == sorted(names)
    write = weights.write_hf
    refuses(
        lambda: write(chunks, hf_config, out / "x", dtype=torch.float32, names=["ghost"]),
        "no tensor ghost",
    )
    # No such folder stands for every reason the file cannot be made; rank 1 must not wait for ever.
    refuses(
        lambda: write(chunks, hf_config, out / "no" / "x", dtype=torch.float32),
        "No such file",
        "no/x",
    )
    # A disk of one rank's host that fills up while it writes.
    last, upstream = dist.get_world_size() - 1, os.pwrite

    def pwrite(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if dist.get_rank() == last:
        os.pwrite = pwrite
    refuses(
        lambda: write(chunks, hf_config, out / "full", dtype=torch.float32), f"rank {last}", "full"
    )
    os.pwrite = upstream


def random_weights_do_not_depend_on_the_split(build, oracle, out):
    for name in ("deepseek-yarn-mtp", "qwen-tied"):
        hf_config = models.read_hf_config(oracle / name)
        chunks = build(hf_config)
        weights.initialize_weights(chunks, hf_config, std=0.05, seed=7)
        weights.write_hf(chunks, hf_config, out / "initial.safetensors", dtype=torch.float32)
        got, first = load_file(out / "initial.safetensors"), out / f"first-{name}.safetensors"
        on_rank_zero(lambda first=first, got=got: first.exists() or save_file(got, first))
        expected = load_file(first)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        matrix = got["model.layers.2.self_attn.o_proj.weight"]
        assert abs(matrix.std() / 0.05 - 1) < 0.1
        assert torch.equal(got["model.norm.weight"], torch.ones(48))
        dist.barrier()


def main(oracle: Path, out: Path) -> None:
    patches.install()
    dist.init_process_group(platform.distributed_backend())
    checks = (
        checkpoints_that_do_not_fit_are_named,
        a_checkpoint_without_mtp_is_refused_with_the_remedy,
        a_model_without_mtp_is_exported_without,
        bfloat16_files_keep_the_correction_bias_in_float32,
        a_subset_can_be_written_and_a_full_disk_raises_on_every_rank,
        random_weights_do_not_depend_on_the_split,
    )
    with grid(tp=2) as build:
        for check in checks:
            check(build, oracle, out)
            print(check.__name__, flush=True)
    for sizes in ({"pp": 2}, {}):
        with grid(**sizes) as build:
            random_weights_do_not_depend_on_the_split(build, oracle, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
