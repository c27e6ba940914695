"""Import: every rank reads its own slices of a checkpoint, and nothing else of it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_r1.weights.layout import hf_tensors
from megatron_r1.weights.local import has_mtp, local_pieces
from megatron_r1.weights.stored.hf_weights import HfWeights
from megatron_r1.weights.stored.megatron_weights import MegatronWeights


def load_hf(model_chunks: Sequence, hf: dict, path: str | Path) -> None:
    """Fill this rank's parameters, in their dtype, from the safetensors checkpoint in `path`.

    FP8 checkpoints (fp8.py) are dequantised on the way. MTP layers' copies of the embedding and
    head are passed over. Vocabulary padding becomes zero. Raises ValueError naming every missing,
    unexpected or mis-shaped tensor.
    """
    with HfWeights(path, hf) as weights:
        weights.check(has_mtp(model_chunks))
        _fill(model_chunks, hf, weights)


def load_megatron(model_chunks: Sequence, hf: dict, path: str | Path) -> None:
    """Fill this rank's parameters from the weights in the Megatron checkpoint `path`.

    It may have been saved at any layout, by Megatron's own or Transformer Engine's layers; what
    else it holds (optimizer, reference) is passed over. Raises ValueError as `load_hf` does.
    """
    with MegatronWeights(path, hf) as weights:
        weights.check(has_mtp(model_chunks))
        _fill(model_chunks, hf, weights)


def _fill(model_chunks: Sequence, hf: dict, weights: HfWeights | MegatronWeights) -> None:
    with torch.no_grad():
        for parameter, pieces, _ in local_pieces(model_chunks, hf):
            _zero_padding(parameter, pieces)
            for piece in pieces:
                values = weights.read(piece.hf_name, piece.dim, piece.hf_start, piece.length)
                parameter.narrow(piece.dim, piece.local_start, piece.length).copy_(values)


def initialize(model_chunks: Sequence, hf: dict, *, std: float, seed: int) -> None:
    """Fill this rank's parameters with random weights that do not depend on how the model is split.

    Matrices are drawn from N(0, std^2), each HF tensor from a generator seeded by `seed` and its
    name; norms become 1, biases 0. Each tensor is drawn whole, in fp32, one at a time.
    """
    shapes = hf_tensors(hf)
    with torch.no_grad():
        for parameter, pieces, _ in local_pieces(model_chunks, hf):
            _zero_padding(parameter, pieces)
            for piece in pieces:
                shape = shapes[piece.hf_name][0]
                if len(shape) == 1:
                    values = torch.full(shape, float(piece.hf_name.endswith("norm.weight")))
                else:
                    generator = torch.Generator()
                    generator.manual_seed(zlib.crc32(f"{seed}/{piece.hf_name}".encode()))
                    values = torch.empty(shape).normal_(0.0, std, generator=generator)
                values = values.narrow(piece.dim, piece.hf_start, piece.length)
                parameter.narrow(piece.dim, piece.local_start, piece.length).copy_(values)


def _zero_padding(parameter, pieces) -> None:
    if sum(piece.length for piece in pieces) < parameter.shape[pieces[0].dim if pieces else 0]:
        parameter.zero_()
