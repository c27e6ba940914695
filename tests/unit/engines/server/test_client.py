"""EngineClient and EngineFleet against hand-written replies, without vLLM."""

import asyncio
import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from aiohttp import web
from fakes.loopback import serving
from vllm.entrypoints.launchers.launcher import create_server_socket

from megatron_r1.base.processes import fork_client
from megatron_r1.base.processes.log_excerpts import excerpt_log
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server.client import EngineClient
from megatron_r1.engines.server.errors import EngineDied, EngineError, EngineTimeout
from megatron_r1.engines.server.model_config import read_engine_hf_config
from megatron_r1.engines.server.server import EngineServer
from megatron_r1.push.control_messages import PushUpdateInfo


def choice(token_ids, logprobs, spans, finish_reason="stop"):
    return {
        "index": 0,
        "finish_reason": finish_reason,
        "token_ids": token_ids,
        "logprobs": {
            "content": [
                {"token_id": token, "logprob": logprob, "rank": 1, "top_logprobs": []}
                for token, logprob in zip(token_ids, logprobs, strict=False)
            ]
        },
        "weight_versions": [
            {"version": version, "start": start, "end": end} for version, start, end in spans
        ],
    }


def answer_to(answer, call, *, status=200, delay_seconds=0.0, timeout_seconds=1e5):
    """Run `call(client)` against a server that gives `answer`; returns (result, requests seen)."""
    seen = []

    async def handle(request):
        seen.append((request.method, request.path_qs, await request.read()))
        await asyncio.sleep(delay_seconds)
        return web.Response(
            status=status, text=answer if isinstance(answer, str) else json.dumps(answer)
        )

    async def run():
        async with (
            serving(handle) as url,
            EngineClient(url, timeout_seconds=timeout_seconds) as client,
        ):
            return await call(client)

    return asyncio.run(run()), seen


def generate(client, n=1):
    return client.generate([3, 4], n=n, max_tokens=5, stop_token_ids=[1])


def test_versions_are_spread_over_the_tokens_their_spans_name():
    answer = {"choices": [choice([7, 8, 1], [-0.5, -0.25, 0.0], [("4", 0, 1), ("6", 1, 3)])]}
    [response], seen = answer_to(answer, generate)
    assert response.token_ids.tolist() == [7, 8, 1]
    assert response.logprobs.tolist() == [-0.5, -0.25, 0.0]
    assert response.policy_versions.tolist() == [4, 6, 6]
    assert response.finish_reason == "stop"
    method, path, body = seen[0]
    assert (method, path) == ("POST", "/inference/v1/generate")
    assert json.loads(body)["token_ids"] == [3, 4]
    assert json.loads(body)["sampling_params"]["stop_token_ids"] == [1]


def test_an_aborted_response_without_tokens_is_empty():
    [response], _ = answer_to({"choices": [choice([], [], [], "abort")]}, generate)
    arrays = (response.token_ids, response.logprobs, response.policy_versions)
    assert [len(part) for part in arrays] == [0, 0, 0]


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (choice([7, 8], [-0.5], [("0", 0, 2)]), "2 .* 1 "),
        (choice([7], [-9999.0], [("0", 0, 1)]), "7 .*-9999"),
        (choice([7, 8], [-0.5, -0.5], [("0", 0, 1)]), "1 of 2 "),
        (choice([7, 8], [-0.5, -0.5], [("0", 0, 1), ("1", 0, 2)]), "generate"),
        (choice([7], [-0.5], [("default", 0, 1)]), "default"),
        (choice([7], [None], [("0", 0, 1)]), "logprob"),
    ],
)
def test_a_response_that_does_not_add_up_is_an_error(bad, shown):
    with pytest.raises(EngineError, match=shown):
        answer_to({"choices": [bad]}, generate)


def test_a_missing_response_of_a_group_is_an_error():
    answer = {"choices": [choice([7], [-0.5], [("0", 0, 1)])]}
    with pytest.raises(EngineError, match="2 .*1"):
        answer_to(answer, lambda client: generate(client, n=2))


def test_an_engine_that_does_not_use_what_arrived_is_refused_and_not_asked_again():
    what = "push 2: 1 tensors arrived and are not what the engine computes with: gate.bias"
    reply = {"kind": "undelivered_push", "error": what}
    with pytest.raises(EngineError, match=f"/swap_weights: {what}$") as info:
        answer_to(reply, lambda client: client.swap_weights({}, 2), status=409)
    assert type(info.value) is EngineError, "no fault of one call, which another would mend"


def test_an_engine_whose_core_ended_amid_a_swap_has_died():
    reply = {"kind": "core_ended", "error": "the engine's core has ended"}
    with pytest.raises(EngineDied, match="/swap_weights"):
        answer_to(reply, lambda client: client.swap_weights({}, 2), status=500)


def test_a_refused_call_quotes_url_status_and_body():
    with pytest.raises(EngineError, match=r"/pause\?mode=keep.*500.*weights on fire") as info:
        answer_to("weights on fire", lambda client: client.pause("keep"), status=500)
    assert info.value.status == 500


def test_a_silent_engine_is_an_error_after_the_timeout():
    with pytest.raises(EngineTimeout):
        answer_to({}, lambda client: client.resume(), delay_seconds=1e5, timeout_seconds=0.1)


def test_a_swap_is_one_call():
    push = PushUpdateInfo(8, timeout_seconds=30.0)
    _, seen = answer_to({"weight_version": "12"}, lambda client: client.swap_weights(push, 12))
    assert [path for _, path, _ in seen] == ["/swap_weights"]
    update = {"push_number": 8, "timeout_seconds": 30.0}
    call = {"update_info": update, "weight_version": "12", "resume": True}
    assert json.loads(seen[0][2]) == call


@pytest.mark.parametrize(
    ("config", "shown"),
    [(None, "config.json"), ("[1]", "config.json"), ("{}", "architectures")],
)
def test_a_folder_that_is_no_model_is_refused_before_launch(tmp_path, config, shown):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(EngineError, match=shown):
        EngineServer(tmp_path, tmp_path / "log").start()


def test_until_an_engine_listens_no_other_may_choose_its_port(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    process = SimpleNamespace(pid=None, poll=lambda: 0, kill=lambda: None, wait=lambda timeout: 0)
    monkeypatch.setattr(fork_client, "start", lambda *ignored: process)
    server = EngineServer(tmp_path, tmp_path / "log")
    server.start()
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(address)  # as `free_port` does
    with create_server_socket(address, reuse_port=False) as listener:
        listener.listen()
        socket.create_connection(address).close()


def test_a_folder_with_an_architecture_passes(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    read_engine_hf_config(tmp_path)


def test_the_root_cause_comes_before_its_echoes():
    log = """(APIServer pid=1) INFO 01-31 12:00:00 [api_server.py:9] starting
(EngineCore pid=2) ERROR 01-31 12:00:01 [core.py:7] Traceback (most recent call last):
(EngineCore pid=2) ERROR 01-31 12:00:01 [core.py:7]   File "x.py", line 1, in f
(EngineCore pid=2) ERROR 01-31 12:00:01 [core.py:7] ValueError: Model architectures ['Foo'] failed
(APIServer pid=1)     raise RuntimeError(
(APIServer pid=1)           ^^^^^^^^^^^^^
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
"""
    shown = excerpt_log(log).splitlines()
    assert shown[0] == "  ValueError: Model architectures ['Foo'] failed"
    assert shown[-1] == "  RuntimeError: Engine core initialization failed. See root cause above."


def test_a_log_that_repeats_itself_for_every_request_is_read_at_both_ends(tmp_path):
    server = EngineServer(tmp_path, tmp_path / "engine.log")
    echo = "(APIServer pid=1) ERROR 01-31 12:00:01 [a.py:1] DeadError: see above\n"
    server.log_path.write_text(f"ValueError: the cause\n{echo * 200_000}OSError: the end\n")
    shown = server.log_excerpt().splitlines()
    assert shown[0] == "  ValueError: the cause" and shown[-1] == "  OSError: the end"


def test_a_fleet_without_engines_and_a_call_before_start_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_engines"):
        EngineFleet(0, tmp_path)
    with pytest.raises(EngineError, match=r"start\(\)"):
        asyncio.run(EngineFleet(1, tmp_path).generate([3], n=1, max_tokens=1))


def test_the_controller_side_imports_neither_torch_nor_vllm():
    code = (
        "import sys, megatron_r1.engines.fleet.engine_fleet; "
        "print(sorted({'torch', 'vllm', 'megatron.core', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
