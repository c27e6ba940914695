"""The replies of the synthetic engines: a model folder with a vocabulary of real size, a group's
responses, and the reply as bytes, in each format of an engine."""

import io
import json
import random
import shutil
import string
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tools.bench.children import ROOT

CONFIG = ROOT / "examples" / "deepseek_r1" / "model" / "config.json"
GROUP = 16
PROMPT_CHARS = 5
"""Digits of a question, all of one length, so that routing of one length fits all of them."""
SIGNS = "αβπ∑∫→≤∈×√"
END = "<｜end▁of▁sentence｜>"


@dataclass(frozen=True)
class GroupReply:
    """The responses of a group: token_ids, logprobs: one array per response; routing: [rows,
    layers, topk] of each, or None."""

    token_ids: list[np.ndarray]
    logprobs: list[np.ndarray]
    routing: np.ndarray | None


def write_model(folder: Path) -> Path:
    """Write DeepSeek-V3's config.json and a byte-level tokenizer with as many entries: words of 4
    bytes on average, one in fifty with a sign that takes two bytes or more in a Python text."""
    folder.mkdir(parents=True)
    shutil.copy(CONFIG, folder)
    size = json.loads(CONFIG.read_text())["vocab_size"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rng, words = random.Random(0), dict.fromkeys(letters)
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    while len(words) < size - 2:
        word = " " + "".join(rng.choices(string.ascii_letters, k=rng.choice((2, 3, 3, 3))))
        if rng.random() < 0.02:
            word += rng.choice(SIGNS)
        words["".join(part for part, _ in bytelevel.pre_tokenize_str(word))] = None
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = bytelevel, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<｜begin▁of▁sentence｜>"), AddedToken(END)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_reply(folder: Path, num_tokens: int, num_prompt_tokens: int, routed: bool) -> GroupReply:
    """Return a group whose responses have `num_tokens` each; every other one answers 42."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    random_numbers = np.random.default_rng(0)
    ids, logprobs = [], []
    for index in range(GROUP):
        start = tokenizer.encode("<think>").ids
        end = tokenizer.encode(f"</think> <answer>{42 - index % 2}</answer>{END}").ids
        words = random_numbers.integers(256, 129_000, num_tokens - len(start) - len(end))
        ids.append(np.array([*start, *words, *end], np.int32))
        logprobs.append(-random_numbers.exponential(0.5, num_tokens).astype(np.float32))
    return GroupReply(ids, logprobs, _routing(num_prompt_tokens + num_tokens) if routed else None)


def _routing(num_tokens: int) -> np.ndarray:
    hf = json.loads(CONFIG.read_text())
    experts, topk = hf["n_routed_experts"], hf["num_experts_per_tok"]
    first = np.random.default_rng(1).integers(0, experts, (num_tokens - 1, hf["num_hidden_layers"]))
    steps = np.arange(topk) * 7
    return ((first[..., None] + steps) % experts).astype(np.uint8)


def as_json(reply: GroupReply) -> bytes:
    """Return the body of vLLM's reply: the fields of its `GenerateTokensResponse`."""
    choices: list[dict[str, Any]] = []
    routing = None
    if reply.routing is not None:
        file = io.BytesIO()
        np.save(file, reply.routing)
        routing = b64encode(file.getvalue()).decode()
    for index, (ids, logprobs) in enumerate(zip(reply.token_ids, reply.logprobs, strict=True)):
        tokens = (
            {"token_id": i, "logprob": p, "rank": 1}
            for i, p in zip(ids.tolist(), logprobs.tolist(), strict=True)
        )
        content = [{**token, "top_logprobs": [token]} for token in tokens]
        choice = {"index": index, "finish_reason": "stop", "stop_reason": int(ids[-1])}
        choice |= {"token_ids": ids.tolist(), "routed_experts": routing, "sampling_mask": None}
        spans = [{"version": "0", "start": 0, "end": len(ids)}]
        choices.append(choice | {"weight_versions": spans, "logprobs": {"content": content}})
    body = {"request_id": "0", "model": "synthetic", "created": 0, "choices": choices}
    return msgspec.json.encode(body | {"output_mode": "tokens", "prompt_logprobs": None})


def as_bytes(reply: GroupReply) -> bytes:
    """Return the body of our plugin's reply (`engines/plugin/samples_endpoint.py`)."""
    routed = None
    if (rows := reply.routing) is not None:
        routed = {"dtype": rows.dtype.str, "shape": rows.shape}
    count = len(reply.token_ids[0])
    spans = [{"version": "0", "start": 0, "end": count}]
    choice = {"finish_reason": "stop", "num_tokens": count}
    choice |= {"weight_versions": spans, "routed_experts": routed}
    header = msgspec.json.encode({"choices": [choice] * len(reply.token_ids)})
    arrays = zip(reply.token_ids, reply.logprobs, strict=True)
    tokens = b"".join(ids.tobytes() + logprobs.tobytes() for ids, logprobs in arrays)
    experts = b"" if rows is None else rows.tobytes() * len(reply.token_ids)
    return len(header).to_bytes(4, "little") + header + tokens + experts
