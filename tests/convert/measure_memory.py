"""Both ways with a DeepSeek-V3-shaped checkpoint of 10 GB: `measure_memory.py FOLDER [JSON]`.

V3's own widths (hidden 7168, 128 heads, vocabulary 129,280), fewer layers and experts. FP8 →
Megatron bf16 → FP8, and Megatron → bf16 → Megatron; both have to give the same bits. Needs 31 GB of
disk in FOLDER, which it empties as it goes. Memory is the proportional set size (PSS) of all
processes of a command together, sampled; `largest_process` is the kernel's own figure for the
largest one.
"""

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from megatron_r1.models.weights.formats import published_layout as fp8  # noqa: E402
from megatron_r1.models.weights.formats.hf_writer import split_into_files, write_index  # noqa: E402
from megatron_r1.models.weights.formats.tensor_files import plan_file, stored_tensors  # noqa: E402

HF = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 8,
    "n_group": 4,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "dtype": "bfloat16",
    "quantization_config": fp8.FP8_CONFIG,
}
POOL_BYTES = 61 << 20  # repeats out of step with every width


def write_fp8(folder: Path) -> int:
    """A folder as DeepSeek publishes it, with random numbers; returns its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(HF))
    tensors = {}
    for name, (shape, dtype) in stored_tensors(HF, torch.bfloat16, with_mtp=True).items():
        tensors[name] = (shape, torch.float8_e4m3fn if fp8.is_quantized(name) else dtype)
        if fp8.is_quantized(name):
            tensors[fp8.scale_name(name)] = (fp8.scale_shape(shape), torch.float32)
    pools = random_pools()
    files = split_into_files(tensors, 2 * 10**9)
    copies = {"model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"}
    for name, held in files.items():
        plan = plan_file(held)
        with open(folder / name, "wb") as file:
            file.write(plan.header)
            for tensor, placed in plan.tensors.items():
                pool = pools["scale" if fp8.is_scale(tensor) else placed.dtype]
                # A copy begins where its original does in the pool.
                start = 0 if tensor in copies or "layers" not in tensor else len(tensor) * 4096
                left = prod(placed.shape) * placed.dtype.itemsize
                while left:
                    piece = pool[start : start + left]
                    file.write(piece)
                    left, start = left - len(piece), 0
    write_index(folder, files)
    return sum(file.stat().st_size for file in folder.iterdir())


def random_pools() -> dict:
    """Bytes to fill tensors with, by dtype: FP8 codes without NaN, normal numbers, scales."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (POOL_BYTES,), generator=generator, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x7E
    normal = torch.randn(POOL_BYTES // 4, generator=generator) * 0.02
    scale = torch.rand(1 << 20, generator=generator) * 2e-4 + 1e-5
    return {
        torch.float8_e4m3fn: codes.numpy().tobytes(),
        torch.bfloat16: normal.bfloat16().view(torch.uint8).numpy().tobytes(),
        torch.float32: normal.view(torch.uint8).numpy().tobytes(),
        "scale": scale.view(torch.uint8).numpy().tobytes(),
    }


def convert(*arguments) -> dict:
    """Run a conversion; its command, seconds and memory."""
    command = [sys.executable, str(ROOT / "tools" / "convert"), *map(str, arguments)]
    began, peak = time.monotonic(), 0
    child = subprocess.Popen(command, start_new_session=True)
    while True:
        ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        if ended:
            break
        peak = max(peak, sum(pss(pid) for pid in session(child.pid)))
        time.sleep(0.2)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)} ended with {child.returncode}")
    names = [Path(str(a)).name if "/" in str(a) else str(a) for a in arguments]
    return {
        "command": " ".join(["tools/convert", *names]),
        "seconds": round(time.monotonic() - began),
        "peak_mib": round(peak / 1024),
        "largest_process_mib": round(usage.ru_maxrss / 1024),
    }


def session(leader: int) -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader:
            found.append(int(pid))
    return found


def pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def same_files(a: Path, b: Path) -> bool:
    names = sorted(f.name for f in a.glob("*.safetensors"))
    return bool(names) and all(
        subprocess.run(["cmp", "-s", a / name, b / name]).returncode == 0 for name in names
    )


def main(folder: Path, result_file: Path | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    published, held = folder / "fp8", folder / "megatron"
    again, plain, second = folder / "fp8_again", folder / "bf16", folder / "megatron_again"
    load, size = os.getloadavg()[0], write_fp8(published)
    both = ("--workers", 2)
    steps = [convert("from-hf", published, held, *both)]
    fast = ("--no-check", *both)
    split = ("--max-file-bytes", 2 * 10**9)
    steps.append(convert("to-hf", held, again, "--dtype", "fp8", *split, *fast))
    same = {"FP8 → Megatron → FP8": same_files(published, again)}
    shutil.rmtree(again)
    shutil.rmtree(published)
    steps.append(convert("to-hf", held, plain, *fast))
    steps.append(convert("verify", held, plain, *both))
    steps.append(convert("from-hf", plain, second, *both))
    plain_size = sum(f.stat().st_size for f in plain.iterdir())
    shutil.rmtree(plain)
    files = sorted(f.name for f in held.glob("*.distcp"))
    same["Megatron → bf16 → Megatron"] = all(
        subprocess.run(["cmp", "-s", held / f, second / f]).returncode == 0 for f in files
    )
    shutil.rmtree(folder)
    result = {
        "command": "python tests/convert/measure_memory.py FOLDER JSON",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_before": load,
        "fp8_bytes": size,
        "bf16_bytes": plain_size,
        "identical": same,
        "steps": steps,
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if result_file:
        result_file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if not all(same.values()):
        sys.exit("the round trip is not the identity")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
