"""Verdicts of the math reward and of math-verify on labelled pairs of a truth and an answer.

A line of FILE is {"truth": …, "answer": …, "reward": 0 or 1}. Our answer stands in `<answer>` tags.
math-verify gets both sides as formulae between dollar signs, with its default extraction, and is
right where its verdict is the label; `--plain` gives it both as they are.
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1_grading import grade


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("file", type=Path, metavar="FILE", help="JSONL: truth, answer, reward")
    options.add_argument("--plain", action="store_true", help="no dollar signs for math-verify")
    options.add_argument("--show", action="store_true", help="print each of our wrong verdicts")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return, for each of the two, how many verdicts are right, and which wrong answers it
    accepts."""
    lines = args.file.read_text(encoding="utf-8").split("\n")
    pairs = [json.loads(line) for line in lines if line.strip()]
    result: dict[str, Any] = {"pairs": len(pairs), "plain": args.plain}
    print(f"{len(pairs)} pairs, {sum(pair['reward'] == 0 for pair in pairs)} of them wrong answers")
    for name, verdict in (("math", _is_correct), ("math-verify", _math_verify(args.plain))):
        verdicts = [verdict(str(pair["truth"]), str(pair["answer"])) for pair in pairs]
        misjudged_pairs = [
            pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict != pair["reward"]
        ]
        accepted_pairs = [pair for pair in misjudged_pairs if not pair["reward"]]
        num_correct, num_accepted = len(pairs) - len(misjudged_pairs), len(accepted_pairs)
        result[name] = {"right": num_correct, "accepted_although_wrong": num_accepted}
        print(f"  {name:12} right in {num_correct}, accepts {num_accepted} wrong answers")
        for pair in misjudged_pairs if args.show and name == "math" else ():
            print(f"    label {pair['reward']}: {pair['answer']!r} for {pair['truth']!r}")
    return result


def _is_correct(truth: str, answer: str) -> bool:
    return grade("math", f"<answer>{answer}</answer>", truth).reward == 1.0


def _math_verify(is_bare: bool) -> Callable[[str, str], bool]:
    from math_verify import parse, verify  # imports sympy, which takes a second

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def verdict(truth: str, answer: str) -> bool:
        parsed_truth, parsed_answer = (
            parse(text if is_bare else f"${text}$") for text in (truth, answer)
        )
        return verify(parsed_truth, parsed_answer)

    return verdict
