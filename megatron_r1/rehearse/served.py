"""The reward models of a recipe in miniature, behind vLLM's own server."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1_grading.rewards import REMOTE

from megatron_r1.config import Config
from megatron_r1.models.hf_config import as_score_model
from megatron_r1.pipeline.pipeline_recipe import ServeConfig
from megatron_r1.pipeline.serving import choose_ports, served
from megatron_r1.rehearse import model

NAME = "reward_model"
MOST_TOKENS = 1024
"""The longest question with its response; its template may be longer than the policy's."""


def reward_models(options: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the kinds of `rewards.options` that a reward model grades, each with its name."""
    return {
        kind: values["model"]
        for kind, values in options.items()
        if kind in REMOTE and REMOTE[kind].startswith("r1_grading.served.reward_model:")
    }


@contextlib.contextmanager
def started(config: Config, hf: dict, folder: Path, verb: str) -> Iterator[list[str]]:
    """Serve one model with random weights in the place of every reward model that a miniature's
    `rl` has; yield the settings that name its address, as on a cluster
    (examples/deepseek_r1/stage.sbatch).

    hf: config.json of the policy, whose architecture the served model has. Raises RunError."""
    names = reward_models(config.rewards.options)
    if verb != "rl" or not names:
        yield []
        return
    model.write_folder(folder / NAME, as_score_model(hf), seed=2)
    tokens = min(MOST_TOKENS, hf.get("max_position_embeddings", MOST_TOKENS))
    arguments = ["--dtype", "float32", "--max-model-len", str(tokens), "--served-model-name"]
    server = ServeConfig(
        model=str(folder / NAME), task="classify", arguments=[*arguments, *set(names.values())]
    )
    ports = choose_ports({NAME: server}, {})
    log = {NAME: folder / f"log-{NAME}.txt"}
    with served({NAME: server}, ports, log, lambda: None) as (running,):
        yield [f"--rewards.options.{kind}.url={running.url}" for kind in names]
