"""The flagship recipe, examples/deepseek_r1/r1_zero.yaml, in the sizes that a check can run; and
the file of measured numbers for `megatron-r1 plan RECIPE --calibrate FILE`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_r1.base.errors import UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.config import Config, FP8Config, load_recipe
from megatron_r1.models.fp8_checks import check_fp8_device
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.plan.calibration_file import RELATIVE_TO
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.rehearse import miniature
from megatron_r1.rehearse.settings import RehearsalDevice
from tools.bench.host import ROOT

RECIPE = ROOT / "examples" / "deepseek_r1" / "r1_zero.yaml"
NULL_GPUS = "NULL_GPUS"
"""The environment variable of processes on null GPUs."""


def num_gpus() -> int:
    return torch.cuda.device_count()


def device_kind() -> RehearsalDevice:
    """Return where a miniature runs here."""
    if not num_gpus():
        return "cpu"
    return "null-gpu" if NULL_GPUS in os.environ else "gpu"


def recipe_miniature(folder: Path, max_ranks: int, **settings: Any) -> miniature.Miniature:
    """The recipe in miniature. settings: those that differ before it is shrunk, by section."""
    os.chdir(ROOT)  # the recipe names its model so
    overrides = {
        f"{name}.{key}": value for name, values in settings.items() for key, value in values.items()
    }
    config = load_recipe(RECIPE, overrides)
    hf_config = read_hf_config(config.model.path, None)
    device = "gpu" if device_kind() == "cpu" else device_kind()
    return miniature.make_miniature(config, hf_config, folder, max_ranks, device=device)


def widen_config(hf_config: HFConfig, small: HFConfig, **sizes: int) -> HFConfig:
    """A model of few layers and experts with the widths of `hf_config`, and the vocabulary of
    `small`, its miniature."""
    excluded_keys = ("quantization_config", "auto_map")  # as miniatures do: weights are bf16
    tokenizer_keys = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    config = {key: value for key, value in hf_config.items() if key not in excluded_keys}
    groups = {"n_group": 1, "topk_group": 1}  # there are too few experts for groups
    layer_counts = {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    tokens = {key: small[key] for key in tokenizer_keys if key in small}
    return config | tokens | groups | layer_counts | sizes


def check_fp8() -> None:
    """Skip the test where Transformer Engine lacks the recipe of DeepSeek-V3."""
    if device_kind() == "cpu":
        return
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    try:
        check_fp8_device(FP8Config(recipe="blockwise"), torch.cuda.get_device_capability(), cuda)
    except UserError as error:
        pytest.skip(str(error))


def with_settings(config: Config, **sections: dict[str, Any]) -> Config:
    """Return a configuration with some settings of its sections changed."""
    tree = config.model_dump()
    for name, values in sections.items():
        tree[name] |= values
    return Config.model_validate(tree)


FILE = "calibration.yaml"
STANDS_FOR = "H800"
"""The hardware whose rates stand in the formulas where there is no GPU; nothing is written then."""


def hardware_name() -> str:
    """The planner's name of GPU 0."""
    if device_kind() != "gpu":
        return STANDS_FOR
    device = torch.cuda.get_device_name(0)
    names = [name for name in HARDWARE if name in device.replace("-", " ").split()]
    return names[0] if names else pytest.skip(f"the planner lacks the rates of {device}")


def write_calibration(folder: Path, name: str, values: Mapping[str, float]) -> dict[str, Any]:
    """Write values next to those that other checks have measured of the same hardware, and return
    them with the file's name."""
    if device_kind() != "gpu":
        return dict(values)
    file = folder.parent.parent / FILE  # in --out, of all checks
    stored_values = yaml.safe_load(file.read_text()) if file.exists() else {}
    if stored_values.get(RELATIVE_TO) != name:
        stored_values = {RELATIVE_TO: name}
    title = "# Measured by tools/gpu_check; for megatron-r1 plan --calibrate\n"
    atomic_write(file, title + yaml.safe_dump(stored_values | dict(values), sort_keys=False))
    return {**values, "written": str(file)}
