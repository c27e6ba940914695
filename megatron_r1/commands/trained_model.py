"""The model of a run, or of a folder, the recipe and template that trained it, and what to do with
it next. Of a supervised model the template is guessed from its prompts."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config, infer_verb
from megatron_r1.data.prompt_tokenizer import PLACEHOLDER, TEMPLATES
from megatron_r1.data.rows import read_canonical_rows
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.engines.server import gpu
from megatron_r1.models.hf_config import hub_hint
from megatron_r1.trainer.checkpoints.checkpoint_folders import STATE_FILE, complete_checkpoints

SPEAKER = re.compile(r"\S+: ")


def guess_template(prompts: Sequence[str]) -> str | None:
    """Return the template that prompts were made with, or None where they show none.

    It is one of `TEMPLATES`, or a template of two speakers, as "User: …\\nAssistant: ": prompts
    that begin with the same speaker and end with the same line."""
    for name, text in TEMPLATES.items():
        head, _, tail = text.partition(PLACEHOLDER)
        if all(prompt.startswith(head) and prompt.endswith(tail) for prompt in prompts):
            return name
    prefix = os.path.commonprefix(list(prompts))
    suffix = os.path.commonprefix([prompt[::-1] for prompt in prompts])[::-1]
    speaker, line_start = SPEAKER.match(prefix), suffix.rfind("\n")
    if not speaker or line_start < 0 or not suffix[line_start:].strip():
        return None
    return f"{speaker[0]}{PLACEHOLDER}{suffix[line_start:]}"


CONVERT = "megatron-r1 convert"
TEMPLATE_ROWS = 100
"""Supervised prompts that are compared for their template."""


def find_exported(path: str, name: str) -> Path:
    """Return the Hugging Face folder that `path` is, or the `hf/` of the run whose folder it is.

    Args:
        path: a Hugging Face folder or a run's folder.
        name: the argument that is `path`, for errors.

    Raises:
        UserError: there is no such folder; the message has the command that makes one."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    checkpoints = complete_checkpoints(folder / "checkpoints")
    if (folder / "hf" / "config.json").is_file():
        return folder / "hf"
    if (folder / STATE_FILE).is_file() or checkpoints:
        run = folder.resolve().parents[1] if (folder / STATE_FILE).is_file() else folder
        raise UserError(
            f"{name} {path} has checkpoints and no hf/ yet: {CONVERT} to-hf {path} "
            f"{run}/hf exports one; a run that ends does so by itself",
            key=name,
            cause=Cause.MISSING,
        )
    if (folder / "config.yaml").is_file():
        raise UserError(
            f"{name} {path}: this run has no checkpoint yet; it writes one every checkpoint.every "
            "steps, and hf/ at its end",
            key=name,
            cause=Cause.MISSING,
        )
    fault = "neither a Hugging Face folder (no config.json) nor a run's folder (no hf/)"
    if folder.is_file():
        fault = "it is a file, and no folder"
    elif not folder.is_dir():
        fault = f"no such folder (relative to {Path.cwd()}){hub_hint(str(path))}"
    raise UserError(f"{name} {path}: {fault}", key=name, cause=Cause.NOT_FOUND)


def trained_recipe(model: Path) -> Config | None:
    """Return the settings of the run whose `hf/` a model folder is, or None for any other."""
    recipe = model.parent / "config.yaml"
    return configuration.load_recipe(recipe) if model.name == "hf" and recipe.is_file() else None


def template_of_model(model: Path, name: str) -> tuple[str, str]:
    """Return a model's template and the reason for it. It is that of the RL run that made the
    model, else the tokenizer's own, else the one of the supervised prompts, else plain.

    Args:
        model: the model's folder.
        name: the argument that names the model, for errors."""
    recipe = trained_recipe(model)
    if recipe is not None and infer_verb(recipe) == "rl":
        return recipe.data.template, f"as {model.parent} trained the model"
    if load_tokenizer(str(model), name).chat_template:
        return "chat", "the tokenizer has a chat template"
    if recipe is not None and (supervised_template := _supervised_template(recipe)):
        return supervised_template, f"as the supervised prompts of {model.parent} have it"
    return "plain", "the tokenizer has no chat template: User: …, Assistant:"


def _supervised_template(recipe: Config) -> str | None:
    """Return the template of the prompts that a model was supervised with, or None."""
    data = recipe.sft.data
    path = data if isinstance(data, str) else data[0].path
    try:
        rows = itertools.islice(read_canonical_rows(path), TEMPLATE_ROWS)
        return guess_template([row["prompt"] for _, row in rows])
    except (UserError, KeyError):
        return None


def next_commands(config: Config) -> list[tuple[str, str]]:
    """Return (purpose, command) of what to do with the policy that an RL run trains."""
    folder, more_steps = config.run.folder, config.run.steps + config.run.steps // 2
    # On a CPU vLLM takes its share of the machine's memory, and compiling takes minutes.
    on_cpu = "" if gpu.is_usable() else " --enforce-eager --gpu-memory-utilization 0.3"
    return [
        ("the curves, live", f"tensorboard --logdir {folder}"),
        ("train on from here", f"megatron-r1 rl {folder}/config.yaml --run.steps {more_steps}"),
        (
            "serve the model over an OpenAI-compatible API",
            f"python -m vllm.entrypoints.openai.api_server --model {folder}/hf "
            f"--dtype {config.rollout.dtype}{on_cpu}",
        ),
    ]
