"""The command line on a small DeepSeek-V3-shaped model with a tokenizer."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tiny_models import DEEPSEEK

HERE = Path(__file__).parent
AGENTS_PYTHON = Path(
    os.environ.get("R1_AGENTS_PYTHON", HERE.parents[1] / ".venv-agents/bin/python")
).absolute()
"""Of verifiers, where it is installed (`make agents`)."""
MODEL = DEEPSEEK | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "q_lora_rank": 48,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}


def write_model(folder: Path) -> None:
    """config.json and a byte-level tokenizer; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<think>", "</think>", "<answer>", "</answer>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    whole.save_pretrained(folder)
    config = {**MODEL, "vocab_size": len(whole)}
    (folder / "config.json").write_text(json.dumps(config))


def members(parent: int) -> list[int]:
    """Return the processes that descend from `parent`."""
    found, at = [parent], 0
    while at < len(found):
        for children in Path(f"/proc/{found[at]}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended
                found += map(int, children.read_text().split())
        at += 1
    return found[1:]


def command_of(process: int) -> str:
    """Return the command of a process; "" if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatron_r1", *map(str, arguments)]


def environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH", "")
    if not path.startswith(str(HERE)):  # `fork_servers` has set it for all workers
        path = f"{HERE}:{path}"
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def run(*arguments: str, more: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """more: environment variables."""
    return subprocess.run(
        command(*arguments),
        env=environment() | (more or {}),
        capture_output=True,
        text=True,
    )
