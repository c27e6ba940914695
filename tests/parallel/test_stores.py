"""The stores of a run listen where its own processes are, and nowhere else."""

import json
import socket
from pathlib import Path

import pytest
from ranks import run_ranks

from megatron_r1.models.rendezvous_store import _create_listener

HERE = Path(__file__).parent
EVERYWHERE = ("::", "0.0.0.0")


def stores(rollout, master="127.0.0.1"):
    output = run_ranks(HERE, 2, "listening_ranks.py", json.dumps(rollout), master)
    return json.loads(output.splitlines()[-1])


@pytest.mark.more
def test_a_local_run_listens_at_the_loopback_interface_only():
    found = stores({}, "localhost")
    assert found == {"host": "127.0.0.1", "trainer": "127.0.0.1", "push": "127.0.0.1"}


@pytest.mark.more
def test_engines_on_other_hosts_have_the_push_at_the_address_given_to_them():
    found = stores({"placement": "hosts", "hosts_address": "127.0.0.1"})
    assert found["trainer"] == found["push"] == "127.0.0.1"


def own_addresses():
    """Addresses of this host's interfaces, with the loopback interface's."""
    import psutil

    every = [each for kind in psutil.net_if_addrs().values() for each in kind]
    return [each.address for each in every if each.family == socket.AF_INET]


@pytest.mark.parametrize("address", own_addresses())
def test_an_address_of_this_host_is_the_only_one(address):
    with _create_listener(address, 0) as listening:
        bound = listening.getsockname()[0]
    is_name_for_loopback = address.startswith("127.") and address != "127.0.0.1"
    assert bound == address or (is_name_for_loopback and bound in EVERYWHERE)


def test_an_address_that_is_translated_on_the_way_listens_everywhere():
    with _create_listener("192.0.2.1", 0) as listening:  # RFC 5737: of no host
        assert listening.getsockname()[0] in EVERYWHERE


def test_a_host_whose_name_is_its_own_loopback_listens_everywhere(monkeypatch):
    place = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: place)
    with _create_listener("node-0", 0) as listening:
        assert listening.getsockname()[0] in EVERYWHERE


def test_a_port_that_is_taken_is_an_error():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match="in use"),
    ):
        _create_listener("127.0.0.1", taken.getsockname()[1])
