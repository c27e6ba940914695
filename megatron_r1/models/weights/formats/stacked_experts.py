"""How published checkpoints store all experts of a layer in one tensor (gpt-oss). No torch.

The weight table names the tensors of every expert one by one, as other checkpoints have them.
Where `Family.stacked_experts` is set, files have instead, transposed, with gate and up in alternate
columns:

    experts.gate_up_proj (experts, hidden, 2 inner), gate_up_proj_bias (experts, 2 inner)
    experts.down_proj (experts, inner, hidden), down_proj_bias (experts, hidden)"""

import re
from dataclasses import dataclass
from typing import Any

from megatron_r1.models.hf_config import HFConfig, model_family
from megatron_r1.models.weights.splits import Shape

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")


@dataclass(frozen=True)
class StackedPart:
    """One expert's tensor of the weight table, as a part of the stored tensor `name`: every
    `step`-th column of stored[expert].

    Attributes:
        name: the stored tensor's name.
        expert: the expert's index in the stored tensor.
        first: the first column of stored[expert].
        step: the distance of the columns: first, first + step, first + 2 step …"""

    name: str
    expert: int
    first: int
    step: int

    def select(self, stored: Any) -> Any:
        """Return the expert's torch tensor, or some of its rows, as a view of `stored`.

        Args:
            stored: stored[expert], or a run of its columns that begins at a multiple of `step`."""
        part = stored[..., self.first :: self.step]
        return part.T if part.dim() == 2 else part

    def stored_region(self, shape: Shape, dim: int, start: int, length: int) -> tuple[Shape, Shape]:
        """Return (starts, sizes) of the region of stored[expert] that holds `length` rows (dim
        0) or columns (dim 1) of the expert's tensor, from `start`.

        Args:
            shape: the shape of stored[expert].
            dim: 0 for rows, 1 for columns.
            start: the first row or column.
            length: the number of rows or columns."""
        starts, sizes = [0] * len(shape), list(shape)
        if dim == 0:
            starts[-1], sizes[-1] = self.step * start, self.step * length
        else:
            starts[0], sizes[0] = start, length
        return tuple(starts), tuple(sizes)

    def stored_shape(self, shape: Shape, num_experts: int) -> Shape:
        """Return the shape of the stored tensor.

        Args:
            shape: the shape of one expert's tensor.
            num_experts: the number of experts in the stored tensor."""
        *leading_sizes, columns = reversed(shape)
        return (num_experts, *leading_sizes, self.step * columns)


def stacked_part(hf_config: HFConfig, name: str) -> StackedPart | None:
    """Return the part of a stored tensor that is the tensor `name` of the weight table, or None if
    files have that tensor under its own name."""
    if not model_family(hf_config).stacked_experts or not (match := _EXPERT.fullmatch(name)):
        return None
    prefix, expert, kind, ending = match.groups()
    stored_name, step = ("down", 1) if kind == "down" else ("gate_up", 2)
    bias = "_bias" if ending == "bias" else ""
    return StackedPart(f"{prefix}.{stored_name}_proj{bias}", int(expert), int(kind == "up"), step)
