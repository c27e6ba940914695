"""Lists the safetensors files of a model folder, and whether they are whole. No torch."""

import contextlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.foreign import read_json, require_inside
from megatron_r1.base.files.safetensors_header import open_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHERS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""What a folder without these two may hold instead."""
IGNORED = (".rotary_emb.inv_freq",)
"""Endings of names: buffers of older transformers, which no model reads."""


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a Hugging Face folder.

    Raises UserError where there are none, for files that its index lists but are missing or outside
    of the folder, and for two models in one folder."""
    single, index = folder / SINGLE, folder / INDEX
    if (weight_map := read_index(folder)) is not None:
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            require_inside(file, folder, "weights")
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"{index} names files that {folder} lacks: {', '.join(missing)}; fetch them",
                key="weights",
                cause=Cause.NOT_FOUND,
            )
        if single.is_file() and single not in files:
            raise UserError(
                f"{folder} has {SINGLE} and {INDEX}, which names other files: transformers reads "
                "the former, vLLM and this project the latter; remove what is old",
                key="weights",
                cause=Cause.DUPLICATE,
            )
        if other := next((file for file in files if file.suffix != ".safetensors"), None):
            raise UserError(
                f"{index} names {other.name}, which is no .safetensors file; fetch it again",
                key="weights",
                cause=Cause.MALFORMED,
            )
        return files
    if not single.is_file():
        found = sorted(file.name for pattern in OTHERS for file in folder.glob(pattern))
        raise UserError(
            f"{folder} has neither {single.name} nor {index.name}"
            + (f", only {', '.join(found[:4])}" if found else "")
            + "; fetch them (weights in other formats are not read: load them with transformers, "
            "and save_pretrained writes these files)",
            key="weights",
            cause=Cause.NOT_FOUND,
        )
    require_inside(single, folder, "weights")
    return [single]


def read_index(folder: Path) -> dict[str, str] | None:
    """Return the name of the file of each tensor, by the folder's index; None without one. Raises
    UserError where it is damaged."""
    index = folder / INDEX
    if not index.is_file():
        return None
    require_inside(index, folder, "weights")
    content = read_json(index, "weights")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and 0 < len(name) < 256 for name in names):
        raise UserError(
            f"{index} is damaged: its weight_map must give each tensor's file; fetch it again",
            key="weights",
            cause=Cause.MALFORMED,
        )
    return weight_map


def tensor_names(folder: Path) -> set[str]:
    """Return the names of the tensors that a model folder says to have; none where it has no
    weights, or files that `require_complete` refuses."""
    with contextlib.suppress(UserError):
        if (index := read_index(folder)) is not None:
            return set(index)
        file, tensors = open_file(weight_files(folder)[0])
        os.close(file)
        return set(tensors)
    return set()


def require_complete(folder: Path) -> None:
    """Raise UserError naming a weight file that is damaged or cut off, or that has not what the
    index says. Headers and sizes are read."""
    held = {}
    for path in weight_files(folder):
        file, held[path] = open_file(path)
        os.close(file)
    require_as_indexed(folder, held)


def require_as_indexed(folder: Path, held: Mapping[Path, Collection[str]]) -> None:
    """Raise UserError for a tensor that two files have, and for one that is not in the file that
    the index gives. held: file -> names of its tensors.

    A tensor that one file has and the index lacks is read: transformers and vLLM read it, too."""
    home: dict[str, Path] = {}
    for path, names in held.items():
        if twice := sorted(home.keys() & set(names)):
            raise UserError(
                f"{', '.join(twice[:8])}: in {home[twice[0]]} and in {path}; readers differ in "
                "which they take: remove one (load the folder with transformers, and "
                "save_pretrained writes each once)",
                key="weights",
                cause=Cause.DUPLICATE,
            )
        home |= dict.fromkeys(names, path)
    wrong = {
        name: file
        for name, file in (read_index(folder) or {}).items()
        if home.get(name) != folder / file and not name.endswith(IGNORED)
    }
    if wrong:
        listed = [
            f"{name} is not in {file} but in {home[name].name if name in home else 'no file'}"
            for name, file in sorted(wrong.items())[:8]
        ]
        raise UserError(
            f"{folder / INDEX} and the files differ in {len(wrong)} tensors: {'; '.join(listed)}; "
            "fetch the index and these files again",
            key="weights",
            cause=Cause.CONFLICT,
        )
