"""The published figures of single steps, as a table and as docs/benchmarks/step.md."""

import datetime
from statistics import median
from typing import Any

TEXT = """# Whole RL steps beside TRL

`python tools/bench step`, {date}; {cores} cores, no GPU; load average before a run {load};
at once the cores got {worth} times as much done as one (a virtual machine's may be threads of one);
{packages}.

The same Qwen2-shaped model folder for both (4 layers, hidden 128, fp32), the same
{long[questions]} questions x {long[group]} answers a step, {long[minibatches]} update a step, no
reference model, the same reward, which costs nothing. Weights are random, but for the chance to
end, which gives the lengths of reasoning: most short, a few very long. *Long tail* stops
at {long[limit]} tokens, *short* at {short[limit]}.

Ours is the command line (`megatron-r1 rl`): vLLM's server, the controller, reward workers, the
trainer, the push, metrics and samples written down. TRL is GRPOTrainer in one process: one batch of
transformers' generate for all answers, one forward and backward pass per update (smaller
micro-batches were no faster), nothing logged or saved. They take turns in one run, so that noise
meets both; medians of whole steps on the clock, without the first step of each run. Core seconds
are what all processes of a system used: noise moves them least.

```
{table}
```
The last line: one core for the engine and one for the trainer, in turns and with
`rl.staleness: 1`. Every step is in [step.json](step.json).
"""
Steps = list[dict[str, Any]]
"""One dictionary per step: "seconds" (wall clock), "core_seconds" and "response_tokens"."""


def compared(ours: Steps, theirs: Steps) -> dict[str, Any]:
    """Return the medians of both systems and the ratio of their tokens per second."""
    both = medians(ours), medians(theirs)
    ratio = both[0]["tokens_per_second"] / both[1]["tokens_per_second"]
    return {"ours": both[0], "trl": both[1], "ratio": ratio}


def medians(steps: Steps) -> dict[str, float]:
    names = ("seconds", "core_seconds", "response_tokens")
    rates = [step["response_tokens"] / step["seconds"] for step in steps]
    middle = {name: median(step[name] for step in steps) for name in names}
    return {**middle, "tokens_per_second": median(rates), "steps": len(steps)}


def overlapped(in_turns: Steps, at_once: Steps) -> dict[str, float]:
    """Return the overlapped step's ratio to the longer of rollout and training.

    Rollout and training are measured in the run in which they take turns. Training includes the
    push, for which an overlapped step waits too.
    """
    rollout = median(step["time/rollout"] + step["time/reward"] for step in in_turns)
    training = median(step["time/train"] + step["time/push"] for step in in_turns)
    step = median(step["seconds"] for step in at_once)
    return {
        "rollout": rollout,
        "training": training,
        "in_turns": median(step["seconds"] for step in in_turns),
        "overlapped": step,
        "ratio": step / max(rollout, training),
    }


def table(comparisons: dict[str, dict], overlap: dict[str, float]) -> str:
    """Return the printed table."""
    row = "{:12}{:8}{:>10}{:>14}{:>10}{:>12}{:>8}"
    lines = [row.format("", "", "s/step", "core s/step", "tokens", "tokens/s", "ratio")]
    for name, comparison in comparisons.items():
        for system in ("ours", "trl"):
            of, ratio = comparison[system], comparison["ratio"]
            cells = [f"{of[key]:.2f}" for key in ("seconds", "core_seconds")]
            cells += [f"{of[key]:,.0f}" for key in ("response_tokens", "tokens_per_second")]
            lines.append(row.format(name, system, *cells, f"{ratio:.2f}" * (system == "ours")))
    lines.append(
        "a core each, long tail: rollout {rollout:.2f} s, training and push {training:.2f} s; in "
        "turns {in_turns:.2f} s, overlapped {overlapped:.2f} s = {ratio:.2f} x the slower".format(
            **overlap
        )
    )
    return "\n".join(lines)


def as_page(result: dict[str, Any], cores: int) -> str:
    """Return the page of one result of `run`."""
    long, short = result["work"].values()
    return TEXT.format(
        date=datetime.date.today().isoformat(),
        cores=cores,
        load=" to ".join(f"{limit:.1f}" for limit in result["load"]),
        worth=" to ".join(f"{limit:.1f}" for limit in result["cores are worth"]),
        packages=", ".join(f"{name} {version}" for name, version in result["packages"].items()),
        long=long,
        short=short,
        table=table(result["comparisons"], result["overlap"]),
    )
