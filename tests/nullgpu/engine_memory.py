"""Engines of V3's widths on the null GPU, whose kernels do nothing: what vLLM leaves for KV cache.

    engine_memory.py FOLDER DTYPE RANKS EXPERTS TOKENS …

starts an engine of RANKS data ranks and of vLLM's backend EXPERTS for each limit of a pass, and
prints a line of JSON for it: the bytes of each rank. All are forked from one process that has
imported vLLM."""

import json
import os
import socket
import sys
from pathlib import Path

from tools.null_gpu.launch import ON_HOST

WIDTHS = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 8}
SMALL = {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, "vocab_size": 512}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16}
SIZES = {"max_model_len": 1024, "max_num_seqs": 16, "gpu_memory_utilization": 0.2}


def write_model(folder: Path, dtype: str) -> None:
    """Write V3's config.json with two layers and eight experts."""
    from megatron_r1.models.hf_config_file import load_raw_hf_config

    v3 = Path(__file__).parents[2] / "examples/deepseek_r1/model"
    config = load_raw_hf_config(v3, "model.path") | WIDTHS | SMALL | HEADS
    config.pop("auto_map", None)
    if dtype != "fp8":
        config.pop("quantization_config", None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))


def start(
    folder: Path, rank: int, ranks: int, experts: str, port: int, tokens: int, writer: int
) -> None:
    """Start a data rank until it knows what it leaves for KV cache, and write that."""
    settings = {"VLLM_DP_RANK": rank, "VLLM_DP_RANK_LOCAL": rank, "VLLM_DP_SIZE": ranks}
    settings |= {"VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in settings.items()} if ranks > 1 else {})
    from vllm import LLM
    from vllm.v1.worker.gpu_worker import Worker

    determine = Worker.determine_available_memory

    def ending(worker: Worker) -> None:
        os.write(writer, str(determine(worker)).encode())
        os._exit(0)

    Worker.determine_available_memory = ending
    spread = {"enable_expert_parallel": True, "all2all_backend": "allgather_reducescatter"}
    LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_batched_tokens=tokens,
        moe_backend=experts,
        **SIZES,
        **(spread if ranks > 1 else {}),
    )


def main(folder: str, dtype: str, ranks: str, experts: str, *limits: str) -> None:
    """Print a line for each limit."""
    # Kernels compute nothing: all that the null GPU's engines set but Triton's interpreter.
    variables = {name: value for name, value in ON_HOST.items() if name != "TRITON_INTERPRET"}
    os.environ.update(variables, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    os.environ["VLLM_NCCL_SO_PATH"] = os.environ["LD_PRELOAD"]
    import vllm.utils.flashinfer

    # It would compile, by an nvcc that it finds, a module that changes no memory.
    vllm.utils.flashinfer.has_flashinfer = lambda: False
    import vllm.v1.worker.gpu_worker
    from vllm import LLM  # noqa: F401

    write_model(Path(folder), dtype)
    for tokens in map(int, limits):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(int(ranks)):
            reader, writer = os.pipe()
            if not (child := os.fork()):
                try:
                    start(Path(folder), rank, int(ranks), experts, port, tokens, writer)
                finally:
                    os._exit(1)
            os.close(writer)
            children.append((child, reader))
        sizes = [os.read(reader, 32).decode() for _, reader in children]
        for child, _ in children:
            os.waitpid(child, 0)
        print(json.dumps({"tokens": tokens, "bytes": [int(size) for size in sizes]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
