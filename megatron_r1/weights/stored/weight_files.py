"""Lists the safetensors files of a model folder, and whether they are whole. No torch."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_r1.errors import Cause, UserError
from megatron_r1.weights.stored.safetensors_header import open_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHERS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""What a folder without these two may hold instead."""


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a Hugging Face folder.

    Raises UserError where there are none, for files that its index lists but are missing, and for
    two models in one folder."""
    single, index = folder / SINGLE, folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{index} is damaged ({error!r}); fetch it again",
                key="weights",
                cause=Cause.MALFORMED,
            ) from error
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
    return [single]


def require_complete(files: Iterable[Path]) -> None:
    """Raise UserError naming a file that is damaged or cut off. Headers and sizes are read."""
    for path in files:
        os.close(open_file(path)[0])
