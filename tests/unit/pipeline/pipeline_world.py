"""A folder with a pipeline of tiny functions, and the command line on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_r1.commands import cli

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
FUNCTIONS = (HERE / "tiny_stages.py").read_text()


def recipe(name: str) -> str:
    """A pipeline of the folder `recipes`."""
    return (HERE / "recipes" / f"{name}.yaml").read_text()


RECIPE = recipe("four")


class World:
    """The folder a pipeline is started in; `out` is its folder."""

    def __init__(self, path: Path, recipe: str = RECIPE) -> None:
        self.path, self.out = path, path / "out"
        (path / "tiny.py").write_text(FUNCTIONS)
        (path / "extra.txt").write_text("x\n")
        self.write(recipe)

    def write(self, recipe: str) -> None:
        (self.path / "p.yaml").write_text(recipe)

    def run(self, *options: str) -> int:
        """The command in this process, whose folder must be `path`; its exit status."""
        return cli.main(["pipeline", "p.yaml", *options])

    def load(self, *options: str) -> None:
        """The same, where what it refuses is raised."""
        cli._dispatch_command(["pipeline", "p.yaml", *options])

    def start(self, *options: str) -> subprocess.Popen:
        """The command in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_r1", "pipeline", "p.yaml", *options],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def calls(self) -> list[str]:
        """The stages whose function was called, in order."""
        path = self.path / "calls.txt"
        return path.read_text().split() if path.exists() else []

    def record(self, stage: str) -> dict:
        return json.loads((self.out / stage / "stage.json").read_text())

    def states(self, capsys, *options: str) -> dict[str, str]:
        """Stage → state, as the table says."""
        capsys.readouterr()
        assert self.run("--pipeline.status", "true", *options) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        return {line.split()[1]: line.split()[0] for line in lines if line[:1] != " "}


def processes_naming(text: str) -> list[int]:
    """Pids of processes with `text` in their command line, of zombies none."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and text in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]
