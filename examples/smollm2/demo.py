"""GRPO on a pretrained model: `make demo-pretrained`, or
`python -m examples.smollm2.demo [--seed N] [--folder DIR] [--model DIR] [--section.key value …]`.

SmolLM2-135M-Instruct answers questions in its own words and its own chat template; it is rewarded
for right answers alone. The same command continues a stopped demo."""

import argparse
import sys
import time
from pathlib import Path

from examples.demo_parts import announce, megatron_r1, python, show_result
from megatron_r1.base.processes.host_memory import PeakMemory

HERE = Path(__file__).parent


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--folder", type=Path, default=Path("runs/pretrained"))
    options.add_argument("--model", type=Path, default=Path("build/smollm2/model"))
    chosen, settings = options.parse_known_args()
    start = time.monotonic()

    with PeakMemory() as memory:
        questions = Path("build/smollm2/questions")
        if not (questions / "heldout.jsonl").exists():
            python("examples.smollm2.questions", str(questions))
        announce("1/2  reinforcement learning: reward 1 for a right answer, nothing else")
        model = ["--model.path", str(chosen.model)]
        megatron_r1("rl", HERE / "rl.yaml", chosen.folder, str(chosen.seed), *model, *settings)
        announce("2/2  the exported model, loaded by plain transformers and plain vLLM")
        python("examples.laptop.check_export", str(chosen.folder))

    show_result(chosen.folder, "before", time.monotonic() - start, intervals=True)
    print(f"memory:  {memory.gib:.1f} GiB at most, of all processes together")
    print("next:    what it was asked and what it answered: samples.jsonl, next to the report")
    print("           .venv/bin/megatron-r1 pipeline examples/smollm2/chain.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
