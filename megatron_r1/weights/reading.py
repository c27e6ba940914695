"""Import: every rank reads its own slices of a Hugging Face checkpoint, and nothing else of it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_r1.weights.layout import hf_tensors, table
from megatron_r1.weights.local import has_mtp, local_pieces

FLOATS = ("F32", "BF16", "F16")
# Named so, a checkpoint may hold what no table lists: tied heads, and what older transformers
# stored.
_IGNORED = ("lm_head.weight", ".rotary_emb.inv_freq")


def load_hf(model_chunks: Sequence, hf: dict, path: str | Path) -> None:
    """Fill this rank's parameters, in their dtype, from the safetensors checkpoint in `path`.

    Reads `model.safetensors.index.json` and its files, or one `model.safetensors`. MTP layers'
    copies of the embedding and head are passed over. Vocabulary padding becomes zero. Raises
    ValueError naming every missing, unexpected or mis-shaped tensor.
    """
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for file in _checkpoint_files(Path(path))
        }
        found = {name: opened for opened in files.values() for name in opened.keys()}  # noqa: SIM118
        _check(found, hf, has_mtp(model_chunks), path)
        with torch.no_grad():
            for parameter, pieces, _ in local_pieces(model_chunks, hf):
                _zero_padding(parameter, pieces)
                for piece in pieces:
                    source = found[piece.hf_name].get_slice(piece.hf_name)
                    run = slice(piece.hf_start, piece.hf_start + piece.length)
                    values = source[run] if piece.dim == 0 else source[:, run]
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


def _checkpoint_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{index} names files that {folder} lacks: {', '.join(missing)}")
        return files
    if not single.is_file():
        raise ValueError(f"{folder} has neither {single.name} nor {index.name}")
    return [single]


def _check(found: dict, hf: dict, with_mtp: bool, path) -> None:
    known = hf_tensors(hf)
    needed = hf_tensors(hf, with_mtp=with_mtp).keys() - table(hf).copies.keys()
    missing = sorted(needed - found.keys())
    extra = sorted(n for n in found.keys() - known.keys() if not n.endswith(_IGNORED))
    wrong = []
    for name in sorted(needed & found.keys()):
        stored = found[name].get_slice(name)
        if tuple(stored.get_shape()) != known[name][0]:
            wrong.append(
                f"{name} is {tuple(stored.get_shape())}, config.json says {known[name][0]}"
            )
        elif stored.get_dtype() not in FLOATS:
            wrong.append(f"{name} is {stored.get_dtype()}, only {', '.join(FLOATS)} can be read")
    problems = [
        f"{label} ({len(names)}): {_some(names)}"
        for label, names in (("missing", missing), ("unexpected", extra), ("wrong", wrong))
        if names
    ]
    if problems:
        hint = ""
        if any(
            n.split(".layers.")[-1].split(".")[0] == str(hf["num_hidden_layers"]) for n in missing
        ):
            hint = "; leave the MTP layers out (model.mtp: none) if the checkpoint has none"
        raise ValueError(
            f"checkpoint {path} does not fit its config.json: {'; '.join(problems)}{hint}"
        )


def _some(names: list[str], most: int = 8) -> str:
    rest = f" … and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
