"""The reward models of a recipe in miniature, which vLLM's own server serves.

One model with random weights is in the place of all of them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1_grading.rewards import SERVED_REWARDS

from megatron_r1.config import Config
from megatron_r1.models.hf_config import HFConfig, score_model_config
from megatron_r1.pipeline.pipeline_recipe import ServeConfig
from megatron_r1.pipeline.serving import choose_ports, serve_models
from megatron_r1.rehearse.model import write_random_model_folder

SERVED_NAME = "reward_model"
MAX_TOKENS = 1024
"""The longest question with its response; its template may be longer than the policy's."""


def reward_models(options: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the kinds of `rewards.options` that a reward model grades, each with its name."""
    return {
        kind: values["model"]
        for kind, values in options.items()
        if kind in SERVED_REWARDS
        and SERVED_REWARDS[kind].startswith("r1_grading.remote.reward_model:")
    }


@contextlib.contextmanager
def serve_reward_models(
    config: Config, hf_config: HFConfig, folder: Path, verb: str
) -> Iterator[list[str]]:
    """Serve one model with random weights in the place of every reward model of a miniature's `rl`.
    Yield the settings that name its address, as on a cluster (examples/deepseek_r1/stage.sbatch).

    Args:
        config: the miniature.
        hf_config: config.json of the policy, whose architecture the served model has.
        folder: the folder of the served model and its logs.
        verb: the recipe's verb.

    Raises:
        RunError: the server does not start."""
    names = reward_models(config.rewards.options)
    if verb != "rl" or not names:
        yield []
        return
    write_random_model_folder(folder / SERVED_NAME, score_model_config(hf_config), seed=2)
    tokens = min(MAX_TOKENS, hf_config.get("max_position_embeddings", MAX_TOKENS))
    arguments = ["--dtype", "float32", "--max-model-len", str(tokens), "--served-model-name"]
    server = ServeConfig(
        model=str(folder / SERVED_NAME),
        task="classify",
        arguments=[*arguments, *set(names.values())],
    )
    ports = choose_ports({SERVED_NAME: server}, {})
    log = {SERVED_NAME: folder / f"log-{SERVED_NAME}.txt"}
    with serve_models({SERVED_NAME: server}, ports, log, lambda: None) as (running,):
        yield [f"--rewards.options.{kind}.url={running.url}" for kind in names]
