"""What a run saves and resumes, and what it does with engines that compute something else than
the trainer."""

import asyncio
import contextlib
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from r1_grading.pool import RewardMeter

from megatron_r1.base.errors import TrainerLost
from megatron_r1.config import Config
from megatron_r1.controller.policy_engines import PolicyEngines
from megatron_r1.controller.rl_run import RLRun
from megatron_r1.controller.run_checkpoints import RunCheckpoints
from megatron_r1.controller.run_recorder import RunState
from megatron_r1.data.prompt import make_prompt
from megatron_r1.data.sampler import PromptSampler
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.trainer.checkpoints.checkpoint_folders import checkpoint_path
from megatron_r1.trainer.checkpoints.manifest import write_manifest


class Pool:
    busy_seconds, num_workers, most_outstanding = 0.0, 1, 0

    def snapshot(self):
        return {}

    def start_meter(self):
        return RewardMeter(self)


class Engines:
    """Pusher, sampler, evaluation and recorder in one: notes what is done, and fails the probes."""

    def __init__(self, differ=True):
        self.done: list[str] = []
        self.differ, self.offloads = differ, False
        self.config, self.log = Config(), None
        self.collector = SimpleNamespace(pool=Pool(), fleet=None, teachers=None)

    @contextlib.asynccontextmanager
    async def updating_weights(self):
        yield

    async def open(self): ...

    async def push(self, version):
        return {}

    async def probe_results(self):
        if self.differ:
            raise EngineError("differs")
        return {}

    def prefetch(self, version):
        self.done.append("pushed")

    def ensure_started(self, step):
        self.done.append("begin")

    async def wait_for_step(self, step):
        self.done.append("rollout")

    async def run(self, step):
        self.done.append("evaluate")

    async def save(self, trainer):
        self.done.append("save")


def rl_run_of(engines, recorder):
    policy_trainer = SimpleNamespace(run_config=Config(), trainer=None, uses_reference=False)
    policy = PolicyEngines(None, engines, engines)
    stop = SimpleNamespace(is_requested=False)
    return policy, RLRun(recorder, stop, engines.collector, policy, policy_trainer, engines)


@pytest.mark.parametrize("what", ["rollout", "save", "begin"])
def test_nothing_is_taken_evaluated_or_saved_of_weights_whose_probes_fail(what):
    engines = Engines()
    recorder = SimpleNamespace(
        state=RunState(), view=None, is_resumed=False, save=engines.save, load=None
    )
    policy, rl_run = rl_run_of(engines, recorder)

    async def story():
        await policy.push(0)
        if what != "begin":
            rl_run.next_step()
            policy._sampled_step = SimpleNamespace()
        await (policy.rollout(1) if what == "rollout" else getattr(rl_run, what)())

    with pytest.raises(EngineError, match="differs"):
        asyncio.run(story())
    assert not {"rollout", "evaluate", "save"} & {*engines.done}


@pytest.mark.parametrize("ends", ["after a checkpoint", "a step later", "by an error"])
def test_the_steps_since_the_last_checkpoint_are_saved_unless_the_run_fails(ends, monkeypatch):
    """As the loop ends when it is asked to stop."""
    saved, closed = [], []
    recorder = SimpleNamespace(state=RunState())
    _, rl_run = rl_run_of(Engines(), recorder)

    async def begin():
        rl_run.step = recorder.state.step = 3

    async def save():
        saved.append(rl_run.step)

    async def close():
        closed.append(True)

    monkeypatch.setattr(rl_run, "begin", begin)
    monkeypatch.setattr(rl_run, "save", save)
    monkeypatch.setattr(rl_run.engines, "close", close)

    async def story():
        async with rl_run.open():
            if ends != "after a checkpoint":
                rl_run.next_step()
            if ends == "by an error":
                raise TrainerLost("rank 1 ended")

    if ends == "by an error":
        with pytest.raises(TrainerLost):
            asyncio.run(story())
    else:
        asyncio.run(story())
    assert saved == ([4] if ends == "a step later" else []) and closed == [True]


class SavedRun:
    """A run's recorder, whose checkpoint is a copy of its state, and a trainer."""

    def __init__(self, checkpoint=None):
        self.state, self.checkpoint, self.calls = RunState(), checkpoint, []
        self.view = SimpleNamespace(show_phase=lambda name: None, show_message=lambda line: None)

    @property
    def is_resumed(self):
        return self.checkpoint is not None

    async def load(self, trainer, with_reference):
        self.calls.append(("load", with_reference))
        vars(self.state).update(asdict(self.checkpoint))

    async def save(self, trainer):
        self.checkpoint = RunState(**asdict(self.state))

    async def call(self, operation):
        self.calls.append((operation.__name__, None))


def checkpointing_of(run, counts):
    prompts = PromptSampler([make_prompt(f"{n} + 1?", "math", "1", {}) for n in range(10)], seed=3)
    pool = SimpleNamespace(snapshot=lambda: dict(counts))
    step_sampler = SimpleNamespace(
        prompt_sampler=prompts, sample_log=None, collector=SimpleNamespace(pool=pool, teachers=None)
    )
    return RunCheckpoints(run, run, step_sampler), prompts


def test_a_resumed_run_draws_the_next_questions_and_goes_on_counting_rewards():
    first = SavedRun()
    counts = {"math": 0, "queued": 3}
    checkpointing, prompts = checkpointing_of(first, counts)
    asyncio.run(checkpointing.resume(uses_reference=True))
    prompts.next(4)
    counts["math"] = 40
    asyncio.run(checkpointing.save(2, prompts.state_dict()))
    expected = prompts.next(4)
    assert first.calls == [("refresh_reference", None)]
    assert first.checkpoint.step == 2 and first.checkpoint.rewards == {"math": 40}

    # The trainer was lost: the pool, which lives on, has counted ten more of the lost steps.
    counts = {"math": 50, "code": 1, "queued": 2}
    second = SavedRun(first.checkpoint)
    checkpointing, prompts = checkpointing_of(second, counts)
    asyncio.run(checkpointing.resume(uses_reference=True))
    assert second.calls == [("load", True)]
    assert prompts.next(4) == expected
    counts["math"], counts["code"] = 57, 3
    asyncio.run(checkpointing.save(3, prompts.state_dict()))
    assert second.checkpoint.rewards == {"math": 47, "code": 2}


@pytest.mark.parametrize("steps, oldest", [([], None), ([6], 6), ([2, 4, 6], 4)])
def test_samples_before_the_oldest_checkpoint_are_deleted(tmp_path, steps, oldest):
    pruned = []

    class Log:
        async def prune(self, step):
            pruned.append(step)

    for step in steps:
        folder = checkpoint_path(tmp_path, step)
        folder.mkdir()
        write_manifest(folder)
    run = SimpleNamespace(folder=SimpleNamespace(checkpoints=tmp_path))
    asyncio.run(RunCheckpoints(run, None, SimpleNamespace(sample_log=Log())).prune_samples(keep=2))
    assert pruned == ([] if oldest is None else [oldest])
