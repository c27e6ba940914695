"""Updates with and without `parallel.share_prompts`: 16 responses to each long prompt.

The trainer alone, on one rank and one thread, in turns: core seconds of an update and of a pass for
log-probabilities, which other load on the machine changes little. The ideal is the ratio of the
tokens that are computed; attention and the head do not shrink with them."""

import argparse
import json
import os
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from tools.bench.small_models import qwen2

MODEL = qwen2(
    hidden=256,
    layers=4,
    heads=8,
    vocab_size=2048,
    intermediate_size=704,
    num_key_value_heads=4,
    max_position_embeddings=8192,
)


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--group", type=int, default=16, help="responses to a prompt")
    options.add_argument("--prompts", type=int, nargs="+", default=[256, 1024], help="tokens")
    options.add_argument("--response", type=int, default=128, help="tokens")
    options.add_argument("--repeats", type=int, default=3)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return core seconds of each, and what share of the ideal saving is reached."""
    from megatron_r1.base.processes.children import free_port, rank_variables
    from megatron_r1.config import Config
    from megatron_r1.controller.algorithms import find_algorithm
    from megatron_r1.models import platform
    from megatron_r1.trainer import distributed

    os.environ |= rank_variables(0, 1, free_port("127.0.0.1"))
    platform.prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        config = Config.model_validate(
            {
                "model": {"path": folder, "init": "random", "dtype": "float32"},
                "parallel": {"threads": 1, "tokens_per_microbatch": 1 << 20},
            }
        )
        grid_position = distributed.initialize(config.parallel, seed=0)
        settings = (
            find_algorithm("grpo"),
            replace(config.rl.loss_settings(args.response), kl_beta=0.0),
        )
        results = [_measure_prompt(config, grid_position, *settings, args, n) for n in args.prompts]
        distributed.leave_process_groups()
    return {"model": MODEL, "results": results}


def _measure_prompt(
    config: Any, grid_position: Any, algorithm: Any, settings: Any, args: Any, prompt: int
) -> dict[str, Any]:
    from megatron_r1.trainer.trainer import Trainer
    from megatron_r1.trainer.training_sample import Sample

    draw = random.Random(0)

    def tokens(count):
        return [draw.randrange(MODEL["vocab_size"]) for _ in range(count)]

    prompt_tokens, logprobs = tokens(prompt), [-7.0] * args.response
    samples = [
        Sample.pack(prompt_tokens, tokens(args.response), logprobs, draw.uniform(-1, 1))
        for _ in range(args.group)
    ]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    num_tokens, trainers = {}, {}
    for shares in seconds:
        parallel = config.parallel.model_copy(update={"share_prompts": shares})
        trainers[shares] = Trainer(config.model_copy(update={"parallel": parallel}), grid_position)
        trainers[shares].load([[samples]])
        num_tokens[shares] = trainers[shares].rollout.minibatches[0][0].input_ids.numel()
    for _ in range(1 + args.repeats):
        for shares, trainer in trainers.items():
            start = time.process_time()
            trainer.compute_logprobs(1.0, with_reference=False)
            trainer.update(0, algorithm.loss, settings, 0.0)
            seconds[shares].append(time.process_time() - start)
    alone_seconds, shared_seconds = (median(seconds[shares][1:]) for shares in (False, True))
    ideal, speedup = num_tokens[False] / num_tokens[True], alone_seconds / shared_seconds
    print(
        f"{args.group} x ({prompt} + {args.response}) tokens: {alone_seconds:.2f} s alone, "
        f"{shared_seconds:.2f} s shared: {speedup:.2f} times as fast, ideal {ideal:.2f}, reached "
        f"{speedup / ideal:.2f}",
        flush=True,
    )
    return {
        "prompt": prompt,
        "response": args.response,
        "group": args.group,
        "core_seconds": {"alone": seconds[False][1:], "shared": seconds[True][1:]},
        "tokens": {"alone": num_tokens[False], "shared": num_tokens[True]},
        "speedup": speedup,
        "ideal": ideal,
    }
