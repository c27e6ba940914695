"""Experts on their way from the engine's answer to the rank that replays them."""

import base64
import io
import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from refusals import raised, refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands import rl
from megatron_r1.config import Config
from megatron_r1.engines.server.json_replies import decode_routing
from megatron_r1.engines.server.server import EngineServer
from megatron_r1.models.routing_shape import RoutingShape, routing_shape
from megatron_r1.trainer.routing import RoutingScatter, RoutingShard
from megatron_r1.trainer.sequence_packing import pack_batch
from megatron_r1.trainer.token_split import TokenSplit
from megatron_r1.trainer.training_sample import Sample

CPU = torch.device("cpu")
SMALL = RoutingShape(num_layers=4, moe_layers=(1, 2, 3), topk=2, num_experts=256)
LARGE = RoutingShape(num_layers=4, moe_layers=(1, 2, 3), topk=2, num_experts=300)
DENSE = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 2}


def as_npy(rows) -> str:
    file = io.BytesIO()
    np.save(file, rows)
    return base64.b64encode(file.getvalue()).decode()


def engine_rows(shape: RoutingShape, num_rows: int, seed: int = 0):
    """[rows, all layers, topk] as vLLM gives them: distinct experts, dense layers 0."""
    draw = np.random.default_rng(seed)
    rows = np.zeros((num_rows, shape.num_layers, shape.topk), f"u{shape.index_bytes}")
    for row in rows:
        for layer in shape.moe_layers:
            row[layer] = draw.permutation(shape.num_experts)[: shape.topk]
    return rows


def test_deepseek_v3_has_464_bytes_of_routing_per_token():
    hf_config = {"num_hidden_layers": 61, "first_k_dense_replace": 3, "n_routed_experts": 256}
    shape = routing_shape(hf_config | {"num_experts_per_tok": 8})
    assert shape.moe_layers == tuple(range(3, 61)) and shape.token_bytes == 58 * 8
    with refused("rl.routing_replay", Cause.CONFLICT, "Qwen2ForCausalLM"):
        routing_shape(DENSE)


def test_a_dense_model_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    config = {"model": {"path": str(tmp_path)}, "rl": {"routing_replay": True}}
    with refused("rl.routing_replay", Cause.CONFLICT, "Qwen2ForCausalLM"):
        rl.run(Config.model_validate(config))


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_experts_survive_the_way_from_the_engine_to_the_packed_batch(shape):
    """Two samples; of the second the engine gave the last 2 of 4 rows only."""
    whole, part = engine_rows(shape, 4), engine_rows(shape, 4, seed=1)[2:]
    first, second = decode_routing(as_npy(whole), shape, 5), part[:, 1:].tobytes()
    assert len(first) == 4 * shape.token_bytes
    samples = [
        Sample.pack([7, 8, 9], [10, 11], [-1.0, -2.0], 1.0, first),
        Sample.pack([5], [6, 1, 2, 3], [-1.0] * 4, 1.0, second),
    ]
    samples = msgspec.msgpack.decode(msgspec.msgpack.encode(samples), type=list[Sample])
    batch = pack_batch(samples, TokenSplit(token_multiple=4), CPU, RoutingShard(shape, [0, 2]))
    experts, known = batch.routing.experts, batch.routing.is_recorded
    assert batch.routing.local_counts is None, "the trainer routes two tokens that are read"
    assert known.tolist() == [*[True] * 4, False, False, False, True, True, False, False, False]
    assert experts[known].tolist() == [*whole[:, [1, 3]].tolist(), *part[:, [1, 3]].tolist()]
    assert experts.element_size() == shape.index_bytes


def test_ranks_hold_their_own_tokens_of_the_routing():
    """Sequence and context parallelism: every rank's routing is that of its tokens, in order."""
    rows = engine_rows(SMALL, 10)
    sample = Sample.pack([1], list(range(2, 12)), [-1.0] * 10, 1.0, rows[:, 1:].tobytes())
    by_token = {t + 1: row for t, row in enumerate(rows[:, 1:].tolist())}  # token t + 1 is at t
    for context_rank in range(2):
        split = TokenSplit(tensor_size=2, context_size=2, context_rank=context_rank)
        tokens = pack_batch([sample], split, CPU).input_ids[0]
        for tensor_rank in range(2):
            part = RoutingShard(SMALL, [0, 1, 2])
            split = replace(split, tensor_rank=tensor_rank)
            experts, known, counts, _ = pack_batch([sample], split, CPU, part).routing
            chosen_by_all = torch.stack(
                [
                    torch.bincount(x.flatten(), minlength=SMALL.num_experts)
                    for x in experts.long().unbind(1)
                ]
            )
            assert torch.equal(chosen_by_all, torch.from_numpy(counts)), "padding has experts, too"
            assert all(len({*row}) == SMALL.topk for rows in experts.tolist() for row in rows)
            own = tokens.chunk(2)[tensor_rank].tolist()
            assert known.tolist() == [token in by_token for token in own]
            for token, chosen in zip(own, experts.tolist(), strict=True):
                assert token not in by_token or chosen == by_token[token]


def test_without_replay_nothing_is_carried():
    sample = Sample.pack([1], [2, 3], [-1.0, -1.0])
    assert sample.routing == b"" and pack_batch([sample], TokenSplit(), CPU).routing is None
    batch = pack_batch([sample], TokenSplit(), CPU, RoutingShard(SMALL, [0]))
    assert not batch.routing.is_recorded.any()
    empty = pack_batch([], TokenSplit(tensor_size=2, tensor_rank=1), CPU, RoutingShard(SMALL, [0]))
    assert empty.routing.is_recorded.tolist() == [False]


def test_what_the_engine_gives_is_checked():
    rows = engine_rows(SMALL, 4)
    with raised(ValueError, "--enable"):
        decode_routing(None, SMALL, 5)
    with raised(ValueError, [4, 4, 2], [5, 4, 2]):
        decode_routing(as_npy(rows), SMALL, 6)
    with raised(ValueError, [4, 3, 2], [4, 4, 2]):
        decode_routing(as_npy(rows[:, 1:]), SMALL, 5)
    with raised(ValueError, [4, 4, 2]):
        decode_routing(as_npy(rows[..., :1]), SMALL, 5)
    with raised(ValueError, ".npy"):
        decode_routing("AAAA", SMALL, 5)
    few = RoutingShape(4, (1, 2, 3), 2, num_experts=8)
    with raised(ValueError, 8):
        decode_routing(as_npy(np.maximum(rows, 8 + np.arange(2, dtype="u1"))), few, 5)
    wide = rows.astype("<i4")
    wide[2, 3, 1] = 300  # 44 in one byte
    with raised(ValueError, 300, 256):
        decode_routing(as_npy(wide), SMALL, 5)
    with raised(ValueError, "token 0", "expert 0", "layer 0"):
        decode_routing(as_npy(rows), RoutingShape(4, (0, 1, 2, 3), 2, 256), 5)


def test_routing_that_does_not_fit_its_sample_is_refused():
    part = RoutingShard(SMALL, [0])
    for routing, shows in ((bytes(7), (7, 6)), (bytes(18), (3,))):
        with raised(ValueError, *shows):
            pack_batch([Sample.pack([1], [2, 3], None, 1.0, routing)], TokenSplit(), CPU, part)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_engine_is_started_for_it(tmp_path, device):
    server = EngineServer(tmp_path, tmp_path / "log", device=device, return_routing=True)
    arguments, environment = server.arguments, server.environment
    assert "--enable-return-routed-experts" in arguments
    assert ("--enable-prefix-caching" in arguments) == (device == "cuda")
    assert environment.get("VLLM_USE_V2_MODEL_RUNNER") == ("1" if device == "cuda" else None)
    plain = EngineServer(tmp_path, tmp_path / "log", device=device)
    assert "--enable-return-routed-experts" not in plain.arguments


class SmallReplica:
    """A member of a replica whose members are in one process.

    Attributes:
        sent: member → what the leader has sent to it."""

    def __init__(self, everyone, member, sent):
        self.everyone, self.member, self.sent = everyone, member, sent
        self.is_leader = member == 0

    def all_gather(self, own):
        assert own == self.everyone[self.member]
        return self.everyone

    def send(self, content, member):
        self.sent[member] = content
        return []

    def receive(self, num_bytes):
        content = self.sent.pop(self.member)
        assert len(content) == num_bytes
        return content


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_the_leader_sends_each_rank_what_it_would_cut_itself(shape):
    """Three stages, the last without experts, of two tensor and two context ranks; the last
    micro-batch is empty."""
    samples = [
        Sample.pack([1], list(range(2, 2 + n)), [-1.0] * n, 1.0, rows[:, 1:].tobytes())
        for n, rows in ((n, engine_rows(shape, n, seed=n)) for n in (9, 4, 12))
    ]
    microbatches = [samples[:2], samples[2:], []]
    splits = [
        TokenSplit(tensor_size=2, context_size=2, context_rank=context, tensor_rank=tensor)
        for context in range(2)
        for tensor in range(2)
    ]
    everyone = [(split, layers) for layers in ([0, 2], [1], []) for split in splits]
    sent: dict[int, torch.Tensor] = {}
    for member, (split, layers) in enumerate(everyone):
        part = RoutingShard(shape, layers)
        replica = SmallReplica(everyone, member, sent)
        have = microbatches if member == 0 else without_experts(microbatches)
        scatter = RoutingScatter(replica, split, part)
        found = scatter.scatter(have)
        if member == 0:
            assert len(sent) == 11 and scatter.sent_bytes == sum(map(len, sent.values()))
        for got, whole in zip(found, microbatches, strict=True):
            wanted = pack_batch(whole, split, CPU, part).routing
            assert got.experts.dtype == wanted.experts.dtype
            assert torch.equal(got.experts, wanted.experts) and torch.equal(
                got.is_recorded, wanted.is_recorded
            )
    assert not sent


def without_experts(microbatches):
    return [[msgspec.structs.replace(s, routing=b"") for s in samples] for samples in microbatches]
