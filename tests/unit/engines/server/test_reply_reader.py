"""Samples as bytes: what the client makes of them equals what it makes of the same JSON."""

import asyncio
import gc
import json
import os
import struct
import tempfile
from array import array
from base64 import b64encode
from io import BytesIO

import numpy as np
import pytest
from aiohttp import web
from fakes.loopback import serving

from megatron_r1.base.errors import RunError
from megatron_r1.engines.server.client import EngineClient
from megatron_r1.engines.server.errors import EngineFault
from megatron_r1.engines.server.reply_reader import MEDIA_TYPE
from megatron_r1.engines.server.stop_strings import truncate_response
from megatron_r1.models.routing_shape import RoutingShape

SHAPE = RoutingShape(num_layers=4, moe_layers=(1, 3), topk=2, num_experts=8)
PROMPT = [3, 4, 5]
# The smallest and largest of float32, a denormal, and numbers that decimal text rounds.
LOGPROBS = [-0.0, -1e-45, -1.1754944e-38, -0.1, -1 / 3, -16777217.5e-7, -9998.999, -0.5]


def choice(logprobs, spans, finish_reason="stop", routed=True):
    """(token ids, log-probabilities, spans, finish reason, rows of experts)."""
    ids = [7 * i % 50 for i in range(len(logprobs))]
    rows = np.zeros((len(PROMPT) + len(ids) - 1, 4, 2), np.uint8)
    rows[:, 1], rows[:, 3] = (1, 2), (7, 0)
    rows[-1, 3] = (3, 5)
    floats = np.array(logprobs, np.float32).tolist()
    return ids, floats, spans, finish_reason, rows if routed else None


def named(spans) -> list[dict]:
    return [dict(zip(("version", "start", "end"), span, strict=True)) for span in spans]


def as_json(choices) -> bytes:
    found = []
    for ids, logprobs, spans, finish_reason, rows in choices:
        file = BytesIO()
        if rows is not None:
            np.save(file, rows)
        content = [{"token_id": i, "logprob": p} for i, p in zip(ids, logprobs, strict=True)]
        found.append(
            {
                "token_ids": ids,
                "logprobs": {"content": content},
                "finish_reason": finish_reason,
                "weight_versions": [
                    dict(zip(("version", "start", "end"), s, strict=True)) for s in spans
                ],
                "routed_experts": None if rows is None else b64encode(file.getvalue()).decode(),
            }
        )
    return json.dumps({"choices": found}).encode()


def as_bytes(choices) -> bytes:
    """The format as `reply_reader` describes it, written with `struct`."""
    header = {"choices": []}
    tokens = experts = b""
    for ids, logprobs, spans, finish_reason, rows in choices:
        header["choices"].append(
            {
                "num_tokens": len(ids),
                "finish_reason": finish_reason,
                "weight_versions": [
                    dict(zip(("version", "start", "end"), s, strict=True)) for s in spans
                ],
                "routed_experts": None if rows is None else {"dtype": "|u1", "shape": rows.shape},
            }
        )
        tokens += struct.pack(f"<{len(ids)}i{len(ids)}f", *ids, *logprobs)
        experts += b"" if rows is None else rows.tobytes()
    encoded = json.dumps(header).encode()
    return struct.pack("<I", len(encoded)) + encoded + tokens + experts


def responses_to(body: bytes, media_type: str, *, n: int, routing=SHAPE, **asked):
    async def run():
        async def handle(request):
            assert request.path == "/inference/v1/generate"
            assert MEDIA_TYPE in request.headers["Accept"]
            return web.Response(body=body, content_type=media_type)

        async with serving(handle) as url, EngineClient(url, vocab_size=50) as client:
            return await client.generate(PROMPT, n=n, max_tokens=9, routing=routing, **asked)

    return asyncio.run(run())


def with_masks(choices, masks) -> tuple[bytes, bytes]:
    """A reply as JSON and as bytes, its choices without experts and with kept tokens."""
    body = json.loads(as_json(choices))
    header = {"choices": []}
    tokens = b""
    for (ids, logprobs, spans, finish_reason, _), kept, each in zip(
        choices, masks, body["choices"], strict=True
    ):
        each["sampling_mask"] = kept
        numbers = [len(row) for row in kept] + [token for row in kept for token in row]
        header["choices"].append(
            {
                "num_tokens": len(ids),
                "finish_reason": finish_reason,
                "weight_versions": named(spans),
                "sampling_mask": 4 * len(numbers),
            }
        )
        tokens += struct.pack(f"<{len(ids)}i{len(ids)}f", *ids, *logprobs)
        tokens += struct.pack(f"<{len(numbers)}i", *numbers)
    encoded = json.dumps(header).encode()
    return json.dumps(body).encode(), struct.pack("<I", len(encoded)) + encoded + tokens


CUT = {"routing": None, "top_k": 4, "sampling_mask": True}


def test_kept_tokens_come_as_bytes_and_in_json():
    choices = [
        choice([-0.5, -0.25, 0.0], [("3", 0, 3)], routed=False),
        choice([], [], "abort", routed=False),
        choice([-0.25], [("4", 0, 1)], "length", routed=False),
    ]
    as_text, as_numbers = with_masks(choices, [[[0, 9], [3, 7, 8], [14]], [], [[0, 49]]])
    found = responses_to(as_numbers, MEDIA_TYPE, n=3, **CUT)
    assert found == responses_to(as_text, "application/json", n=3, **CUT)
    counts_and_ids = [2, 3, 1, 0, 9, 3, 7, 8, 14], [], [2, 0, 49]
    assert [list(array("i", each.sampling_mask)) for each in found] == [*counts_and_ids]
    assert (
        truncate_response(found[0], 3, 2, "stop").sampling_mask
        == array("i", [2, 3, 0, 9, 3, 7, 8]).tobytes()
    )
    # Without the request for them they are read and dropped.
    uncut = responses_to(as_numbers, MEDIA_TYPE, n=3, routing=None)
    assert [each.sampling_mask for each in uncut] == [b""] * 3


@pytest.mark.parametrize(
    ("kept", "shows"),
    [
        ([], ["0 numbers", "2 tokens"]),
        ([[0, 1], [6, 8]], ["token 7", "2"]),
        ([[0], []], ["token 7", "return-sampling-mask"]),
        ([[0], [7, 50]], ["50"]),
        ([[0], [7, 7]], ["rise"]),
        ([[0], [7], [8]], ["numbers"]),
    ],
)
def test_kept_tokens_that_do_not_fit_are_refused(kept, shows):
    choices = [choice([-0.5, -0.25], [("3", 0, 2)], routed=False)]
    as_text, as_numbers = with_masks(choices, [kept])
    for body, kind in ((as_text, "application/json"), (as_numbers, MEDIA_TYPE)):
        with pytest.raises(EngineFault) as caught:
            responses_to(body, kind, n=1, **CUT)
        assert all(word in str(caught.value) for word in shows) or not kept, str(caught.value)


@pytest.mark.parametrize("routing", [SHAPE, None])
def test_bytes_and_json_give_the_same_responses(routing):
    routed = routing is not None
    choices = [
        choice(LOGPROBS, [("3", 0, 5), ("4", 5, 8)], routed=routed),
        choice([], [], "abort", routed=routed),
        choice([-0.25], [("4", 0, 1)], "length", routed=routed),
    ]
    found = responses_to(as_bytes(choices), MEDIA_TYPE, n=3, routing=routing)
    assert found == responses_to(as_json(choices), "application/json", n=3, routing=routing)
    first = found[0]
    assert first.logprobs.tobytes() == array("f", LOGPROBS).tobytes()  # also the sign of zero
    assert first.policy_versions.tolist() == [3] * 5 + [4] * 3
    assert [each.finish_reason for each in found] == ["stop", "abort", "length"]
    if routed:
        assert bytes(first.routing) == choices[0][4][:, [1, 3]].tobytes()


@pytest.mark.parametrize(
    "bad",
    [
        choice([float("nan")], [("0", 0, 1)]),
        choice([float("inf")], [("0", 0, 1)]),
        choice([-9999.0], [("0", 0, 1)]),
        choice([-0.5, -0.5], [("0", 0, 1)]),
        choice([-0.5, -0.5], [("0", 1, 2), ("0", 0, 1)]),
        choice([-0.5], [("default", 0, 1)]),
        choice([-0.1] * 9, [("0", 0, 9)])[:4] + (np.zeros((11, 4, 2), np.uint8),),
        choice([-0.1] * 9, [("0", 0, 9)])[:4] + (np.full((11, 4, 2), 8, np.uint8),),
        choice([-0.1] * 9, [("0", 0, 9)])[:4] + (np.zeros((10, 4, 2), np.uint8),),
        choice([-0.1], [("0", 0, 1)], routed=False),
        ([50], [-0.1], [("0", 0, 1)], "stop", choice([-0.1], [])[4]),
        ([-1], [-0.1], [("0", 0, 1)], "stop", choice([-0.1], [])[4]),
    ],
)
def test_what_json_refuses_bytes_refuse(bad):
    with pytest.raises(EngineFault) as of_json:
        responses_to(as_json([bad]), "application/json", n=1)
    with pytest.raises(EngineFault) as of_bytes:
        responses_to(as_bytes([bad]), MEDIA_TYPE, n=1)
    if not any(np.isnan(bad[1])) and not any(np.isinf(bad[1])):  # no JSON: vLLM sends -9999
        reason = str(of_bytes.value).partition("generate: ")[2]
        assert reason and reason in str(of_json.value)


@pytest.mark.parametrize("kept", [2, 30, -1])
def test_a_reply_that_ends_early_is_a_fault(kept):
    body = as_bytes([choice(LOGPROBS, [("3", 0, 8)])])[:kept]
    with pytest.raises(EngineFault, match="generate"):
        responses_to(body, MEDIA_TYPE, n=1)


def test_routing_is_in_a_file_that_goes_with_the_responses(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def opened():
        links = (f"/proc/self/map_files/{name}" for name in os.listdir("/proc/self/map_files"))
        return sum(os.readlink(link).startswith(f"{tmp_path}/#") for link in links)

    found = responses_to(as_bytes([choice(LOGPROBS, [("3", 0, 8)])] * 2), MEDIA_TYPE, n=2)
    assert opened() == 1
    kept = found[1].routing
    del found
    gc.collect()
    assert kept[-2:].tolist() == [3, 5] and opened() == 1
    del kept
    gc.collect()
    assert opened() == 0


def test_a_disk_without_room_for_routing_is_named(monkeypatch):
    class Full(BytesIO):
        def write(self, content):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(RunError, match="No space left on device.*TMPDIR"):
        responses_to(as_bytes([choice(LOGPROBS, [("3", 0, 8)])]), MEDIA_TYPE, n=1)
