"""Rewards through the worker pool: grades per second of each, and a soak with hostile responses and
with graders that break their worker process.

Math is measured on groups of 16 whose answers repeat, as in a run, and with every answer once. For
comparison, math-verify's parse and verify run in this process without limits. The soak mixes
honest and hostile responses, each with the reward it must get."""

import argparse
import asyncio
import logging
import os
import random
import time
from collections import Counter
from typing import Any

from r1_grading import Grade, RewardPool
from r1_grading.rewards import GRADERS, resolve_reward

from tools.bench import host
from tools.bench.rewards import samples
from tools.bench.rewards.samples import LabelledResponse


def hang(response: str, truth: object, **entry: object) -> Grade:
    """Stay inside one C call, where Python handles no signals, far longer than the time limit."""
    return Grade(0.0, str(len(str(9 ** (9**9)))))


def leave(response: str, truth: object, **entry: object) -> Grade:
    """End the process."""
    os._exit(3)


def eat(response: str, truth: object, **entry: object) -> Grade:
    """Allocate more memory than a worker may have."""
    return Grade(0.0, str(len(bytearray(2**40))))


def kill(response: str, truth: object, **entry: object) -> Grade:
    """Die of a signal, as a crash inside a library does."""
    os.abort()


FAULTS = ("hang", "leave", "eat", "kill")


HOSTILE_FRACTION, FAULT_FRACTION, CODE_FRACTION = 0.1, 0.001, 0.01
TRUTHS = ("13", "x^2 + 1", r"\{1, 2\}", "x > 2", "(1, 2)", "north", "C")
IN_FLIGHT = 256
PATIENCE_SECONDS = 300.0
"""A grade that takes longer than this counts as hung."""


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--groups", type=int, default=600, help="groups of 16 math answers")
    options.add_argument("--code-runs", type=int, default=300)
    options.add_argument("--soak", type=int, default=0, help="number of mixed samples (0: no soak)")
    options.add_argument("--timeout", type=float, default=5.0, help="seconds for one grade")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return the rates and the soak's counts."""
    grouped = samples.math_groups(args.groups)
    distinct = list({(s.response, s.truth): s for s in grouped}.values())
    benches = {
        "math, groups of 16": grouped,
        "math, each answer once": distinct,
        "format": samples.format_samples(4_000),
        "language": samples.language_samples(2_000),
        "code, sandboxed runs": samples.code_samples(args.code_runs),
    }
    load = os.getloadavg()[0]
    result: dict[str, Any] = {"workers": args.workers, "load_before": load, "rates": {}}
    cores = host.num_cores()
    print(f"{args.workers} workers on {cores} cores (load {load:.1f}), per second")
    for name, batch in benches.items():
        rate, num_incorrect = asyncio.run(_measure_rate(batch, args))
        result["rates"][name] = {"per_second": rate, "samples": len(batch), "wrong": num_incorrect}
        figures = "not available" if rate is None else f"{rate:10,.0f}   {num_incorrect} wrong"
        print(f"  {name:28} {figures}   ({len(batch):,} samples)", flush=True)
    single = math_verify_alone(distinct)
    result["math-verify, one process, no limits"] = single
    print(
        f"  {'math-verify, 1 process':28} {single['per_second']:10,.0f}   {single['wrong']} wrong"
    )
    if args.soak:
        result["soak"] = asyncio.run(_soak_pool(args))
    return result


async def _measure_rate(
    batch: list[LabelledResponse], args: argparse.Namespace
) -> tuple[float | None, int]:
    """Return grades per second of warm workers (None: not available here), and wrong rewards."""
    try:
        resolve_reward(batch[0].kind)
    except ValueError:
        return None, 0
    async with _reward_pool(args) as pool:
        try:
            await asyncio.gather(*(_grade_sample(pool, batch[0]) for _ in range(8 * args.workers)))
        except ValueError as error:
            print(f"  {batch[0].kind}: {error}")
            return None, 0
        start = time.perf_counter()
        grades = await asyncio.gather(*(_grade_sample(pool, sample) for sample in batch))
        seconds = time.perf_counter() - start
    pairs = zip(batch, grades, strict=True)
    return len(batch) / seconds, sum(grade.reward != sample.reward for sample, grade in pairs)


def math_verify_alone(batch: list[LabelledResponse]) -> dict[str, Any]:
    """Return math-verify's answers per second in one process, and verdicts unlike the label."""
    from math_verify import parse, verify  # imports sympy, which takes a second

    def verdict(truth: str, answer: str) -> bool:
        # Its time limits are signals; off, as in our workers, to measure the work alone.
        expected, actual = (parse(text, parsing_timeout=None) for text in (truth, answer))
        return verify(expected, actual, timeout_seconds=None)

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    pairs = [(f"${s.truth}$", f"${s.name}$", bool(s.reward)) for s in batch]
    verdict(*pairs[0][:2])
    start = time.perf_counter()
    num_incorrect = sum(verdict(truth, answer) != label for truth, answer, label in pairs)
    seconds = time.perf_counter() - start
    return {"per_second": len(pairs) / seconds, "samples": len(pairs), "wrong": num_incorrect}


async def _soak_pool(args: argparse.Namespace) -> dict[str, Any]:
    async with _reward_pool(args) as pool:
        return await soak(pool, soak_samples(args.soak))


def _reward_pool(args: argparse.Namespace) -> RewardPool:
    return RewardPool(args.workers, timeout_seconds=args.timeout)


async def _grade_sample(pool: RewardPool, sample: LabelledResponse) -> Any:
    return await pool.grade(sample.kind, sample.response, sample.truth, **sample.fields)


def soak_samples(num: int, seed: int = 0) -> list[LabelledResponse]:
    """Return `num` shuffled samples.

    A tenth is hostile, each trick equally often; a thousandth hangs, crashes or exhausts memory; a
    hundredth is sandboxed programs, if a sandbox is available."""
    rng = random.Random(seed)
    num_hostile, num_faults = int(num * HOSTILE_FRACTION), int(num * FAULT_FRACTION)
    batch = [_hostile_response(index, rng) for index in range(num_hostile)]
    batch += [_faulty_response(FAULTS[index % len(FAULTS)]) for index in range(num_faults)]
    if "code" in GRADERS:
        batch += samples.code_samples(int(num * CODE_FRACTION))
    batch += samples.format_samples(num // 20) + samples.language_samples(num // 20)
    missing = num - len(batch)
    batch += samples.math_groups(missing // samples.GROUP + 1, seed)[:missing]
    rng.shuffle(batch)
    return batch


async def soak(pool: RewardPool, batch: list[LabelledResponse]) -> dict[str, Any]:
    """Grade `batch`; return counts of wrong rewards, hung grades, timeouts and crashes."""
    outcomes: Counter[str] = Counter()
    incorrect: Counter[str] = Counter()
    gate = asyncio.Semaphore(IN_FLIGHT)
    longest = 0.0

    async def one(sample: LabelledResponse) -> None:
        nonlocal longest
        async with gate:
            start = time.perf_counter()
            try:
                grade = await asyncio.wait_for(_grade_sample(pool, sample), PATIENCE_SECONDS)
            except TimeoutError:
                outcomes["hung"] += 1
                return
        longest = max(longest, time.perf_counter() - start)
        if grade.reward != sample.reward:
            incorrect[f"{sample.name}: {grade.reward}, {grade.reason}"] += 1

    start = time.perf_counter()
    await asyncio.gather(*(one(sample) for sample in batch))
    counts = pool.snapshot()
    report = {
        "samples": len(batch),
        "hostile": sum(sample.name.startswith("hostile") for sample in batch),
        "faults": sum(sample.name in FAULTS for sample in batch),
        "kinds": dict(Counter(sample.kind for sample in batch if sample.name not in FAULTS)),
        "seconds": round(time.perf_counter() - start, 1),
        "longest_seconds": round(longest, 2),
        "hung_workers": outcomes["hung"] + counts["running"] + counts["queued"],
        "wrong_rewards": sum(incorrect.values()),
        **{name: counts[name] for name in ("graded", "timeouts", "crashes", "out_of_memory")},
        "errors": counts["errors"],
    }
    print("soak: " + ", ".join(f"{name} {value}" for name, value in report.items()))
    for mistake, number in incorrect.most_common(20):
        print(f"  wrong, {number} times: {mistake}")
    return report


def _hostile_response(index: int, rng: random.Random) -> LabelledResponse:
    names = [*samples.HOSTILE_ANSWERS, *samples.HOSTILE_RESPONSES]
    name, truth = names[index % len(names)], rng.choice(TRUTHS)
    if name in samples.HOSTILE_RESPONSES:
        response = samples.HOSTILE_RESPONSES[name]
    else:
        response = f"<think>x</think><answer>{samples.HOSTILE_ANSWERS[name]}</answer>"
    return LabelledResponse("math", response, truth, 0.0, f"hostile {name}, truth {truth}")


def _faulty_response(name: str) -> LabelledResponse:
    return LabelledResponse(f"tools.bench.rewards.pool:{name}", "", None, 0.0, name)
