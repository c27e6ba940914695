"""The model of a run or of a folder: where it is, its recipe, and the commands to try next."""

from pathlib import Path

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.engines.server import gpu
from megatron_r1.models.hf_config_file import hub_hint
from megatron_r1.trainer.checkpoints.checkpoint_folders import STATE_FILE, complete_checkpoints

CONVERT = "megatron-r1 convert"


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
