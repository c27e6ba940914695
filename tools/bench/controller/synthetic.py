"""Synthetic engines and trainer ranks, many of either in one process.

Engines are HTTP servers that answer every generate call with the same group, trainer ranks ZeroMQ
sockets that reply to every call.

What engines answer: a model folder with a vocabulary of real size, a group's responses, and the
reply as bytes, in each format of an engine."""

import asyncio
import io
import itertools
import json
import os
import random
import shutil
import string
import time
from base64 import b64encode
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_r1.base.processes.authentication import protect_client
from megatron_r1.engines.server.client import GENERATE_PATH
from megatron_r1.engines.server.server import RunningServer
from megatron_r1.trainer.rank_messages import RankCall, RankReply, rank_identity
from megatron_r1.trainer.sample_encoding import decode_samples
from tools.bench.host import ROOT

MODEL_CONFIG = ROOT / "examples" / "deepseek_r1" / "model" / "config.json"
GROUP = 16
PROMPT_CHARS = 5
"""Digits of a question, all of one length, so that routing of one length fits all of them."""
SIGNS = "αβπ∑∫→≤∈×√"
END = "<｜end▁of▁sentence｜>"


@dataclass(frozen=True)
class GroupReply:
    """The responses of a group.

    Attributes:
        token_ids: an array per response.
        logprobs: an array per response, nats.
        routing: [rows, layers, topk] of each, or None."""

    token_ids: list[np.ndarray]
    logprobs: list[np.ndarray]
    routing: np.ndarray | None


def write_model(folder: Path) -> Path:
    """Write DeepSeek-V3's config.json and a byte-level tokenizer with as many entries.

    Words have 4 bytes on average, one in fifty a sign that takes two bytes or more in a Python
    text."""
    folder.mkdir(parents=True)
    shutil.copy(MODEL_CONFIG, folder)
    size = json.loads(MODEL_CONFIG.read_text())["vocab_size"]
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
    """Return a group whose responses have `num_tokens` each; every other one answers 42.

    Args:
        folder: the folder of the tokenizer.
        num_tokens: tokens of each response.
        num_prompt_tokens: tokens of the prompt, whose experts are replied as well.
        routed: whether the reply has the experts of every token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    random_numbers = np.random.default_rng(0)
    ids, logprobs = [], []
    for index in range(GROUP):
        start = tokenizer.encode("<think>").ids
        end = tokenizer.encode(f"</think> <answer>{42 - index % 2}</answer>{END}").ids
        words = random_numbers.integers(256, 129_000, num_tokens - len(start) - len(end))
        ids.append(np.array([*start, *words, *end], np.int32))
        logprobs.append(-random_numbers.exponential(0.5, num_tokens).astype(np.float32))
    return GroupReply(
        ids, logprobs, _synthetic_routing(num_prompt_tokens + num_tokens) if routed else None
    )


def _synthetic_routing(num_tokens: int) -> np.ndarray:
    hf_config = json.loads(MODEL_CONFIG.read_text())
    experts, topk = hf_config["n_routed_experts"], hf_config["num_experts_per_tok"]
    first = np.random.default_rng(1).integers(
        0, experts, (num_tokens - 1, hf_config["num_hidden_layers"])
    )
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
    """Return the body of our plugin's reply (`engines/plugin/reply_writer.py`)."""
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


JSON = "application/json"
AWAKE = b'{"is_sleeping": false}'
METRICS = {"loss": 0.0, "grad_norm": 0.0}


def serve_engines(count: int, bodies: dict[str, Path], urls: Connection, interval: float) -> None:
    """Serve engines in this process until it is killed; send their addresses.

    Args:
        count: the number of engines.
        bodies: files with the reply to a generate call, by media type; a call gets the type that it
            accepts, JSON if it names none.
        urls: gets the addresses.
        interval: seconds from one reply to the next, of all engines together, and from the first
            call to its reply; 0: every call is answered at once."""
    calls = itertools.count()
    first: list[float] = []

    async def until_due() -> None:
        number = next(calls)
        if number == 0:
            first.append(time.monotonic())
        await asyncio.sleep(first[0] + (number + 1) * interval - time.monotonic())

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next((x for x in head.split("\r\n") if x.startswith("content-length:")), ":0")
        await reader.readexactly(int(length.split(":")[1]))
        is_generate = GENERATE_PATH in head.partition("\r\n")[0]
        accepted = next((t for t in bodies if t != JSON and f"accept: {t}" in head), JSON)
        body = bodies[accepted] if is_generate else None
        if is_generate:
            await until_due()
        size, media_type = (body.stat().st_size, accepted) if body else (len(AWAKE), JSON)
        lines = ("HTTP/1.1 200 OK", f"Content-Type: {media_type}", f"Content-Length: {size}")
        writer.write("\r\n".join((*lines, "Connection: close\r\n\r\n")).encode())
        if body is None:
            writer.write(AWAKE)
        else:
            await writer.drain()
            with body.open("rb") as file:
                await asyncio.get_running_loop().sendfile(writer.transport, file)
        writer.close()

    async def run() -> None:
        servers = [await asyncio.start_server(answer, "127.0.0.1", 0) for _ in range(count)]
        ports = (server.sockets[0].getsockname()[1] for server in servers)
        urls.send([f"http://127.0.0.1:{port}" for port in ports])
        await asyncio.Event().wait()

    asyncio.run(run())


class SyntheticServer(RunningServer):
    """One of the servers of `serve_engines`, as a fleet uses it."""

    def __init__(self, urls: list[str], *_: Any, **settings: Any) -> None:
        super().__init__(urls.pop())


def serve_ranks(
    ranks: range, address: str, token: str, world_size: int, data_parallel_size: int
) -> None:
    """Be `ranks` of `world_size` until killed; the first rank of each replica gets its samples.

    Args:
        ranks: the ranks that this process stands for.
        address: the controller's, "host:port".
        token: the secret that calls carry.
        world_size: trainer ranks in all.
        data_parallel_size: replicas."""
    context = zmq.Context(io_threads=1)
    context.max_sockets = len(ranks) + 1
    poller, own_sockets = zmq.Poller(), {}
    for rank in ranks:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, rank_identity(rank))
        protect_client(socket, token)
        socket.connect(address)
        socket.send(
            msgspec.msgpack.encode(RankReply(rank, describe(rank, world_size, data_parallel_size)))
        )
        poller.register(socket, zmq.POLLIN)
        own_sockets[socket] = rank
    while True:
        for socket, _ in poller.poll():
            result = receive(socket)
            socket.send(msgspec.msgpack.encode(RankReply(own_sockets[socket], METRICS | result)))


def describe(rank: int, world_size: int, data_parallel_size: int) -> dict[str, Any]:
    """Return `RankServer.describe` of a rank: `data_parallel_size` equal blocks of ranks.

    Args:
        rank: the rank.
        world_size: trainer ranks in all.
        data_parallel_size: replicas."""
    size = world_size // data_parallel_size
    return {
        "rank": rank,
        "data_rank": rank // size,
        "data_parallel_size": data_parallel_size,
        "is_last_stage": rank == world_size - 1,
        "is_replica_leader": rank % size == 0,
        "num_parameters": 0,
        "has_new_score_head": False,
        "process_id": os.getpid(),
    }


def receive(socket: zmq.Socket[bytes]) -> dict[str, Any]:
    """Receive a call; return the numbers of samples and tokens that came with it."""
    message, *parts = socket.recv_multipart(copy=False)
    msgspec.msgpack.decode(message.buffer, type=RankCall)
    if not parts:
        return {}
    share = decode_samples(parts[0].buffer, memoryview(b"".join(p.buffer for p in parts[1:])))
    samples = [sample for step in share for microbatch in step for sample in microbatch]
    return {"samples": len(samples), "tokens": sum(len(sample) for sample in samples)}
