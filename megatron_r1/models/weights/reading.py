"""Import: every rank reads its own slices of a checkpoint and nothing else."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_r1.models.hf_config import has_score_head
from megatron_r1.models.weights.layout import hf_tensors
from megatron_r1.models.weights.local import has_mtp, local_pieces
from megatron_r1.models.weights.rules import SCORE, Piece, Shape
from megatron_r1.models.weights.stored.hf_weights import HfWeights
from megatron_r1.models.weights.stored.megatron_weights import MegatronWeights


def load_hf(model_chunks: Sequence, hf: dict, path: str | Path, stored: dict | None = None) -> None:
    """Fill this rank's parameters, in their dtype, from the safetensors checkpoint in `path`.

    stored: the configuration of the checkpoint, where that is the language model that a score model
    `hf` starts from; its heads are ignored and the score head's weights are not changed. FP8
    checkpoints (fp8.py) are dequantized. MTP layers' copies of the embedding and head are ignored.
    Vocabulary padding becomes zero. Raises UserError naming every missing, unexpected or mis-shaped
    tensor."""
    _load(model_chunks, hf, HfWeights(path, stored or hf))


def load_megatron(
    model_chunks: Sequence, hf: dict, path: str | Path, stored: dict | None = None
) -> None:
    """Fill this rank's parameters from the weights in the Megatron checkpoint `path`.

    It may have been saved at any layout, with Megatron's own or Transformer Engine's layers; other
    content (optimizer, reference) is ignored. stored and errors: as in `load_hf`."""
    _load(model_chunks, hf, MegatronWeights(path, stored or hf))


def initialize_score(model_chunks: Sequence, hf: dict, *, std: float, seed: int) -> None:
    """Draw the head of a score model from N(0, std^2), the same for every parallel layout."""
    with torch.no_grad():
        for parameter, pieces, _ in local_pieces(model_chunks, hf):
            if [piece.hf_name for piece in pieces] == [SCORE]:
                parameter.copy_(_drawn(SCORE, tuple(parameter.shape), std, seed))


def _load(model_chunks: Sequence, hf: dict, weights: HfWeights | MegatronWeights) -> None:
    headless = has_score_head(hf) and not has_score_head(weights.hf)
    with weights, torch.no_grad():
        weights.check(has_mtp(model_chunks))
        for parameter, pieces, _ in local_pieces(model_chunks, hf):
            if headless and [piece.hf_name for piece in pieces] == [SCORE]:
                continue
            _zero_padding(parameter, pieces)
            for piece in pieces:
                values = weights.read(piece.hf_name, piece.dim, piece.hf_start, piece.length)
                parameter.narrow(piece.dim, piece.local_start, piece.length).copy_(values)


def initialize(model_chunks: Sequence, hf: dict, *, std: float, seed: int) -> None:
    """Fill this rank's parameters with random weights, the same for every parallel layout.

    Matrices are drawn from N(0, std^2), each HF tensor from a generator seeded by `seed` and its
    name; norms become 1, biases 0. Each tensor is drawn whole, in fp32, one at a time."""
    shapes = hf_tensors(hf)
    with torch.no_grad():
        for parameter, pieces, _ in local_pieces(model_chunks, hf):
            _zero_padding(parameter, pieces)
            for piece in pieces:
                shape = shapes[piece.hf_name][0]
                if len(shape) == 1:
                    values = torch.full(shape, float(piece.hf_name.endswith("norm.weight")))
                else:
                    values = _drawn(piece.hf_name, shape, std, seed)
                values = values.narrow(piece.dim, piece.hf_start, piece.length)
                parameter.narrow(piece.dim, piece.local_start, piece.length).copy_(values)


def _drawn(name: str, shape: Shape, std: float, seed: int) -> torch.Tensor:
    # A CPU's numbers, also with a GPU; crc32, because hash() is salted in every process.
    generator = torch.Generator()
    generator.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _zero_padding(parameter: torch.Tensor, pieces: Sequence[Piece]) -> None:
    if sum(piece.length for piece in pieces) < parameter.shape[pieces[0].dim if pieces else 0]:
        parameter.zero_()
