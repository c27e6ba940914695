"""A rollout through the controller, with synthetic engines that answer at once or at a pace.

Measured are the time from the first request to the trainer's reply, how long it blocks the event
loop, and the memory of the process meanwhile.

Engines and trainer ranks are processes of this bench that speak the real protocols, HTTP and
ZeroMQ; all between them is the controller's own code: client, checks, grading in worker processes,
sample log, advantages, packing, and the samples' way to the ranks. So the seconds are what the
controller adds to sampling, on the cores that the engines, the graders and the ranks share here."""

import argparse
import asyncio
import contextlib
import multiprocessing
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import psutil
from r1_grading import RewardPool

from megatron_r1.config import Config, parse_recipe
from megatron_r1.controller.loop import train_policy
from megatron_r1.controller.policy_trainer import PolicyTrainer
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.metrics import rollout_metrics
from megatron_r1.controller.rollouts.rollout import Rollout
from megatron_r1.controller.rollouts.sample_log import SampleLog
from megatron_r1.controller.rollouts.step_sampler import StepSampler
from megatron_r1.controller.run_recorder import RunState
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.sampler import PromptSampler
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server.reply_reader import MEDIA_TYPE
from megatron_r1.trainer.operations import ModelOperations
from tools.bench import host
from tools.bench.controller import synthetic
from tools.bench.controller.synthetic import (
    GROUP,
    PROMPT_CHARS,
    as_bytes,
    as_json,
    make_reply,
    write_model,
)
from tools.bench.host import run_in_process

BEAT_SECONDS = 0.002


class EventLoopMonitor:
    """A task that is due every 2 ms, and measures its delays: `async with Watch() as watch`.

    Attributes:
        longest: seconds by which it was late at most, by phase: the longest time in which the loop
            ran other things, or waited for a core or for the interpreter's lock.
        late: number of times over 0.1 s.
        computed: as longest, but seconds of the processor: without the waiting, which on a machine
            with other work is most of it.
        peak: largest VmRSS and RssAnon, bytes; the latter without pages of files."""

    def __init__(self) -> None:
        self.phase = ""
        self.longest: defaultdict[str, float] = defaultdict(float)
        self.late: Counter[str] = Counter()
        self.computed: defaultdict[str, float] = defaultdict(float)
        self.peak: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._monitor_loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _monitor_loop(self) -> None:
        read = 0.0
        while True:
            began, cpu_start, phase = time.perf_counter(), time.thread_time(), self.phase
            await asyncio.sleep(BEAT_SECONDS)
            late = time.perf_counter() - began - BEAT_SECONDS
            self.longest[phase] = max(self.longest[phase], late)
            self.late[phase] += late > 0.1
            self.computed[phase] = max(self.computed[phase], time.thread_time() - cpu_start)
            if began - read > 0.05:
                read = began
                for name, value in memory_held().items():
                    self.peak[name] = max(self.peak[name], value)


def memory_held() -> dict[str, int]:
    memory = psutil.Process().memory_info()
    return {"VmRSS": memory.rss, "RssAnon": memory.rss - memory.shared}


MINIBATCHES = 16
ENGINES = 16
RANK_PROCESSES = 2
CONNECT_SECONDS = 300


def measure(
    groups: int,
    tokens: int,
    world_size: int,
    data_parallel_size: int,
    routed: bool,
    sampling: float,
) -> dict[str, Any]:
    """Return what one rollout of `groups` x 16 x `tokens` costs whose groups the engines finish one
    after another, evenly over `sampling` seconds.

    Args:
        groups: the groups of the rollout.
        tokens: tokens of each response.
        world_size: trainer ranks.
        data_parallel_size: replicas; each gets its own samples.
        routed: whether responses have the experts of every token.
        sampling: seconds that the whole rollout is sampled for."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _rollout_config(write_model(folder / "model"), groups, tokens, world_size, routed)
        tokenizer = PromptTokenizer(config.model.path, config.data.template)
        reply = make_reply(
            folder / "model", tokens, len(tokenizer.encode("0" * PROMPT_CHARS)), routed
        )
        bodies = {synthetic.JSON: folder / "reply.json", MEDIA_TYPE: folder / "reply.bytes"}
        bodies[synthetic.JSON].write_bytes(as_json(reply))
        bodies[MEDIA_TYPE].write_bytes(as_bytes(reply))
        parent_end, child_end = context.Pipe()
        args = ENGINES, bodies, child_end, sampling / groups
        server = context.Process(target=synthetic.serve_engines, args=args, daemon=True)
        server.start()
        try:
            result = asyncio.run(
                _train_on_rollout(
                    config, tokenizer, parent_end.recv(), world_size, data_parallel_size, folder
                )
            )
        finally:
            for process in multiprocessing.active_children():
                process.kill()
    # The last group is sampled when `sampling` is over: from then on the controller adds.
    result["seconds"]["rollout"] -= sampling
    result["seconds"]["added"] = sum(result["seconds"].values())
    return {
        "groups": groups,
        "tokens": tokens,
        "response tokens": groups * GROUP * tokens,
        "sampling, seconds": sampling,
        **result,
    }


async def _train_on_rollout(
    config: Config,
    tokenizer: PromptTokenizer,
    urls: list[str],
    world_size: int,
    data_parallel_size: int,
    folder: Path,
) -> dict[str, Any]:
    """Train on one synthetic rollout; return seconds, blocks of the event loop and memory."""
    num_groups = config.rl.prompts_per_rollout
    trainer = TrainerClient(config, folder, world_size=world_size)
    began = time.perf_counter()
    context, per_process = multiprocessing.get_context("fork"), world_size // RANK_PROCESSES
    for index in range(RANK_PROCESSES):
        prompt_indices = range(index * per_process, (index + 1) * per_process)
        args = (
            prompt_indices,
            trainer.socket.address,
            trainer._token,
            world_size,
            data_parallel_size,
        )
        context.Process(target=synthetic.serve_ranks, args=args, daemon=True).start()
    await asyncio.wait_for(trainer.connect(), CONNECT_SECONDS)
    connected = time.perf_counter() - began
    make_server = partial(synthetic.SyntheticServer, urls)
    fleet = EngineFleet(ENGINES, folder, make_server=make_server, max_num_seqs=num_groups * GROUP)
    pool, log = RewardPool(config.rewards.workers), SampleLog(folder / "samples")
    collector = RolloutCollector(fleet, pool, tokenizer, config.rewards)
    prompts = [Prompt(f"{i}", f"{i:0{PROMPT_CHARS}}", "math", "42") for i in range(num_groups)]
    try:
        await fleet.start(config.model.path)
        # Workers import the rewards: a run's first step does, and no later one.
        answer = "<think></think> <answer>42</answer>" * 100
        kinds = ("math", "format") * 64
        await asyncio.gather(*(pool.grade(kind, answer, "42") for kind in kinds))
        calls = await _call_all(trainer)
        step_sampler = StepSampler(config, collector, PromptSampler(prompts, 0), log)
        async with EventLoopMonitor() as watch:
            policy_trainer = _PolicyTrainer(config, trainer, RunState())
            session: Any = _OneStep(policy_trainer, step_sampler, watch)
            before = _cpu_seconds()
            await train_policy(session)
        cpu = {
            process: s - before[process]
            for process, s in policy_trainer.used.items()
            if s > before[process]
        }
    finally:
        await asyncio.gather(fleet.close(), pool.close(), log.close())
        trainer.socket.close()
    expected = {"samples": num_groups * GROUP, "tokens": policy_trainer.num_tokens}
    assert policy_trainer.received == expected, f"{policy_trainer.received} arrived, not {expected}"
    blocked = {phase: 1e3 * seconds for phase, seconds in watch.longest.items() if phase}
    computed = {phase: 1e3 * seconds for phase, seconds in watch.computed.items() if phase}
    return {
        "seconds": session.seconds,
        "longest block, ms": blocked,
        "longest computation, ms": computed,
        "blocks over 100 ms": sum(n for phase, n in watch.late.items() if phase),
        "peak bytes": dict(watch.peak),
        "cpu seconds": cpu,
        "connect, seconds": connected,
        "call_all, seconds": calls,
        "accuracy": session.metrics["accuracy"],
    }


class _PolicyTrainer(PolicyTrainer):
    """Notes what the ranks have received."""

    received: dict[str, int]
    num_tokens = 0

    async def load(self, minibatches: list[list[Any]]) -> dict[str, float]:
        self.num_tokens = sum(len(sample) for samples in minibatches for sample in samples)
        call_all = self.trainer._gather_replies

        async def gather(operation: str, count: int) -> list[dict[str, Any]]:
            replies = await call_all(operation, count)
            names = "samples", "tokens"
            self.received = {n: sum(r.get(n, 0) for r in replies) for n in names}
            return replies

        self.trainer._gather_replies = gather  # type: ignore[method-assign]
        try:
            return await super().load(minibatches)
        finally:
            self.trainer._gather_replies = call_all  # type: ignore[method-assign]
            self.loaded, self.used = time.perf_counter(), _cpu_seconds()


@dataclass
class _OneStep:
    """A session of one step, as `controller.loop.train_policy` calls it. seconds: until the rollout
    is there ("rollout"), and from there until the trainer has it ("load")."""

    policy_trainer: _PolicyTrainer
    step_sampler: StepSampler
    watch: EventLoopMonitor
    step: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def next_step(self) -> Config | None:
        self.step += 1
        self.step_sampler.open(1)
        return self.policy_trainer.run_config if self.step == 1 else None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began, self.watch.phase = time.perf_counter(), name
        yield
        if name == "rollout":
            self.seconds[name], self.rolled = time.perf_counter() - began, time.perf_counter()
        elif name == "train":
            self.seconds["load"] = self.policy_trainer.loaded - self.rolled

    @property
    def engines(self) -> "_OneStep":
        return self

    @asynccontextmanager
    async def updating_weights(self) -> AsyncIterator[None]:
        yield

    async def rollout(self, step: int) -> Rollout:
        self.step_sampler.ensure_started(step)
        return (await self.step_sampler.wait_for_step(step)).rollout

    async def push(self, version: int) -> None: ...

    async def finish_step(self, rollout: Rollout, *_: Any) -> None:
        began = time.perf_counter()
        self.metrics = await asyncio.to_thread(rollout_metrics, rollout, policy_version=0)
        self.seconds["metrics"] = time.perf_counter() - began
        await asyncio.sleep(0.01)  # the watch sees a block
        self.watch.phase = ""


async def _call_all(trainer: TrainerClient) -> list[float]:
    """Return the seconds of five calls to every rank."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        await trainer.call_all(ModelOperations.measure_logprob_diff)
        seconds.append(time.perf_counter() - began)
    return seconds


def _rollout_config(model: Path, groups: int, tokens: int, world_size: int, routed: bool) -> Config:
    return parse_recipe(
        {
            "model": {"path": str(model)},
            "data": {"task": "chain_sum", "template": "r1_zero"},
            "run": {"steps": 1},
            "rollout": {"max_response_tokens": tokens},
            "rewards": {"workers": 2, "weights": {"accuracy": 1.0, "format": 0.1}},
            "rl": {
                "prompts_per_rollout": groups,
                "group_size": GROUP,
                "minibatches": MINIBATCHES,
                "routing_replay": routed,
            },
            "parallel": {"tokens_per_microbatch": 36864},
        }
    )


def _cpu_seconds() -> defaultdict[str, float]:
    """Return the CPU seconds so far of the controller, reward workers, and the other processes:
    synthetic engines and ranks."""
    seconds = defaultdict(float, controller=time.process_time())
    for child in psutil.Process().children(recursive=True):
        is_worker = "r1_grading.worker" in child.cmdline()
        times = child.cpu_times()
        seconds["rewards" if is_worker else "synthetic"] += times.user + times.system
    return seconds


GIB = 2**30
MAX_ADDED, MAX_BLOCK, MAX_BYTES = 20.0, 100.0, 8e9
"""Aims for a full rollout: seconds beyond sampling, milliseconds in which the event loop does
nothing else, bytes of memory."""


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--groups", type=int, nargs="+", default=[32, 64])
    options.add_argument("--tokens", type=int, default=30_000, help="of each response")
    options.add_argument("--ranks", type=int, default=2048)
    options.add_argument("--replicas", type=int, default=16, help="which get samples of their own")
    options.add_argument("--sampling-seconds", type=float, default=0.0, help="of a whole rollout")
    options.add_argument("--routing", action="store_true", help="with the experts of every token")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return a dictionary per size, each measured in a process of its own."""
    sizes = []
    for groups in args.groups:
        size = groups, args.tokens, args.ranks, args.replicas
        case = args.routing, args.sampling_seconds
        sizes.append(run_in_process(measure, *size, *case))
        print("\n  ".join([_describe_size(sizes[-1]), *missed_aims(sizes[-1])]), flush=True)
    return {"cores are worth": host.cores_worth(), "group": GROUP, "sizes": sizes}


def missed_aims(size: dict[str, Any]) -> list[str]:
    """Return a sentence for each figure of a rollout that is beyond its aim."""
    added, memory = size["seconds"]["added"], size["peak bytes"]["RssAnon"]
    blocked = [
        f"the event loop did nothing else for {ms:.0f} ms in {phase}, at most {MAX_BLOCK:.0f} "
        "wanted"
        for phase, ms in size["longest block, ms"].items()
        if ms > MAX_BLOCK
    ]
    late = [f"{added:.1f} s added beyond sampling, at most {MAX_ADDED:.0f} wanted"]
    large = [f"{memory / 1e9:.1f} GB held, at most {MAX_BYTES / 1e9:.0f} wanted"]
    return blocked + late * (added > MAX_ADDED) + large * (memory > MAX_BYTES)


def _describe_size(size: dict[str, Any]) -> str:
    seconds, peak = size["seconds"], size["peak bytes"]
    phases = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items() if name != "added")
    cpu = ", ".join(f"{name} {value:.1f}" for name, value in size["cpu seconds"].items())
    blocks, computed = (
        ", ".join(f"{name} {ms:.0f}" for name, ms in size[key].items())
        for key in ("longest block, ms", "longest computation, ms")
    )
    nanoseconds_per_token = 1e9 * seconds["added"] / size["response tokens"]
    return (
        f"{size['groups']} x {GROUP} x {size['tokens']:,} tokens: {seconds['added']:.2f} s added "
        f"({phases}), {nanoseconds_per_token:.0f} ns a token; longest block, ms: {blocks} (of its "
        f"own computing: {computed}); "
        f"{size['blocks over 100 ms']} over 100 ms; peak {peak['RssAnon'] / GIB:.2f} GiB of "
        f"{peak['VmRSS'] / GIB:.2f} with files; CPU s: {cpu}; call_all "
        f"{min(size['call_all, seconds']):.2f} to {max(size['call_all, seconds']):.2f} s"
    )
