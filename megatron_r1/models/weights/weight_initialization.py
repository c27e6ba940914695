"""Random initial weights, the same for any layout."""

import zlib
from collections.abc import Sequence

import torch

from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.layout import hf_tensors
from megatron_r1.models.weights.loading import local_pieces, zero_padding
from megatron_r1.models.weights.table import SCORE, Shape


def initialize_score_head(
    model_chunks: Sequence[torch.nn.Module], hf_config: HFConfig, *, std: float, seed: int
) -> None:
    """Draw the head of a score model from N(0, std^2), the same for every parallel layout.

    Args:
        model_chunks: this rank's virtual pipeline stages.
        hf_config: the model's `config.json`.
        std: standard deviation of the weights.
        seed: seed of the generator, together with the tensor's name."""
    with torch.no_grad():
        for parameter, pieces, _ in local_pieces(model_chunks, hf_config):
            if [piece.hf_name for piece in pieces] == [SCORE]:
                parameter.copy_(_draw_normal(SCORE, tuple(parameter.shape), std, seed))


def initialize_weights(
    model_chunks: Sequence[torch.nn.Module], hf_config: HFConfig, *, std: float, seed: int
) -> None:
    """Fill this rank's parameters with random weights, the same for every parallel layout.

    Matrices are drawn from N(0, std^2), each HF tensor from a generator seeded by `seed` and its
    name; norms become 1, biases 0. Each tensor is drawn whole, in fp32, one at a time.

    Args:
        model_chunks: this rank's virtual pipeline stages.
        hf_config: the model's `config.json`.
        std: standard deviation of the matrices.
        seed: an integer, the same on every rank."""
    shapes = hf_tensors(hf_config)
    with torch.no_grad():
        for parameter, pieces, _ in local_pieces(model_chunks, hf_config):
            zero_padding(parameter, pieces)
            for piece in pieces:
                shape = shapes[piece.hf_name][0]
                if len(shape) == 1:
                    values = torch.full(shape, float(piece.hf_name.endswith("norm.weight")))
                else:
                    values = _draw_normal(piece.hf_name, shape, std, seed)
                values = values.narrow(piece.dim, piece.hf_start, piece.length)
                parameter.narrow(piece.dim, piece.local_start, piece.length).copy_(values)


def _draw_normal(name: str, shape: Shape, std: float, seed: int) -> torch.Tensor:
    # A CPU's numbers, also with a GPU; crc32, because hash() is salted in every process.
    generator = torch.Generator()
    generator.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
