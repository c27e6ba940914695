"""requirements/cpu.lock is installed without dependency resolution, so it must be complete."""

import re
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

from packaging.requirements import Requirement

LOCK = Path(__file__).parents[2] / "requirements" / "cpu.lock"
# vLLM's CPU build asks for their CUDA builds, which break its import; nothing of ours uses them.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_lock_holds_every_dependency_of_what_it_installs() -> None:
    lines = [line.split("#")[0].strip() for line in LOCK.read_text().splitlines()]
    pinned = {_normalized(Requirement(line).name): Requirement(line) for line in lines if line}
    missing, unmet = [], []
    for name in pinned:
        try:
            needs = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue  # of another platform or Python
        for need in needs:
            wanted = _normalized(need.name)
            if wanted in LEFT_OUT or (need.marker and not need.marker.evaluate({"extra": ""})):
                continue
            if wanted not in pinned:
                missing.append(f"{name} needs {need}")
            elif not need.specifier.contains(distribution(wanted).version, prereleases=True):
                unmet.append(f"{name} needs {need}")
    assert not missing
    assert not unmet
