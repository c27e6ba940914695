"""docs/benchmarks/step.md: what was measured, how, and the figures."""

from __future__ import annotations

import datetime
from typing import Any

from .figures import table
from .work import Work

TEXT = """# Whole RL steps beside TRL

`python tools/bench step`, {date}; {cores} cores, no GPU; load average before a run {load};
at once the cores got {worth} times as much done as one (a virtual machine's may be threads of one);
{packages}.

The same Qwen2-shaped model folder for both (4 layers, hidden 128, fp32), the same {questions}
questions x {group} answers a step, {updates} update a step, no reference model, the same reward,
which costs nothing. Weights are random, but for the chance to end, which gives the lengths of
reasoning: most short, a few very long. *Long tail* stops at {long} tokens, *short* at {short}.

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
`rl.staleness: 1`. Every step is in [step.json](step.json)."""


def as_page(result: dict[str, Any], cores: int) -> str:
    """The page of one result of `run`."""
    long, short = (Work(**settings) for settings in result["work"].values())
    packages = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    return (
        TEXT.format(
            date=datetime.date.today().isoformat(),
            cores=cores,
            load=" to ".join(f"{limit:.1f}" for limit in result["load"]),
            worth=" to ".join(f"{limit:.1f}" for limit in result["cores are worth"]),
            packages=packages,
            questions=long.questions,
            group=long.group,
            updates=long.minibatches,
            long=long.limit,
            short=short.limit,
            table=table(result["comparisons"], result["overlap"]),
        )
        + "\n"
    )
