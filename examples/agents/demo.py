"""A tiny model learns to use a tool: `make demo-agents`, or `python -m examples.agents.demo`.

A question's answer is two entries away in a table that only the tool `lookup` can read, drawn
afresh for every row. A base model learns the form of calls and answers from examples of which few
are right. After reinforcement learning, rewarded for right answers only, the model follows the
table to its end; without the tool it stays at chance. The same command continues a stopped demo."""

import argparse
import json
import sys
import time
from pathlib import Path

from examples.demo_parts import announce, megatron_r1, python

HERE = Path(__file__).parent
WITHOUT = ("--agents.max_turns", "1", "--run.steps", "20", "--eval.every", "20")
"""An episode of one answer: a call of the tool ends it."""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--folder", type=Path, default=Path("runs/agents"))
    chosen = options.parse_args()
    folder, seed = chosen.folder, str(chosen.seed)
    base, tool, without = (folder / name for name in ("base", "lookup", "without_tool"))
    start = time.monotonic()

    announce("1/4  a tokenizer, demonstrations, and tables to look things up in")
    if not (folder / "rows.jsonl").exists():
        python("examples.agents.make_lookup", str(folder), "--seed", seed)
    announce("2/4  supervised training makes the base model")
    data = ("--sft.data", str(folder / "demonstrations.jsonl"))
    megatron_r1("sft", HERE / "base.yaml", base, seed, "--model.path", str(folder / "model"), *data)
    rows = ("--model.path", str(base / "hf"), "--data.path", str(folder / "rows.jsonl"))
    announce("3/4  reinforcement learning with the tool: reward 1 for a right answer")
    megatron_r1("rl", HERE / "lookup.yaml", tool, seed, *rows)
    announce("4/4  the same without the tool")
    megatron_r1("rl", HERE / "lookup.yaml", without, seed, *rows, *WITHOUT)

    announce(f"done in {(time.monotonic() - start) / 60:.1f} minutes")
    print("held-out rows                   base    after RL")
    for name, run in (("with the tool", tool), ("without the tool", without)):
        evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").open()]
        first, last = (evaluations[at]["eval/pass@1"] for at in (0, -1))
        print(f"{name:26} {first:9.1%}   {last:9.1%}")
    print(f"\nreport:   {tool / 'report.html'}")
    print(f"episodes: {tool / 'samples.jsonl'}, a line each, with their turns")
    print("next:     an environment of your own in ten lines: docs/agents.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
