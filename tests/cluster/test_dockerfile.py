"""The Dockerfile's default target without Docker: its instructions, in order, in a fresh root that
debootstrap makes of its base image's Debian.

It downloads 3 GB and takes about 11 GB of disk, which are freed. Transformer Engine is compiled
with -O0, by JOBS compilers. The other two targets are not tested: their bases are in registries.
"""

import os
import re
import shlex
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GIB = 2**30
CERTIFICATES = "/etc/certificates-of-the-host.pem"  # the image's own may lack a proxy's
FROM_HOST = re.compile(r"JOBS|PIP_INDEX_URL|PIP_DEFAULT_TIMEOUT|\w+_proxy", re.IGNORECASE)
INSTALLED = """
import torch
from importlib.metadata import version
print(torch.version.cuda, *map(version, ("vllm", "transformer-engine-torch", "megatron-r1")))
assert torch.version.cuda"""


def _obstacle() -> str | None:
    if os.getuid() != 0 or not shutil.which("debootstrap"):
        return "needs root and debootstrap (apt-get install debootstrap)"
    if shutil.disk_usage("/var/tmp").free < 16 * GIB:
        return "needs 16 GiB in /var/tmp"
    return None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_obstacle() is not None, reason=str(_obstacle())),
]


def _alone(*command: str | Path) -> list[str | Path]:
    """Return a command whose mounts and processes end with it."""
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", *command]


class Image:
    """A root in which instructions of a Dockerfile are carried out."""

    def __init__(self, root: Path, context: Path, suite: str):
        self.root, self.context, self.folder = root, context, Path("/")
        self.environment = {name: os.environ[name] for name in os.environ if FROM_HOST.match(name)}
        self.environment |= {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PIP_CERT": CERTIFICATES,
            "DEBIAN_FRONTEND": "noninteractive",
            "OPTIMIZE": "-O0",
            "PIP_NO_COMPILE": "1",
        }
        subprocess.run(_alone("debootstrap", "--variant=minbase", suite, root), check=True)
        for path in ("/etc/resolv.conf", "/etc/hosts"):
            shutil.copy(path, root / path[1:])
        certificates = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
        shutil.copy(str(certificates), root / CERTIFICATES[1:])

    def run(self, command: str) -> None:
        """Run a shell command in the root, in the present working folder."""
        enter = 'mount -t proc proc "$0/proc" && exec chroot "$0" sh -c "$1"'
        arguments = _alone("sh", "-c", enter, self.root, f"cd {self.folder} && {command}")
        subprocess.run(arguments, env=self.environment, check=True)

    def carry_out(self, name: str, argument: str) -> None:
        """Carry out one instruction; fail for one that this does not know."""
        match name:
            case "RUN":
                self.run(argument)
            case "COPY":
                *sources, target = argument.split()
                for source in sources:
                    if (self.context / source).is_dir():  # copies what is in it
                        shutil.copytree(self.context / source, self._path(target))
                    else:
                        self._path(target).mkdir(parents=True, exist_ok=True)
                        shutil.copy(self.context / source, self._path(target))
            case "WORKDIR":
                self.folder = Path(argument)
                self._path(".").mkdir(parents=True)
            case "ENV":
                for setting in shlex.split(argument):
                    key, value = setting.split("=", 1)
                    self.environment[key] = value.replace("$PATH", self.environment["PATH"])
            case "ENTRYPOINT":
                (program,) = re.findall(r'"(.*?)"', argument)
                self.run(f"{program} --help")
            case _:
                raise AssertionError(f"instruction {name} is not known here")

    def _path(self, inside: str) -> Path:
        return self.root / (self.folder / inside).relative_to("/")


def _default_target() -> tuple[str, list[tuple[str, str]]]:
    """Return the Debian suite of the last stage's base, and the stage's instructions."""
    joined = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    instructions = [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]
    defaults = dict(rest.split("=", 1) for name, rest in instructions if name == "ARG")
    start = max(i for i, (name, _) in enumerate(instructions) if name == "FROM")
    variable = instructions[start][1].split()[0].strip("${}")
    (suite,) = re.fullmatch(r"debian:(\w+)(?:-slim)?", defaults[variable]).groups()
    return suite, instructions[start + 1 :]


@pytest.fixture
def scratch() -> Iterator[Path]:
    # Not pytest's folders, which are kept after the test.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


def test_every_instruction_of_the_default_target_succeeds_in_a_clean_root(scratch: Path) -> None:
    subprocess.run(["git", "clone", "-q", ROOT, scratch / "context"], check=True)
    suite, instructions = _default_target()
    image = Image(scratch / "root", scratch / "context", suite)
    for name, argument in instructions:
        print(f"{name} {argument}", flush=True)
        image.carry_out(name, argument)
    assert "RUN" in {name for name, _ in instructions}
    image.run(f"python -c '{INSTALLED}'")
