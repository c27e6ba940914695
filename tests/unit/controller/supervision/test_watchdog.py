"""Runs without progress, of real roles without engines and ranks: how they are diagnosed."""

import asyncio
import contextlib
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from fakes.openai_server import FakeServer
from prometheus_client.parser import text_string_to_metric_families
from r1_grading import RewardPool
from refusals import refused
from small_qwen2 import MODEL
from waiting import until

from megatron_r1.base.errors import Cause
from megatron_r1.config import RewardsConfig, parse_recipe
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.rollout import RolloutSampling
from megatron_r1.controller.rollouts.teacher_fleets import TeacherFleets
from megatron_r1.controller.run_recorder import RunRecorder
from megatron_r1.controller.supervision.hang_diagnosis import grid_coordinates
from megatron_r1.controller.supervision.supervisor import Supervisor
from megatron_r1.controller.supervision.watchdog import HangError, Watchdog
from megatron_r1.controller.trainer_calls.client import PendingCall, TrainerClient
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server.client import EngineClient
from megatron_r1.engines.server.server import EngineServer
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer.distributed import GridPosition
from megatron_r1.trainer.rank_server import RankServer

QUESTION = "What is 6 x 7?"
TEXT = SimpleNamespace(encode=lambda question, before=(): [5], stop_token_ids=[1])
"""In place of a tokenizer: every question is one token."""
GRADERS = """
import pathlib, time
from r1_grading import Grade

def when_let(response, truth, **entry):
    while not pathlib.Path(truth).exists():
        time.sleep(0.02)
    return Grade(1.0)
"""
HUNG_ENGINE = """
import socket, time
from megatron_r1.engines.plugin import dump_stacks_on_signal

def waits_for_a_collective():
    time.sleep(10_000)

dump_stacks_on_signal()
server = socket.create_server(("127.0.0.1", 0))  # accepts nothing
print(server.getsockname()[1], flush=True)
waits_for_a_collective()
"""


class Run:
    """A run of a recorder, a trainer whose ranks never come, reward workers and no engine."""

    def __init__(self, folder: Path, **settings):
        model = folder / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(MODEL))
        tree = {"run": {"folder": str(folder / "run"), "steps": 5, **settings}}
        self.config = parse_recipe(tree | {"model": {"path": str(model)}})
        self.folder = Path(self.config.run.folder)

    @contextlib.asynccontextmanager
    async def supervised(self):
        with RunFolder(self.folder) as folder:
            self.recorder = RunRecorder(folder, self.config, may_change=(), title="test")
            self.trainer = TrainerClient(self.config, folder.path / "logs")
            self.supervisor = Supervisor(
                self.config, self.recorder, self.trainer, spans_nodes=False
            )
            async with RewardPool(1, timeout_seconds=1e5) as pool:
                fleet = EngineFleet(1, folder.path / "logs")
                self.collector = RolloutCollector(fleet, pool, TEXT, RewardsConfig())
                self.recorder.view.show_phase("rollout")
                self.supervisor.watch_rollouts(self.collector)
                yield self.supervisor
            await self.trainer.close()

    async def start_grader(self) -> None:
        """Start the reward worker, which may take longer than a run may be quiet here."""
        await self.collector.pool.grade("graders:when_let", "42", str(self.folder))

    async def grade(self, gate: Path) -> None:
        """Grade one answer, which takes until `gate` exists."""
        with self.collector.in_flight.group(
            make_prompt(QUESTION, "graders:when_let", "", {})
        ) as group:
            group.sampling_done([])
            await self.collector.pool.grade("graders:when_let", "42", str(gate), question=QUESTION)

    async def get(self, path: str) -> tuple[int, str]:
        address = (self.folder / "health_address").read_text().strip()
        async with aiohttp.ClientSession() as session, session.get(address + path) as answer:
            return answer.status, await answer.text()


@pytest.fixture(autouse=True)
def graders(tmp_path, monkeypatch):
    folder = tmp_path / "graders"
    folder.mkdir()
    (folder / "graders.py").write_text(textwrap.dedent(GRADERS))
    monkeypatch.syspath_prepend(str(folder))


def test_an_engine_that_starts_does_not_hide_a_trainer_that_hangs(tmp_path):
    """It may wait for the trainer's weights itself, and then for as long as the trainer hangs."""
    run = Run(tmp_path, hang_seconds=0.5)

    async def body(work):
        async with run.supervised() as supervisor:
            server = EngineServer(run.config.model.path, tmp_path / "engine-0.log")
            engine = Engine(0, server, EngineClient(""), is_up=False)
            run.collector.fleet.engines.append(engine)
            async with supervisor.watching():
                await work()

    asyncio.run(body(lambda: asyncio.sleep(1.5)))  # nothing moves, but an engine starts
    with pytest.raises(HangError, match="trainer: 'start'"):
        asyncio.run(body(lambda: run.trainer.connect()))


@pytest.mark.parametrize("ends", [ValueError, None])
def test_an_error_while_watching_ends_leaves_how_the_block_ended(tmp_path, monkeypatch, ends):
    """As where the run's folder is gone, and with it the file of a blocked loop's stacks."""
    run = Run(tmp_path)

    async def watch(self):
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("stale file handle")

    monkeypatch.setattr(Watchdog, "watch", watch)

    async def body():
        async with run.supervised() as supervisor:
            async with supervisor.watching():
                await asyncio.sleep(0.01)
                if ends:
                    raise ends("of the block")
            return "exported"

    if ends:
        with pytest.raises(ends, match="of the block"):
            asyncio.run(body())
    else:
        assert asyncio.run(body()) == "exported"


def test_a_block_that_ends_in_spite_of_a_hang_counts_as_it_ended(tmp_path, monkeypatch):
    run = Run(tmp_path)

    async def watch(self):
        raise HangError("nothing moves")

    monkeypatch.setattr(Watchdog, "watch", watch)

    async def body():
        async with run.supervised() as supervisor:
            async with supervisor.watching():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
            await asyncio.sleep(0)  # it is not cancelled any more
            return "exported"

    assert asyncio.run(body()) == "exported"


def test_a_reward_that_hangs_stops_the_run_and_is_named(tmp_path):
    run = Run(tmp_path, hang_seconds=1.5)

    async def body():
        async with run.supervised() as supervisor:
            await run.start_grader()
            async with supervisor.watching():
                await run.grade(tmp_path / "never")

    with pytest.raises(HangError) as error:
        asyncio.run(body())
    message = str(error.value)
    assert all(word in message for word in ("rewards: 1 ", "graders:when_let", QUESTION))
    (report,) = (run.folder / "logs").glob("hang-*.txt")
    text = report.read_text()
    assert text.index("rewards: ") < text.index("trainer: ") < text.index("controller: ")
    assert "in grade:" in text, "the task that waits"
    assert not (run.folder / "health_address").exists()


def test_a_block_that_fails_or_is_cancelled_while_it_is_watched_ends_as_it_would_alone(tmp_path):
    """The second Ctrl-C cancels it, which is no hang."""
    run = Run(tmp_path, hang_seconds=1e5)

    async def body(end):
        async with run.supervised() as supervisor, supervisor.watching():
            await end()

    async def cancel():
        asyncio.current_task().cancel()
        await asyncio.sleep(1e5)

    async def fail():
        raise RuntimeError("engine died") from KeyError("its cause")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(body(cancel))
    with pytest.raises(RuntimeError, match="engine died") as error:
        asyncio.run(body(fail))
    assert isinstance(error.value.__cause__, KeyError)


def test_a_hang_is_raised_though_the_block_fails_when_it_is_cancelled(tmp_path):
    run, left = Run(tmp_path, hang_seconds=0.5), []

    async def body():
        async with run.supervised() as supervisor:
            try:
                async with supervisor.watching():
                    try:
                        await run.trainer.connect()
                    finally:
                        raise RuntimeError("cannot clean up")
            finally:
                # What waits for the checkpoint being written is not cancelled as well.
                left.append(asyncio.current_task().cancelling())
                await asyncio.sleep(0)

    with pytest.raises(HangError, match="trainer: 'start'"):
        asyncio.run(body())
    assert left == [0]


def test_a_call_without_replies_names_the_ranks(tmp_path):
    run = Run(tmp_path, hang_seconds=1.0)

    async def body():
        async with run.supervised() as supervisor, supervisor.watching():
            await run.trainer.connect()

    with pytest.raises(HangError, match="trainer: 'start' .*rank 0"):
        asyncio.run(body())


@pytest.mark.parametrize(("operation", "limit"), [("update", 10.0), ("export", 5000.0)])
def test_writing_files_may_take_as_long_as_ranks_wait_for_each_other(tmp_path, operation, limit):
    """A model of a terabyte shows no progress before it is written."""
    run = Run(tmp_path, hang_seconds=10.0)
    run.config = run.config.with_changes(parallel={"timeout_seconds": 5000.0})

    async def body():
        async with run.supervised() as supervisor:
            watchdog = supervisor._watchdog
            run.recorder.view.show_phase("train")
            run.trainer.pending_call = PendingCall(operation, 0.0, {0})
            watchdog._progress = watchdog.run.progress()
            for quiet, is_stalled in ((limit - 1.0, False), (limit, True)):
                watchdog._quiet = quiet
                assert watchdog.is_stalled == is_stalled
            run.trainer.pending_call = None

    asyncio.run(body())


@pytest.mark.more
def test_reported_once_and_health_says_so_until_it_moves(tmp_path, monkeypatch):
    run = Run(tmp_path, hang_seconds=1.0, on_hang="report")
    gate, messages = tmp_path / "gate", []
    seen = {}

    async def watch():
        watchdog = run.supervisor._watchdog
        watchdog.hang_seconds = 1e5
        grading = asyncio.create_task(run.grade(gate))
        await asyncio.sleep(0)
        run.recorder.record_step({"step": 1, "reward/mean": 0.25, "time/push": 3.0}, [])
        seen["at first"] = await run.get("/health")
        del messages[:]
        watchdog.hang_seconds = 1.0
        await until(lambda: messages)
        seen["stalled"] = await run.get("/health")
        seen["metrics"] = await run.get("/metrics")
        await asyncio.sleep(2.0)  # time for a second report, were there one
        seen["reports"] = list((run.folder / "logs").glob("hang-*.txt"))
        assert len(messages) == 1
        watchdog.hang_seconds = 1e5
        gate.touch()
        await grading
        seen["moving"] = await run.get("/health")
        await until(lambda: len(messages) == 2)  # it moves again

    async def body():
        async with run.supervised() as supervisor:
            monkeypatch.setattr(run.recorder.view, "show_message", messages.append)
            await run.start_grader()
            async with supervisor.watching():
                await watch()

    asyncio.run(body())
    assert len(seen["reports"]) == 1
    status, text = seen["at first"]
    health = json.loads(text)
    assert status == 200 and health["step"] == 1 and health["groups"]["grading"] == 1
    assert health["status"] == "degraded", "no rank has come"
    status, text = seen["stalled"]
    assert status == 503 and json.loads(text)["status"] == "stalled"
    assert seen["moving"][0] == 200
    families = {m.name: m for m in text_string_to_metric_families(seen["metrics"][1])}
    value = {name: family.samples[0].value for name, family in families.items() if family.samples}
    assert value["megatron_r1_step"] == 1 and value["megatron_r1_reward_mean"] == 0.25
    assert value["megatron_r1_stalled"] == 1 and value["megatron_r1_hang_reports"] == 1
    phases = families["megatron_r1_phase_seconds"].samples
    assert [(s.labels, s.value) for s in phases] == [({"phase": "push"}, 3.0)]
    in_flight = families["megatron_r1_groups_open"].samples
    counted = {s.labels["doing"]: s.value for s in in_flight}
    assert counted == {"sampling": 0, "grading": 1, "scoring": 0}


@contextlib.contextmanager
def hung_engine(server):
    """The address of a process that stands for `server`'s, takes calls and answers none."""
    with open(server.log_path, "wb") as log:
        command = [sys.executable, "-c", HUNG_ENGINE]
        server.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
    try:
        with server.process.stdout as said:
            yield f"http://127.0.0.1:{int(said.readline())}"
    finally:
        server.stop()


@pytest.mark.more
def test_an_engine_that_owes_a_group_is_named_with_it_and_asked_for_its_stacks(
    tmp_path, monkeypatch
):
    for limit in ("ANSWER_SECONDS", "STACKS_SECONDS"):
        monkeypatch.setattr(f"megatron_r1.controller.supervision.hang_diagnosis.{limit}", 3.0)
    run = Run(tmp_path, hang_seconds=0.5)
    asked = make_prompt(QUESTION, "math", "42", {})
    servers = [EngineServer(run.config.model.path, tmp_path / f"engine-{i}.log") for i in (0, 1)]

    async def body(busy_url, hung_url):
        busy, hung = EngineClient(busy_url), EngineClient(hung_url)
        async with run.supervised() as supervisor, busy, hung:
            engines = [
                Engine(0, servers[0], busy, num_running=2, accepts_groups=False),
                Engine(1, servers[1], hung),
            ]
            fleet = run.collector.fleet
            fleet.engines[:] = engines
            fleet.state.begin()  # as `start` would
            sampling = RolloutSampling(
                group_size=4, temperature=1.0, top_p=1.0, max_response_tokens=8
            )
            async with supervisor.watching():
                await run.collector.collect([asked], sampling)

    with (
        FakeServer(lambda *_: (501, "")) as busy,  # an error is an answer
        hung_engine(servers[1]) as hung_url,
        pytest.raises(HangError) as error,
    ):
        asyncio.run(body(busy.url, hung_url))
    headline = str(error.value).splitlines()[0]
    assert "engines: 1 " in headline and "engine-1: 4 " in headline
    assert "engine-0" not in headline
    (report,) = (run.folder / "logs").glob("hang-*.txt")
    text = report.read_text()
    assert asked.id in text and repr(QUESTION) in text
    stacks = text.split(f"stacks of processes {servers[1].process.pid}:")[1]
    assert "in waits_for_a_collective" in stacks.split("trainer: ")[0]


def test_a_teacher_that_says_nothing_is_what_everything_waits_for(tmp_path, monkeypatch):
    """Once the group's grades are back; the rewards are not to blame."""
    monkeypatch.setattr("megatron_r1.controller.supervision.hang_diagnosis.ANSWER_SECONDS", 0.2)
    run = Run(tmp_path, hang_seconds=0.5)
    asked = make_prompt(QUESTION, "math", "1", {})

    async def wait_for_teacher():
        with run.collector.in_flight.group(asked) as group:
            group.sampling_done([])
            group.await_teacher()
            await asyncio.sleep(1e5)

    async def body():
        async with run.supervised() as supervisor, EngineClient("") as client:
            teacher = EngineFleet(1, tmp_path, role="teacher")
            server = EngineServer(run.config.model.path, tmp_path / "teacher-0.log")
            teacher.engines.append(Engine(0, server, client, role="teacher", num_running=4))
            run.collector.teachers = TeacherFleets({"": teacher}, {"": run.config.model.path})
            async with supervisor.watching():
                await wait_for_teacher()

    with pytest.raises(HangError, match="teacher: 1 .*teacher-0: 4 "):
        asyncio.run(body())


def test_a_controller_that_was_suspended_has_not_hung(tmp_path):
    run = Run(tmp_path, hang_seconds=2.0)

    async def suspended():
        watchdog = run.supervisor._watchdog
        before = watchdog._quiet
        time.sleep(3.0)  # the whole process, as by SIGSTOP
        await until(lambda: watchdog._quiet != before)

    async def body():
        async with run.supervised() as supervisor, supervisor.watching():
            await suspended()

    asyncio.run(body())
    assert not list((run.folder / "logs").glob("hang-*.txt"))


def test_errors_of_the_work_are_raised_and_a_taken_port_is_named(tmp_path):
    run = Run(tmp_path, hang_seconds=0)

    async def fail():
        raise RuntimeError("engine died")

    async def body(port=None):
        async with run.supervised() as supervisor, supervisor.watching():
            await fail()

    with pytest.raises(RuntimeError, match="engine died"):
        asyncio.run(body())

    async def twice():
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        taken = Run(tmp_path / "taken", health_port=port)
        async with server, taken.supervised() as supervisor, supervisor.watching():
            await fail()

    (tmp_path / "taken").mkdir()
    with refused("run.health_port", Cause.BUSY):
        asyncio.run(twice())


def test_a_rank_is_named_with_its_place_on_the_grid():
    """From a rank's own reply: without one of the axes, every diagnosis ended with a KeyError."""
    grid_position = GridPosition(
        groups=SimpleNamespace(),
        rank=7,
        world_size=8,
        data_rank=2,
        data_parallel_size=4,
        tensor_rank=1,
        pipeline_rank=0,
        context_rank=1,
        expert_rank=3,
        is_last_stage=False,
    )
    server = object.__new__(RankServer)
    server.grid_position, server.replica = grid_position, SimpleNamespace(is_leader=True)
    server.trainer = SimpleNamespace(num_parameters=5, has_new_score_head=False)
    server.implementations = {}
    trainer = SimpleNamespace(ranks=[server.describe()])
    assert grid_coordinates(trainer, 0) == " (tensor 1, context 1, pipeline 0, expert 3, data 2)"
