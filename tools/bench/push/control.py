"""The control path of a push to a set of engines, with a process per rank.

It has tiny weights, gloo, real rendezvous, groups, order of calls, and ranks that die in the
middle.

128 trainer ranks and 8 engines of 16 ranks, as planned by `push.matching.planned_links`. After an
undisturbed push, which is compared with the trainer's weights byte by byte, a second one is broken
off in each way of `FAULTS`; every rank that could not end it must say which rank was at fault."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.distributed import TCPStore

from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.base.processes.children import free_port
from megatron_r1.models.weights import hf_tensors
from megatron_r1.push.matching import EngineLayout, TrainerGrid
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.push.rendezvous import EngineRendezvous
from megatron_r1.push.sender import WeightSender
from megatron_r1.push.slots import slot_view
from megatron_r1.push.transports import gloo
from megatron_r1.push.transports.payloads import LinkPayload
from tools.bench.push.small_model import SHAPE, rank_tensors, slot_table

HF = SHAPE | {"num_hidden_layers": 8, "n_routed_experts": 32}
GRID = TrainerGrid(128, tensor=2, pipeline=4, expert=8)
ENGINE = EngineLayout(tensor_parallel=4, data_parallel=4, expert_parallel=True)
ENGINES = 8
NAME = "set.1"
CONNECT_SECONDS, PUSH_SECONDS = 300.0, 20.0
TRAINER, MEMBER, POSITION = 77, 3, 5
"""The trainer rank, the engine and the position of the faults."""
Place = tuple[str, int, int]
"""("trainer", rank, 0), or ("engine", number of the engine, rank in it)."""
FAULTS = ("none", "trainer rank killed", "engine rank killed", "engine killed", "engine rank hangs")


def control_path() -> dict[str, Any]:
    """Run the control path once with each fault; print and return what followed from it. "broken"
    has the faults whose outcome was not the expected one."""
    outcomes = {}
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            outcomes[fault] = _run_fault(fault, Path(folder))
        print(f"{fault}: {json.dumps(outcomes[fault], indent=1)}", flush=True)
    broken = [fault for fault, result in outcomes.items() if not result["right"]]
    return {
        "trainer ranks": GRID.world_size,
        "engine ranks": ENGINES * ENGINE.num_ranks,
        "push.timeout_seconds": PUSH_SECONDS,
        "faults": outcomes,
        "broken": broken,
    }


def _run_fault(fault: str, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, (shape, _) in hf_tensors(HF, with_mtp=False).items()
    }
    port = free_port("127.0.0.1")
    places = [("trainer", rank, 0) for rank in range(GRID.world_size)]
    places += [
        ("engine", member, rank) for member in range(ENGINES) for rank in range(ENGINE.num_ranks)
    ]
    # Forked before this process has a store, whose threads a fork would not copy.
    context = multiprocessing.get_context("fork")
    common = port, folder, fault, tensors
    processes = {
        place: context.Process(target=_play_rank, args=(place, *common), daemon=True)
        for place in places
    }
    for process in processes.values():
        process.start()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    _wait_for_count(store, "ready", len(places), CONNECT_SECONDS)
    began = time.monotonic()
    store.set("connect", "1")
    _wait_for_count(store, "connected", len(places), CONNECT_SECONDS)
    connected, keys = time.monotonic() - began, store.num_keys()
    began = time.monotonic()
    store.set("push1", "1")
    _wait_for_count(store, "complete", len(places), CONNECT_SECONDS)
    pushed = time.monotonic() - began
    store.set("push2", "1")
    for process in processes.values():
        process.join(PUSH_SECONDS + 60)
        process.kill()
    ends = {place: _read_report(folder, place) for place in places}
    return {
        "connect, seconds": connected,
        "keys in the store": keys,
        "push 1, seconds": pushed,
        **_judge_outcome(fault, ends, processes),
    }


def _judge_outcome(
    fault: str, ends: dict[Place, dict[str, Any]], processes: dict[Place, Any]
) -> dict[str, Any]:
    killed = {place for place, p in processes.items() if p.exitcode == -signal.SIGKILL}
    victims = _fault_victims(fault)
    surviving_ends = {place: end for place, end in ends.items() if place not in victims}
    wrong = [str(place) for place, end in surviving_ends.items() if end.get("push 1") != "right"]
    texts = {place: end["error"] for place, end in surviving_ends.items() if end.get("error")}
    engines = {place: text for place, text in texts.items() if place[0] == "engine"}
    names = {
        "trainer rank killed": f"trainer rank {TRAINER}:",
        "engine rank killed": f"rank {POSITION} of engine {MEMBER} ",
        "engine killed": f"of engine {MEMBER} ",
        "engine rank hangs": f"engine {MEMBER} ",
    }
    num_named = sum(names.get(fault, "?") in text for text in engines.values())
    no_end = [str(place) for place, end in surviving_ends.items() if "push 2" not in end]
    right = not wrong and not no_end and num_named == len(engines)
    right &= bool(engines) == bool(texts) == (fault != "none")
    return {
        "killed": len(killed & victims),
        "engine ranks that ended push 2": sum(
            place[0] == "engine" and end.get("push 2") == "right"
            for place, end in surviving_ends.items()
        ),
        "engine ranks that report an error": len(engines),
        "of these name the rank at fault": num_named,
        "trainer ranks that report an error": len(texts) - len(engines),
        "longest until an error, seconds": max(
            (end["seconds"] for place, end in surviving_ends.items() if end.get("error")),
            default=0.0,
        ),
        "an error": next(iter(engines.values()), ""),
        "ranks without an end": no_end,
        "ranks with wrong weights": wrong,
        "right": right,
    }


def _fault_victims(fault: str) -> set[Place]:
    if fault == "trainer rank killed":
        return {("trainer", TRAINER, 0)}
    if fault == "engine killed":
        return {("engine", MEMBER, rank) for rank in range(ENGINE.num_ranks)}
    return set() if fault == "none" else {("engine", MEMBER, POSITION)}


def _wait_for_count(store: TCPStore, key: str, count: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (num_arrived := store.add(key, 0)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:g} s {num_arrived} of {count} ranks are {key}")
        time.sleep(0.02)


def _read_report(folder: Path, place: Place) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for line in read_lines(folder / str(place)):
        record |= line
    return record


def _play_rank(place: Place, port: int, folder: Path, fault: str, tensors: dict[str, Any]) -> None:
    """Be one rank, and write what happens to a file."""
    gloo.BUCKET_BYTES = gloo.RELAY_BUCKET_BYTES = 1 << 11
    gloo.CLOSE_SECONDS = 0.1
    try:
        with (folder / str(place)).open("w", buffering=1) as out:
            role = _play_trainer if place[0] == "trainer" else _play_engine
            role(place, port, fault, tensors, lambda **report: out.write(json.dumps(report) + "\n"))
    finally:
        os._exit(0)


def _connect_store(port: int) -> TCPStore:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(RuntimeError):
            return TCPStore("127.0.0.1", port, is_master=False)
        assert time.monotonic() < deadline, "no store"
        time.sleep(0.2)


def _play_trainer(place: Place, port: int, fault: str, tensors: dict[str, Any], note: Any) -> None:
    rank, store = place[1], _connect_store(port)

    def share(value: bytes | None) -> bytes:
        if value is not None:
            store.set("tables", value)  # type: ignore[arg-type]
        return store.get("tables")

    tensors_of_rank = rank_tensors(HF, GRID, rank, tensors)
    ends = WeightSender(HF, GRID, tensors_of_rank, store, share, rank=rank)
    store.add("ready", 1)
    store.get("connect")
    sets, seconds = [(NAME, ENGINES)], CONNECT_SECONDS
    connected = ends.connect(sets, ENGINE, "gloo", seconds, push_timeout_seconds=PUSH_SECONDS)
    note(**msgspec.to_builtins(connected))
    store.add("connected", 1)
    store.wait(["push1"])
    failures = ends.send(1, [NAME]).failures
    note(**{"push 1": msgspec.to_builtins(failures) or "right"})
    store.add("complete", 1)
    store.wait(["push2"])
    if place in _fault_victims(fault):
        _die_in(LinkPayload, "pack", after=2)
    began = time.monotonic()
    failures = ends.send(2, [NAME]).failures
    error = "; ".join(failure.error for failure in failures.values())
    note(**{"push 2": "right", "error": error, "seconds": time.monotonic() - began})
    store.set(f"trainer{rank}", "1")
    _wait_for_others(store, fault)


def _play_engine(place: Place, port: int, fault: str, tensors: dict[str, Any], note: Any) -> None:
    _, member, rank = place
    store = _connect_store(port)
    store.add("ready", 1)
    store.get("connect")
    limits = CONNECT_SECONDS, PUSH_SECONDS
    met = EngineRendezvous(_connect_store(port), NAME, *limits, member=member, num_members=ENGINES)
    table = slot_table(PredictedSharding(HF, ENGINE), ENGINE.coordinate(rank))
    receiver = gloo.GlooReceiver(met, rank, table)
    store.add("connected", 1)
    receiver.received_chunks.wait(1, CONNECT_SECONDS)
    note(**{"push 1": "right" if _is_correct(receiver, tensors) else "wrong"})
    if place in _fault_victims(fault):  # before push 2 can begin
        hangs = fault == "engine rank hangs"
        _die_in(gloo.GlooReceiver, "_relay_buckets", after=0, hangs=hangs)
    store.add("complete", 1)
    store.wait(["push2"])
    began = time.monotonic()
    try:
        receiver.received_chunks.wait(2, PUSH_SECONDS + 10)
        note(**{"push 2": "right" if _is_correct(receiver, tensors) else "wrong"})
    except ValueError as error:
        seconds = time.monotonic() - began
        note(**{"push 2": "refused", "error": str(error), "seconds": seconds})
    _wait_for_others(store, fault)


def _wait_for_others(store: TCPStore, fault: str) -> None:
    """Wait until the others are done: this rank's end is not to be their error."""
    if fault == "none":
        store.wait([f"trainer{rank}" for rank in range(GRID.world_size)])
    else:
        time.sleep(PUSH_SECONDS + 10)


def _die_in(of: type, method: str, after: int, hangs: bool = False) -> None:
    """Let this process die, or hang, in the call number `after` of a method."""
    original, calls = getattr(of, method), Counter[str]()

    def dying(*args: Any) -> Any:
        calls[method] += 1
        if calls[method] > after:
            if hangs:
                time.sleep(3600)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(of, method, dying)


def _is_correct(receiver: Any, tensors: dict[str, Any]) -> bool:
    for slot in receiver.table.slots:
        tensor = tensors[slot.name]
        tensor = tensor if tensor.dim() > 1 else tensor[:, None]
        part = tensor[slot.top : slot.bottom, slot.left : slot.right]
        if not torch.equal(slot_view(receiver.memory, slot), part):
            return False
    return True
