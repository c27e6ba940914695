"""Says what of a carried environment is not of one version: the packages are compared with the
lock, the libraries of cuDNN are asked."""

import ctypes
import re
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def wrong_packages(lock: str, versions: dict[str, str]) -> list[str]:
    """Return a line for each package of another version than the lock's."""
    locked = {
        normal(name): version for name, version in re.findall(r"(?m)^([^#=\s]+)==(\S+)", lock)
    }
    return [
        f"{name}: {version}, in the lock {locked[normal(name)]}"
        for name, version in versions.items()
        if locked.get(normal(name), version) != version
    ]


def wrong_libraries(cudnn: ctypes.CDLL) -> list[str]:
    """Return a line for each library of cuDNN that is not of the first one's version."""
    return [
        f"cuDNN's {part} library is not of version {cudnn.cudnnGetVersion()}"
        for part in ("Graph", "Ops", "Cnn", "Adv")
        if cudnn[f"cudnn{part}VersionCheck"]()
    ]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    lock = (ROOT / "requirements/cuda.lock").read_text(encoding="utf-8")
    # Of "2.13.0+cu130" the lock has what is before the sign.
    installed = [each for each in distributions() if each.metadata["Name"]]  # of others, a part
    versions = {each.metadata["Name"]: each.version.partition("+")[0] for each in installed}
    wrong = wrong_packages(lock, versions)
    for file in Path(sysconfig.get_path("purelib")).glob("nvidia/cudnn/lib/libcudnn.so.*"):
        wrong += wrong_libraries(ctypes.CDLL(str(file)))
    sys.exit("\n".join(wrong) or print(f"{len(versions)} packages of the lock's versions"))
