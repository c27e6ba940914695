"""The versions of Megatron-Core and Transformer Engine that the code is written against."""

import warnings
from importlib import metadata

from megatron_r1.base.errors import Cause, UserError

MEGATRON_VERSION = "0.16.1"
"""The version whose lines are patched (`models.platform.cpu_patches`, `models.patches`)."""
TRANSFORMER_ENGINE_VERSION = "2.20.2"
"""The version in requirements/cuda.lock, with which names, shapes and checkpoints are tested."""


def check_megatron() -> None:
    """Raise UserError for another Megatron-Core than the tested one: lines of it are patched, and
    the weight tables have its names."""
    found = metadata.version("megatron-core")
    if found != MEGATRON_VERSION:
        raise UserError(
            f"megatron-core {found} is installed, and this code is written against "
            f"{MEGATRON_VERSION}: pip install --no-deps megatron-core=={MEGATRON_VERSION}",
            key="megatron-core",
            cause=Cause.CONFLICT,
        )


def warn_of_transformer_engine() -> None:
    """Warn of another Transformer Engine than the tested one: images bring their own."""
    try:
        found = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:  # built from a source folder without metadata
        return
    # An image's own build has the commit behind a plus sign.
    if found.partition("+")[0] != TRANSFORMER_ENGINE_VERSION:
        warnings.warn(
            f"transformer-engine {found} is installed, and {TRANSFORMER_ENGINE_VERSION} is tested "
            "(requirements/cuda.lock); names and checkpoints of its layers may differ",
            stacklevel=2,
        )
