"""What is installed without dependency resolution must be complete.

These are cpu.lock, test.txt upon it, and trainer.txt with what the NVIDIA PyTorch image brings.
cuda.lock's completeness is tested where it is installed (tests/nullgpu)."""

import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "requirements"
LEFT_OUT = {
    # vLLM's CPU build asks for their CUDA builds, which break its import; nothing here uses
    # them.
    "cpu.lock": {"torchvision", "torchaudio", "torchcodec"},
    # The image's own, built for each other, and torch's needs.
    "trainer.txt": {"torch", "numpy", "setuptools", "filelock", "fsspec", "networkx"},
}

FOR_CUDA = {"apache-tvm-ffi", "setuptools", "triton"}
"""Packages of which vLLM's CUDA build, or torch's, needs another version than its CPU build."""


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pinned(file: str) -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in (FOLDER / file).read_text().splitlines()]
    return {_normalized(Requirement(line).name): Requirement(line) for line in lines if line}


# What cpu.lock has is there; its versions are those that the tests of these packages run with.
LEFT_OUT["test.txt"] = set(_pinned("cpu.lock"))


def test_the_trainer_image_has_the_versions_that_are_tested() -> None:
    tested = _pinned("cpu.lock")
    other = {n: str(r) for n, r in _pinned("trainer.txt").items() if str(tested.get(n)) != str(r)}
    assert not other


@pytest.mark.more
@pytest.mark.parametrize("file", LEFT_OUT)
def test_a_file_holds_every_dependency_of_what_it_installs(file: str) -> None:
    if file == "cpu.lock" and not distribution("torch").version.endswith("+cpu"):
        pytest.skip("torch is a CUDA build: make setup TORCH_INDEX=<PyTorch's CPU wheels>")
    pinned = _pinned(file)
    missing, unmet = [], []
    for name in pinned:
        try:
            needs = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue  # of another platform or Python
        for need in needs:
            wanted = _normalized(need.name)
            if wanted in LEFT_OUT[file] or (
                need.marker and not need.marker.evaluate({"extra": ""})
            ):
                continue
            if wanted not in pinned:
                missing.append(f"{name} needs {need}")
            elif not need.specifier.contains(distribution(wanted).version, prereleases=True):
                unmet.append(f"{name} needs {need}")
    assert not missing
    assert not unmet


@pytest.mark.parametrize("file", ["bench.txt", "docs.txt"])
def test_the_tests_run_with_the_versions_of_the_benches_and_of_the_docs(file: str) -> None:
    tested, other = _pinned("cpu.lock") | _pinned("test.txt"), _pinned(file)
    both = tested.keys() & other.keys()
    assert both
    assert [str(tested[name]) for name in both] == [str(other[name]) for name in both]


def test_the_locks_for_cpus_and_gpus_have_the_same_versions() -> None:
    tested, cuda = _pinned("cpu.lock"), _pinned("cuda.lock")
    both = tested.keys() & cuda.keys()
    assert {name for name in both if str(tested[name]) != str(cuda[name])} == FOR_CUDA


def test_the_compiler_and_the_headers_of_cuda_are_of_one_version() -> None:
    # Each of these is numbered as its CUDA release; a header refuses an older or newer nvcc.
    names = ["toolkit", *(f"cuda-{part}" for part in ("nvcc", "crt", "cccl", "nvrtc", "runtime"))]
    pinned = _pinned("cuda.lock") | {"nvidia-toolkit": _pinned("cuda.lock")["cuda-toolkit"]}
    versions = {name: str(pinned[f"nvidia-{name}"].specifier) for name in [*names, "nvvm"]}
    assert len({tuple(version.split(".")[:2]) for version in versions.values()}) == 1, versions


def test_the_plain_image_has_what_each_of_its_makes_needs(tmp_path: Path) -> None:
    stage = (ROOT / "Dockerfile").read_text().split(" AS together\n")[1]
    made = []
    for line in stage.splitlines():
        match line.split():
            case ["COPY", *sources, _]:
                for source in sources:
                    copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                    copy(ROOT / source, tmp_path / source)
            case ["RUN", "make", target]:
                made.append(target)
                # Prints the commands, and fails where a file that a rule depends on is missing.
                subprocess.run(["make", "--dry-run", target], cwd=tmp_path, check=True)
    assert made == ["cuda-packages", "setup-cuda"]
