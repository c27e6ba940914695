"""Records what this engine rank needs of every Hugging Face tensor, from vLLM's own loaders.

The model's layers are put into checkpoint form on the meta device, its `load_weights` is run on
meta tensors, and every copy that its loaders make is recorded: which rectangle of which tensor
goes where in which parameter. Fused, split, expert-parallel and padded parameters come out right
by construction, and a receiver of exactly those rectangles needs no loader any more.

The experts of a gpt-oss model are loaded one by one, as a push names them. vLLM 0.32's loader
(model_executor/models/gpt_oss.py: `GptOssModel._load_weights_other`) takes all experts of a layer
as one tensor and transposes it, which is no copy of rectangles. Its parameters have gate and up in
alternate rows; ranks that share experts by tensor parallelism leave the second layer's bias to the
first of them. The kernel of the experts keeps the tensors of both biases that it was built with."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise, meta
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")
_BIASES = ("w13_bias", "w2_bias")


def _load_into(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Have `model` load (name, tensor) pairs; it may be of any architecture."""
    if type(model).__name__ == "GptOssForCausalLM":
        weights = _without_stacked_experts(model, weights)
        # Its loader reads a key of this, even where --hf-overrides has made it None.
        for config in (model.config, model.model.config):
            if getattr(config, "quantization_config", 0) is None:
                del config.quantization_config
    model.load_weights(weights)


def _is_left_out(parameter: str, layer: Any) -> bool:
    """Whether this rank loads nothing into a layer's parameter, which is zero."""
    return parameter == "w2_bias" and layer.moe_config.moe_parallel_config.tp_rank > 0


def load_biases(
    layer: torch.nn.Module,
    received: Mapping[str, torch.Tensor],
    in_use: Mapping[str, torch.Tensor],
) -> None:
    """Write the biases of a layer's experts into the tensors in use, and give it these.

    A kernel that is built again, on a CPU, would otherwise compute with views of the receive
    buffer. A bias that this rank leaves out is set to zero; dummy weights are not.

    Args:
        layer: the layer of experts.
        received: the received tensors of the layer, by name.
        in_use: the tensors that the engine computes with, by name."""
    for name in _BIASES:
        if name in in_use:
            bias = in_use[name]
            if name in received:
                bias.data.copy_(received[name])
            else:
                bias.data.zero_()
            setattr(layer, name, bias)


def _without_stacked_experts(
    model: Any, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Load the experts among the weights; yield the others."""
    layers = dict(model.named_modules())
    for name, tensor in weights:
        if match := _EXPERT.fullmatch(name):
            prefix, expert, kind, ending = match.groups()
            # Of a layer on another pipeline stage there is none.
            if layer := layers.get(f"{prefix}.routed_experts"):
                _load_expert(layer, int(expert), kind, ending, tensor)
        else:
            yield name, tensor


def _load_expert(layer: Any, expert: int, kind: str, ending: str, tensor: torch.Tensor) -> None:
    local_expert = layer._map_global_expert_id_to_local_expert_id(expert)
    rank = layer.moe_config.moe_parallel_config.tp_rank
    if local_expert == -1:
        return
    if kind == "down":
        target = getattr(layer, f"w2_{ending}")[local_expert]
        if ending == "weight":
            tensor = tensor.narrow(1, rank * target.shape[1], target.shape[1])
        elif rank > 0:
            return
    else:
        target = getattr(layer, f"w13_{ending}")[local_expert][int(kind == "up") :: 2]
        tensor = tensor.narrow(0, rank * target.shape[0], target.shape[0])
    target.copy_(tensor)


@dataclass(frozen=True)
class CheckpointParameter:
    """A parameter or buffer in checkpoint form.

    Attributes:
        layer: the layer that has it.
        name: its name in the layer.
        title: the name, after the layer's.
        shape: in checkpoint form.
        strides: elements from one index to the next, by dimension.
        dtype: in checkpoint form.
        is_live: vLLM keeps it in this form while serving (a bias), so that a new value is copied
            into it.
    """

    layer: torch.nn.Module
    name: str
    title: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    is_live: bool

    @property
    def num_bytes(self) -> int:
        """Bytes from the first to the last element, gaps of the strides included."""
        steps = zip(self.shape, self.strides, strict=True)
        return self.dtype.itemsize * (1 + sum((size - 1) * stride for size, stride in steps))


@dataclass(frozen=True)
class LoaderCopy:
    """A rectangle of a HF tensor that a loader copied into a parameter.

    Attributes:
        name: the HF tensor.
        rectangle: rows [top, bottom) and columns [left, right), as (top, bottom, left, right).
        offset: the offset of its first element, in elements of the parameter.
        pitch: the distance between its rows, in elements of the parameter."""

    name: str
    rectangle: tuple[int, int, int, int]
    offset: int
    pitch: int

    @property
    def height(self) -> int:
        """Rows of the rectangle."""
        top, bottom, _, _ = self.rectangle
        return bottom - top

    @property
    def num_elements(self) -> int:
        """Elements of the checkpoint's tensor that the copy has, rows times columns."""
        _, _, left, right = self.rectangle
        return self.height * (right - left)


def record_copies(
    models: Sequence[torch.nn.Module], tensors: Sequence[tuple[str, Sequence[int]]]
) -> dict[CheckpointParameter, list[LoaderCopy]]:
    """Run the loaders on (name, shape) of a checkpoint's tensors; return the copies into each
    parameter, in the order of loading.

    Args:
        models: the model, and the drafter, if any; the drafter's loader gets the tensors that the
            model's did not take. Layers that both share count as the model's. The models must not
            be in use meanwhile, and are unchanged afterwards.
        tensors: the name and the shape of each tensor of the checkpoint.

    Raises:
        ValueError: where a loader does more than copy rectangles, or leaves part of a parameter
            unloaded."""
    titles: dict[str, torch.nn.Module] = {}
    memo: set[torch.nn.Module] = set()
    for model, prefix in zip(models, ("", "drafter"), strict=False):
        titles |= dict(model.named_modules(memo, prefix))
    layers = list(titles.values())
    tied_parameters = _tied_parameters(layers)
    loaders: list[Any] = [*models]  # torch's annotations allow tensors and modules as attributes
    torchao = [getattr(loader, "_do_torchao_reload", False) for loader in loaders]
    infos = [to_checkpoint_form(layer) for layer in layers]
    try:
        recorder = _Recorder(titles, tied_parameters)
        for loader in loaders:
            loader._do_torchao_reload = False
            names = {copy.name for copies in recorder.copies.values() for copy in copies}
            tensors_left = [(name, shape) for name, shape in tensors if name not in names]
            with recorder, torch.no_grad():
                _load_into(loader, (recorder.source(name, shape) for name, shape in tensors_left))
    finally:
        for layer, info in zip(layers, infos, strict=True):
            to_kernel_form(layer, info)
        for loader, uses_torchao in zip(loaders, torchao, strict=True):
            loader._do_torchao_reload = uses_torchao
    recorder.check_whole()
    return recorder.copies


def to_checkpoint_form(layer: torch.nn.Module) -> LayerReloadingInfo:
    """Put a layer into checkpoint form on the meta device; its tensors are kept in the result."""
    info = layerwise.get_layerwise_info(layer)
    info.kernel_tensors = get_layer_params_buffers(layer)
    info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
    meta.restore_layer_on_meta(layer, info)
    return info


def to_kernel_form(layer: torch.nn.Module, info: LayerReloadingInfo) -> None:
    """Put the kept tensors back into a layer."""
    layerwise._place_kernel_tensors(layer, info)
    info.reset()


class _Recorder(TorchDispatchMode):
    def __init__(
        self, layers: dict[str, torch.nn.Module], tied: set[tuple[torch.nn.Module, str]]
    ) -> None:
        super().__init__()
        self._tied = tied
        self.copies: dict[CheckpointParameter, list[LoaderCopy]] = {}
        self._sources: dict[int, tuple[str, torch.Tensor]] = {}
        self._parameters: dict[int, CheckpointParameter] = {}
        for title, layer in layers.items():
            parameters, buffers = get_layer_params_buffers(layer)
            for name, tensor in (parameters | buffers).items():
                parameter = CheckpointParameter(
                    layer=layer,
                    name=name,
                    title=f"{title}.{name}",
                    shape=tuple(tensor.shape),
                    strides=tensor.stride(),
                    dtype=tensor.dtype,
                    is_live=not tensor.is_meta,
                )
                self._parameters.setdefault(_storage_id(tensor), parameter)

    def source(self, name: str, shape: Sequence[int]) -> tuple[str, torch.Tensor]:
        """Return the (name, tensor) that a loader receives for the HF tensor `name`."""
        tensor = torch.empty(tuple(shape), dtype=torch.bfloat16, device="meta")
        self._sources[_storage_id(tensor)] = (name, tensor)
        return name, tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self._record_copy(*args[:2])
            return args[0]
        return func(*args, **(kwargs or {}))

    def _record_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        parameter = self._parameters.get(_storage_id(target))
        if parameter is None:
            return  # a temporary tensor of the loader
        named_source = self._sources.get(_storage_id(source))
        if named_source is None:
            raise ValueError(
                f"the loader of {parameter.title} computes with its tensors, where only copies "
                "can be received piece by piece; push whole tensors instead"
            )
        name, source_tensor = named_source
        rectangle = _view_rectangle(source, source_tensor)
        pitch = _row_pitch(target)
        if rectangle is None or pitch is None:
            raise ValueError(
                f"the loader of {parameter.title} takes elements of {name} (shape "
                f"{tuple(source_tensor.shape)}) that are not a rectangle of rows and columns"
            )
        copy = LoaderCopy(name, rectangle, int(target.storage_offset()), pitch)
        self.copies.setdefault(parameter, []).append(copy)

    def check_whole(self) -> None:
        """Raise ValueError unless every parameter is loaded whole.

        Exceptions are a vocabulary's padding, the second of two tied parameters, the scales of
        attention, which are not weights, and biases that another rank adds."""
        for parameter in self._parameters.values():
            copies = self.copies.get(parameter, [])
            num_loaded = sum(copy.num_elements for copy in copies)
            layer = parameter.layer
            if not copies and (
                parameter.name not in layer._parameters
                or (layer, parameter.name) in self._tied
                or is_deferred_attention_layer(layer)
                or _is_left_out(parameter.name, layer)
            ):
                continue
            size = torch.Size(parameter.shape).numel()
            is_padded = isinstance(parameter.layer, VocabParallelEmbedding)
            if num_loaded != size and not (is_padded and num_loaded < size):
                raise ValueError(
                    f"{parameter.title} gets {num_loaded} of its {size} elements: the tensors of "
                    "the trainer's model and the engine's do not match"
                )


def _tied_parameters(layers: list[torch.nn.Module]) -> set[tuple[torch.nn.Module, str]]:
    """Return (layer, name) of parameters that an earlier layer has too."""
    parameter_ids: set[int] = set()
    tied_parameters = set()
    for layer in layers:
        for name, parameter in get_layer_params_buffers(layer)[0].items():
            if id(parameter) in parameter_ids:
                tied_parameters.add((layer, name))
            parameter_ids.add(id(parameter))
    return tied_parameters


def _storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _view_rectangle(view: torch.Tensor, tensor: torch.Tensor) -> tuple[int, int, int, int] | None:
    """Return (top, bottom, left, right) of a view in the contiguous `tensor`, or None."""
    columns = tensor.shape[1] if tensor.dim() > 1 else 1
    if tensor.dim() > 2 or view.numel() == 0:
        return None
    flat_view = view.reshape(-1, 1) if tensor.dim() < 2 else _squeezed_view(view)
    if tensor.dim() == 2 and flat_view.dim() < 2:
        if view.numel() % columns:
            return None
        flat_view = flat_view.reshape(-1, columns)
    if flat_view.dim() != 2:
        return None
    top, column = divmod(int(view.storage_offset()), columns)
    height, width = flat_view.shape
    if (height > 1 and flat_view.stride(0) != columns) or (width > 1 and flat_view.stride(1) != 1):
        return None
    return top, top + height, column, column + width


def _row_pitch(view: torch.Tensor) -> int | None:
    """Return the elements between a view's rows, or None where a row is not contiguous."""
    if view.dim() == 1:
        return view.stride(0)
    rows = _squeezed_view(view)
    if rows.dim() == 1:
        return rows.shape[0]
    if rows.dim() != 2 or (rows.shape[1] > 1 and rows.stride(1) != 1):
        return None
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def _squeezed_view(view: torch.Tensor) -> torch.Tensor:
    """Return a view without dimensions of size 1, except rows and columns."""
    if view.dim() >= 2 and view.shape[:-2].numel() == 1:
        return view.view(view.shape[-2:])
    return view.squeeze()
