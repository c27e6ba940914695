"""Reads a checkpoint as transformers' model, whole, in fp32 on the CPU, and what it has besides.

Of the trainer's code only what reads tensors by the table of weights is used."""

from __future__ import annotations

import copy
import json
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.model import LoraConfig
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.transformers_model import load_with_transformers
from megatron_r1.models.weights.formats.dcp import Box, DistributedCheckpoint
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.models.weights.formats.hf_writer import copy_model_files
from megatron_r1.models.weights.formats.megatron_weights import MegatronWeights
from megatron_r1.models.weights.formats.stacked_experts import stacked_part
from megatron_r1.why.policy.transformers_adapters import attach_transformers_adapters

MOMENT_NAMES = ("exp_avg", "exp_avg_sq")
STATE_PREFIX, REFERENCE_PREFIX = "optimizer.state.", "reference."
ADAPTERS_PREFIX = "adapters."
COMMON_STATE = "common_state/shard_0_1"
"""Megatron's key of what is no tensor and the same on all ranks."""


def open_checkpoint(checkpoint: Path) -> DistributedCheckpoint:
    """Return a checkpoint, one object for all who read it: where a tensor's bytes begin is looked
    up once.

    Raises:
        UserError: it is damaged."""
    metadata = checkpoint / ".metadata"
    if not metadata.is_file():
        raise _damage_error(metadata, "it is missing")
    return _open_cached(checkpoint, metadata.stat().st_mtime_ns)


def _damage_error(file: Path, fault: str) -> UserError:
    return UserError(
        f"{file} is damaged ({fault}); use another checkpoint",
        key="checkpoint",
        cause=Cause.MALFORMED,
    )


@lru_cache(maxsize=8)
def _open_cached(checkpoint: Path, _mtime_ns: int) -> DistributedCheckpoint:
    return DistributedCheckpoint(checkpoint)


class _Part:
    """The tensors of a checkpoint whose keys have a prefix, under the keys of the weights. Where
    the part has none, as moments have none of a router's bias, the weights' own stands in."""

    def __init__(self, checkpoint: DistributedCheckpoint, prefix: str) -> None:
        self._checkpoint, self._prefix = checkpoint, prefix

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def read(self, key: str, starts: Box, sizes: Box) -> Tensor:
        full_name = self._prefix + key
        return self._checkpoint.read(
            full_name if full_name in self._checkpoint.shapes else key, starts, sizes
        )


def has_part(checkpoint: Path, prefix: str) -> bool:
    """Return whether any key of a checkpoint has a prefix."""
    return any(key.startswith(prefix) for key in open_checkpoint(checkpoint).shapes)


def read_model(source: Path, hf_files: Path, prefix: str = "") -> torch.nn.Module:
    """Return transformers' model, fp32, with the tensors of a checkpoint or of a model's folder.

    Args:
        source: a checkpoint of the run, or a Hugging Face folder.
        hf_files: the folder of the model's config.json.
        prefix: what a checkpoint's keys of the tensors begin with: "" for the weights,
            "reference.", "optimizer.state.exp_avg.", …

    Raises:
        UserError: the source is incomplete, or another model's."""
    transformers.logging.set_verbosity_error()  # of what a checkpoint has besides: MTP layers
    transformers.logging.disable_progress_bar()
    hf_config = read_hf_config(str(hf_files))
    if (source / "config.json").is_file():
        return _enable_padding_gradient(load_with_transformers(source, hf_config, torch.float32))
    return model_of(read_tensors(source, hf_config, prefix), hf_files)


def model_of(tensors: Mapping[str, Tensor], hf_files: Path) -> torch.nn.Module:
    """Return transformers' model, fp32, with some tensors.

    Args:
        tensors: the weights by published name.
        hf_files: the folder of the model's config.json."""
    if (model := _copy_template(hf_files, tensors)) is not None:
        return model
    hf_config = read_hf_config(str(hf_files))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_checkpoint_folder(tensors, hf_files, folder)
        model = _enable_padding_gradient(load_with_transformers(folder, hf_config, torch.float32))
    state = model.state_dict()
    stacked_tensors = _stacked_experts(tensors)
    if "lm_head.weight" not in stacked_tensors:  # tied
        stacked_tensors["lm_head.weight"] = stacked_tensors.get(
            "model.embed_tokens.weight", torch.empty(0)
        )
    # A checkpoint may have more, as MTP layers.
    if all(
        name in stacked_tensors and torch.equal(tensor, stacked_tensors[name])
        for name, tensor in state.items()
    ):
        _templates.clear()
        _templates[hf_files] = model
    return model


def weights_of_part(checkpoint: Path, hf_config: HFConfig, prefix: str) -> MegatronWeights:
    """Return the weights of a checkpoint, or the tensors of their names that it has besides.

    Args:
        checkpoint: its folder.
        hf_config: the model's `config.json`.
        prefix: as of `read_model`.

    Raises:
        UserError: it is incomplete, or another model's."""
    weights = MegatronWeights(checkpoint, hf_config)
    weights.checkpoint.close()
    weights.checkpoint = cast(Any, _Part(open_checkpoint(checkpoint), prefix))
    return weights


def read_tensors(source: Path, hf_config: HFConfig, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a checkpoint or of a model's folder by published name, fp32.

    Args:
        source: a checkpoint of the run, or a Hugging Face folder.
        hf_config: the model's config.json.
        prefix: as of `read_model`, of a checkpoint.

    Raises:
        UserError: the source is incomplete, or another model's."""
    if (source / "config.json").is_file():
        with HFWeights(source, hf_config) as hf_weights:
            return dict(_published_tensors(hf_weights, hf_config))
    with weights_of_part(source, hf_config, prefix) as weights:
        return dict(_published_tensors(weights, hf_config))


def write_checkpoint_folder(tensors: Mapping[str, Tensor], hf_files: Path, folder: Path) -> None:
    """Write a Hugging Face folder of tensors that are not quantized.

    Args:
        tensors: the weights by published name.
        hf_files: the folder of the model's other files.
        folder: an empty folder."""
    copy_model_files(hf_files, folder)
    config = json.loads((hf_files / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def read_adapted_model(
    checkpoint: Path, base: Path, hf_files: Path, lora: LoraConfig, prefix: str = ""
) -> torch.nn.Module:
    """Return transformers' model, fp32, with the adapters of a checkpoint.

    Args:
        checkpoint: the checkpoint of a run with `model.lora`.
        base: the weights that the adapters belong to, a Hugging Face folder or a checkpoint.
        hf_files: the folder of the model's config.json.
        lora: their rank and scale.
        prefix: as of `read_model`.

    Raises:
        UserError: the checkpoint is damaged, or the folder another model's."""
    model = read_model(base, hf_files)
    names, read = read_adapter_factors(checkpoint, prefix)
    attach_transformers_adapters(model, names, read, lora.alpha / lora.rank)
    return model


def read_adapter_factors(
    checkpoint: Path, prefix: str
) -> tuple[list[str], Callable[[str], Tensor]]:
    """Return the names of the adapters' factors in a checkpoint, and the function that reads one,
    fp32.

    Args:
        checkpoint: the checkpoint of a run with `model.lora`.
        prefix: as of `read_model`.

    Raises:
        UserError: the checkpoint is damaged."""
    reader, beginning = open_checkpoint(checkpoint), f"{prefix}{ADAPTERS_PREFIX}"

    def read(name: str) -> Tensor:
        shape = reader.shapes[beginning + name]
        return reader.read(beginning + name, (0,) * len(shape), shape).float()

    names = [key.removeprefix(beginning) for key in reader.shapes if key.startswith(beginning)]
    return names, read


_templates: dict[Path, torch.nn.Module] = {}
"""The newest model whose tensors are a checkpoint's, by name and value: transformers converts none
of them, so that others of its shape need not go through files."""


def _copy_template(hf_files: Path, tensors: Mapping[str, Tensor]) -> torch.nn.Module | None:
    """Return a model with these tensors; None where transformers has to convert them."""
    if hf_files not in _templates:
        return None
    model = copy.deepcopy(_templates[hf_files])
    model.load_state_dict(_stacked_experts(tensors), strict=False)
    return model


EXPERT_TENSOR_NAME = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def _stacked_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with those of experts as transformers' classes have them: one tensor of
    all experts, gate and up together."""
    stacked: dict[str, Tensor] = {}
    parts: dict[str, dict[tuple[str, int], Tensor]] = {}
    for name, tensor in tensors.items():
        if (match := EXPERT_TENSOR_NAME.fullmatch(name)) is None:
            stacked[name] = tensor
        else:
            parts.setdefault(match[1], {})[match[3], int(match[2])] = tensor
    for name, experts in parts.items():
        numbers = sorted({number for _, number in experts})
        if {("gate", 0), ("up", 0), ("down", 0)} <= experts.keys():
            pairs = [torch.cat([experts["gate", n], experts["up", n]]) for n in numbers]
            stacked[f"{name}.gate_up_proj"] = torch.stack(pairs)
            stacked[f"{name}.down_proj"] = torch.stack([experts["down", n] for n in numbers])
    return stacked


def _enable_padding_gradient(model: torch.nn.Module) -> torch.nn.Module:
    """Let the padding token's embedding have a gradient too, as it has in the trainer."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    return model.eval()


def _published_tensors(
    weights: MegatronWeights | HFWeights, hf_config: HFConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the weights, fp32, under its published name."""
    stacked: dict[str, Tensor] = {}
    for name, (shape, _) in weights.tensors.items():
        values = weights.read(name, 0, 0, shape[0]).float().contiguous()
        part = stacked_part(hf_config, name)
        if part is None:
            yield name, values
            continue
        stacked_tensor = stacked.setdefault(
            part.name, torch.empty(part.stored_shape(shape, hf_config["n_routed_experts"]))
        )
        part.select(stacked_tensor[part.expert]).copy_(values)
    yield from stacked.items()


def read_state(checkpoint: Path) -> int | None:
    """Return the finished updates that Adam's bias correction counts, of a checkpoint; None where
    it says nothing.

    Raises:
        UserError: its file is damaged."""
    saved = open_checkpoint(checkpoint)
    file = checkpoint / "common.pt"  # up to Megatron-Core 0.18
    if not file.is_file():
        step = saved.read_object(COMMON_STATE)[0].get("optimizer_step")
        return None if step is None else int(step)
    try:
        common = torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise _damage_error(file, str(error).partition("\n")[0]) from error
    step = common.get("optimizer_step")
    return None if step is None else int(step)
