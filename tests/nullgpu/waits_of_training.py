"""What the host waits for in training steps on null GPUs, one a rank: `waits_of_training.py CASES
OUT`, under torchrun.

CASES: JSON, a list of {"label", "model", "dtype", "fp8", "microbatches", "parallel", "mtp",
"replay"}, each a trainer that loads, computes log-probabilities and updates twice. The second
time the null GPU counts under "LABEL load", "LABEL logprobs", "LABEL compare" and "LABEL update";
waits inside what takes the place of GPU kernels (our attention, the loss head in PyTorch,
Megatron's own permutations, operators that round to FP8 blocks and multiply them) are counted under
"stand-in". OUT gets a file per rank, with the lines of Python that each wait came from."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import contextlib
import functools
import json
import random
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformer_engine_on_host
from host_compute import compute_everywhere, runtime
from r1_kernels import registry
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_r1.config import Config
from megatron_r1.config.loss_settings import LossSettings

LOSS = "megatron_r1.controller.algorithms.grpo:loss"
SETTINGS = LossSettings(
    loss_average="sequence", clip_low=0.2, clip_high=0.3, importance_cap=2.0, kl_beta=0.1
)
WAITS = range(1, 6)
"""Kinds of waits that a GPU has, too: of a stream, a device, an event, a copy, freed memory."""
KERNELS_OF_FP8 = (
    "generic_gemm",
    "te_general_grouped_gemm",
    "quantize",
    "split_quantize",
    "fp8_transpose",
    "fused_multi_row_padding",
    "fused_multi_row_unpadding",
)
"""Functions of Transformer Engine's extension that only launch kernels."""
places: Counter = Counter()
labels = [""]


@contextlib.contextmanager
def labelled(text: str) -> Iterator[None]:
    labels.append(text)
    runtime().null_gpu_label(text.encode())
    try:
        yield
    finally:
        labels.pop()
        runtime().null_gpu_label(labels[-1].encode())


def noting_waits(name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
    before = sum(map(runtime().null_gpu_waits, WAITS))
    result = function(*args, **kwargs)
    if number := sum(map(runtime().null_gpu_waits, WAITS)) - before:
        lines = [
            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_stack()
            if "_python_dispatch" not in frame.filename and __file__ != frame.filename
        ]
        places[labels[-1], name, " < ".join(lines[:-6:-1])] += number
    return result


def noted(name: str, function: Callable) -> Callable:
    def call(*args: Any) -> Any:
        return noting_waits(name, function, *args)

    return call


class WaitsOfOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return noting_waits(str(func), func, *args, **(kwargs or {}))


def replace(owner: Any, name: str, wrap: Callable) -> None:
    setattr(owner, name, wrap(getattr(owner, name)))


def apart(function: Callable) -> Callable:
    return functools.wraps(function)(labelled("stand-in")(function))


def sample(draw: random.Random, shape: Any) -> Any:
    from megatron_r1.trainer.training_sample import Sample

    prompt = [draw.randrange(67) for _ in range(draw.randrange(1, 6))]
    response = [draw.randrange(67) for _ in range(draw.randrange(1, 20))]
    routed = [
        draw.sample(range(shape.num_experts), shape.topk)
        for _ in range((len(prompt) + len(response) - 1) * len(shape.moe_layers))
    ]
    logprobs = [-draw.uniform(3, 6) for _ in response]
    experts = bytes(expert for row in routed for expert in row)
    return Sample.pack(prompt, response, logprobs, draw.uniform(-2, 2), experts)


def run(case: dict, config: Config, grid_position: Any) -> None:
    from megatron_r1.models.routing_shape import routing_shape
    from megatron_r1.trainer.trainer import Trainer

    trainer = Trainer(config, grid_position)
    trainer.refresh_reference()
    shape = routing_shape(trainer.hf_config)
    for label in ("warm-up", case["label"]):
        draw = random.Random(label)
        made = [[sample(draw, shape) for _ in range(3)] for _ in range(case["microbatches"])]
        with labelled(f"{label} load"):
            trainer.load([made])
        with labelled(f"{label} logprobs"):
            trainer.compute_logprobs(1.0, with_reference=True)
        with labelled(f"{label} compare"):
            trainer.measure_logprob_diff()
        with labelled(f"{label} update"):
            trainer.update(0, LOSS, SETTINGS, 1e-3)


def main() -> None:
    compute_everywhere()
    WaitsOfOperators().__enter__()
    for name in KERNELS_OF_FP8:
        replace(transformer_engine_on_host, name, apart)
    transformer_engine_on_host.install()
    transformer_engine_on_host.use_our_attention()
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_r1.models.attention import CoreAttention
    from megatron_r1.models.ring_attention import _RingAttention
    from megatron_r1.trainer import distributed

    def unfused(function: Callable) -> Callable:
        return lambda *args, fused=False, **kwargs: function(*args, **kwargs)

    in_torch = registry.load_primitives("torch")
    in_torch = in_torch._replace(**{k: apart(f) for k, f in in_torch._asdict().items()})
    registry.load_primitives = lambda backend: in_torch
    for name in ("permute", "unpermute", "sort_chunks_by_idxs"):
        replace(token_dispatcher, name, lambda function: apart(unfused(function)))
    replace(CoreAttention, "forward", apart)
    replace(_RingAttention, "backward", lambda function: staticmethod(apart(function)))
    for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
        replace(owner, "synchronize", functools.partial(noted, f"{owner.__name__}.synchronize"))

    grid_position = None
    for case in json.loads(sys.argv[1]):
        config = Config.model_validate(
            {
                "model": {
                    "path": case["model"],
                    "dtype": case["dtype"],
                    "mtp": case["mtp"],
                    "fusions": ["gradient_accumulation", "permute"],
                },
                "fp8": case["fp8"],
                "parallel": {**case["parallel"], "threads": 1},
                "rl": {"routing_replay": case["replay"]},
            }
        )
        grid_position = grid_position or distributed.initialize(config.parallel, seed=0)
        run(case, config, grid_position)
    rows = [
        {"label": key[0], "what": key[1], "of": key[2], "number": n} for key, n in places.items()
    ]
    Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps(rows))
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
