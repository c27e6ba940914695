"""Messages without the token are ignored, and a run stops by a file as by a signal."""

import asyncio
import os
import socket as sockets

import msgspec
import zmq
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.base.processes.authentication import (
    TOKEN_VARIABLE,
    known_token,
    make_token,
    protect_client,
    protect_server,
)
from megatron_r1.base.processes.stopping import StopRequest
from megatron_r1.controller.trainer_calls.rank_socket import RankSocket
from megatron_r1.trainer.rank_messages import RankCall, RankReply, rank_identity


def rank(address, protect):
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, rank_identity(0))
    protect(socket)
    socket.connect(address)
    socket.send(msgspec.msgpack.encode(RankReply(0, {"data_parallel_size": 1})))
    return socket


def test_a_rank_with_the_token_is_heard_and_others_are_not():
    async def scenario():
        server = RankSocket("tcp://127.0.0.1:*", "right")
        strangers = [
            rank(server.address, lambda socket: None),
            rank(server.address, lambda socket: protect_client(socket, "wrong")),
        ]
        assert await server.reply(1.0) is None
        friend = rank(server.address, lambda socket: protect_client(socket, "right"))
        assert await server.reply(1e5) == RankReply(0, {"data_parallel_size": 1})
        await server.send(0, msgspec.msgpack.encode(RankCall("compute_logprobs")))
        assert await asyncio.to_thread(friend.poll)
        assert msgspec.msgpack.decode(friend.recv(), type=RankCall) == RankCall("compute_logprobs")
        for socket in [*strangers, friend]:
            socket.close(linger=0)
        server.close()

    asyncio.run(scenario())


def test_neither_token_nor_message_is_on_the_wire():
    """What a listener on the network would see of a connection."""
    token, secret, seen = "a token of this run", b"a sampled response" * 10, b""
    with sockets.socket() as tap:
        tap.bind(("127.0.0.1", 0))
        tap.listen()
        server = zmq.Context.instance().socket(zmq.ROUTER)
        protect_server(server, token)
        port = server.bind_to_random_port("tcp://127.0.0.1")
        client = zmq.Context.instance().socket(zmq.DEALER)
        protect_client(client, token)
        client.connect(f"tcp://127.0.0.1:{tap.getsockname()[1]}")
        client.send(secret)
        left, _ = tap.accept()
        with left, sockets.create_connection(("127.0.0.1", port)) as right:
            left.settimeout(0.05)
            right.settimeout(0.05)
            while not server.poll(0):
                for source, target in ((left, right), (right, left)):
                    try:
                        data = source.recv(65_536)
                    except TimeoutError:
                        continue
                    seen += data
                    target.sendall(data)
            assert server.recv_multipart()[1] == secret
        client.close(linger=0)
        server.close(linger=0)
    assert b"CURVE" in seen and secret[:16] not in seen and token.encode() not in seen


def test_the_file_is_its_owners_alone(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    token = make_token(tmp_path)
    file = tmp_path / "token"
    assert len(token) == 64 and file.stat().st_mode & 0o777 == 0o600
    assert make_token(tmp_path) == known_token(file) == token
    assert os.listdir(tmp_path) == ["token"]
    file.chmod(0o640)
    with refused("token", Cause.OUT_OF_RANGE, file, "600"):
        make_token(tmp_path)
    file.chmod(0o600)
    file.write_text("")
    with refused("token", Cause.EMPTY, file):
        known_token(file)
    with refused(TOKEN_VARIABLE, Cause.MISSING):
        known_token(tmp_path / "other")
    monkeypatch.setenv(TOKEN_VARIABLE, "given")
    assert make_token(tmp_path) == known_token(None) == "given"


def test_a_file_stops_a_run_until_the_request_is_fulfilled(tmp_path):
    stop = StopRequest()
    stop.watch(tmp_path)
    assert not stop.is_requested
    (tmp_path / "stop").touch()
    assert stop.is_requested and not stop.is_signalled
    stop.clear()
    assert not stop.is_requested and not (tmp_path / "stop").exists()
