"""A run over several hosts: trainer ranks in two network namespaces, an engine in a third or spread
over two more, with a cable that is pulled.

Processes and files are the machine's own; the network carries everything else, and with
push.transport gloo the weights too.
"""

import sys
import time

import namespaces
import pytest
from small_run import environment, metrics, write_recipe

from megatron_r1.base.transports import TRANSPORTS as ALL_TRANSPORTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(namespaces.obstacle() is not None, reason=str(namespaces.obstacle())),
]
GLOO = "gloo" in ALL_TRANSPORTS
TRANSPORTS = [
    pytest.param([], id="shm"),  # namespaces share the machine's /dev/shm
    pytest.param(
        ["--push.transport", "gloo"],
        id="gloo",
        marks=pytest.mark.skipif(not GLOO, reason="no gloo transport of weights is registered"),
    ),
]
AGENT = [sys.executable, "-m", "megatron_r1.engines.fleet.host"]


@pytest.fixture
def network():
    with namespaces.Network() as network:
        yield network


class Run:
    """`rl` under torchrun, one rank on each of two hosts, the controller on the first."""

    def __init__(self, network, recipe, folder, *settings):
        self.folder, self.run = folder, folder / "run"
        self.env = environment() | {"GLOO_SOCKET_IFNAME": "eth0"}
        self.trainers = [network.host(), network.host()]
        first = self.trainers[0].address
        common = ["--nnodes=2", "--nproc-per-node=1", f"--master-addr={first}"]
        launcher = [sys.executable, "-m", "torch.distributed.run", *common, "--master-port=29511"]
        command = ["-m", "megatron_r1", "rl", recipe, "--run.folder", self.run]
        command += ["--rollout.placement", "hosts", "--rollout.hosts_address", first]
        self.ranks = [
            host.start(
                [*launcher, f"--node-rank={i}", *command, "--parallel.tensor", 2, *settings],
                folder / f"rank-{i}.log",
                self.env,
            )
            for i, host in enumerate(self.trainers)
        ]

    def engines_on(self, host, env=None):
        log = self.folder / "host.log"
        return host.start([*AGENT, "--folder", self.run], log, self.env if env is None else env)

    def said(self):
        return "".join(log.read_text() for log in sorted(self.folder.glob("*.log")))

    def until(self, condition, seconds):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s\n{self.said()[-4000:]}"
            time.sleep(0.1)

    def steps(self):
        return (
            [line["step"] for line in metrics(self.run)]
            if (self.run / "metrics.jsonl").is_file()
            else []
        )


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_trainer_and_engine_on_hosts_of_their_own(network, recipe, tmp_path, transport):
    run = Run(network, recipe, tmp_path, *transport)
    agent = run.engines_on(network.host())
    run.until(lambda: all(rank.poll() is not None for rank in run.ranks), 300)
    assert [rank.returncode for rank in run.ranks] == [0, 0], run.said()[-4000:]
    assert run.steps() == [1, 2, 3]
    # Two hosts' halves of the model, and a third's copy of it, agree on every token.
    assert all(line["logprob_diff/max"] < 1e-4 for line in metrics(run.run))
    assert agent.wait(30) == 0


def test_an_engine_whose_experts_are_on_two_hosts(network, tmp_path):
    """Nobody says by which interface its ranks reach each other."""
    recipe = write_recipe(tmp_path, 3, "DEEPSEEK")
    spread = {
        "rollout.hosts_per_engine": 2,
        "rollout.data_parallel": 2,
        "rollout.expert_parallel": "true",
    }
    settings = [f"--{key}={value}" for key, value in (spread | {"push.transport": "gloo"}).items()]
    run = Run(network, recipe, tmp_path, *settings)
    agents = [run.engines_on(network.host(), environment()) for _ in range(2)]
    run.until(lambda: all(rank.poll() is not None for rank in run.ranks), 600)
    assert [rank.returncode for rank in run.ranks] == [0, 0], run.said()[-4000:]
    assert run.steps() == [1, 2, 3]
    assert all(line["logprob_diff/max"] < 1e-4 for line in metrics(run.run))
    assert [agent.wait(30) for agent in agents] == [0, 0]


def test_a_cable_is_pulled_and_plugged_in_again(network, recipe, tmp_path):
    """The only engine's host is cut off, which is noticed at both ends.

    When the line is back the engine is started again and the run goes on where it waited."""
    run = Run(network, recipe, tmp_path, "--rollout.host_silence_seconds", 6, "--run.steps", 400)
    host = network.host()
    run.engines_on(host)
    run.until(lambda: len(run.steps()) >= 2, 300)
    host.pull_cable()
    run.until(lambda: "was not heard from for 6 seconds; 1 engine lost with it" in run.said(), 60)
    run.until(lambda: "no word from tcp://" in run.said(), 60)
    before = run.steps()[-1]
    assert all(rank.poll() is None for rank in run.ranks)
    host.plug_in()
    run.until(lambda: run.steps()[-1] > before + 1, 240)
    assert "restart 1 of at most" in run.said()
    assert run.steps() == list(range(1, run.steps()[-1] + 1))


def test_a_line_that_is_down_for_less_than_is_tolerated_costs_no_engine(network, recipe, tmp_path):
    """Longer than ZeroMQ's heartbeats, so that both ends have closed it by then."""
    run = Run(network, recipe, tmp_path, "--rollout.host_silence_seconds", 30, "--run.steps", 400)
    host = network.host()
    run.engines_on(host)
    run.until(lambda: len(run.steps()) >= 2, 300)
    host.pull_cable()
    time.sleep(13)
    host.plug_in()
    before = run.steps()[-1]
    run.until(lambda: run.steps()[-1] > before + 1, 120)
    assert "lost" not in run.said() and "restart 1 of" not in run.said()
