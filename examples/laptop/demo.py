"""R1-Zero in miniature: `make demo`, or `python -m examples.laptop.demo [--seed N] [--folder DIR]`.

A base model learns from examples that mostly guess. After reinforcement learning,
rewarded only for right answers and the format, the model works the sums out before it answers. The
same command continues a stopped demo."""

import argparse
import sys
import time
from pathlib import Path

from examples.demo_parts import announce, megatron_r1, python, show_result

HERE = Path(__file__).parent


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--folder", type=Path, default=Path("runs/demo"))
    chosen = options.parse_args()
    folder, seed = chosen.folder, str(chosen.seed)
    corpus, base, zero = folder / "base.jsonl", folder / "base", folder / "r1_zero"
    start = time.monotonic()

    announce("1/4  examples for a base model: mostly guesses, some worked out")
    if not corpus.exists():
        python("examples.laptop.make_corpus", str(corpus), "--seed", seed)
    announce("2/4  supervised training makes the base model")
    megatron_r1("sft", HERE / "base.yaml", base, seed, "--sft.data", str(corpus))
    announce(
        "3/4  reinforcement learning: reward 1 for a right answer, 0.1 for the format, nothing else"
    )
    megatron_r1("rl", HERE / "r1_zero.yaml", zero, seed, "--model.path", str(base / "hf"))
    announce("4/4  the exported model, loaded by plain transformers and plain vLLM")
    python("examples.laptop.check_export", str(zero))

    show_result(zero, "base", time.monotonic() - start)
    print("next:    all of R1, from R1-Zero to distilled students, in about 40 minutes:")
    print("           .venv/bin/megatron-r1 pipeline examples/laptop/r1.yaml")
    print("         another seed of this:")
    print("           .venv/bin/python -m examples.laptop.demo --seed 1 --folder runs/demo_1")
    print("         your own model and data: README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
