"""A folder with a pipeline of tiny functions, and the command line on it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_r1 import cli

ROOT = Path(__file__).parents[3]
FUNCTIONS = '''
"""What the stages of these tests do."""
import json
import time
from pathlib import Path


def count(folder, *, lines, word="a", remark=""):
    """Two files; no stage reads the remark."""
    _note(folder, "count")
    (folder / "remark.txt").write_text(remark)
    (folder / "data.jsonl").write_text("".join(f"{word}{i}\\n" for i in range(lines)))


def join(folder, sources, rounded=False):
    """All lines of the sources; rounded: their number down to tens, which hides small changes."""
    _note(folder, "join")
    lines = [line for source in sources for line in Path(source).read_text().splitlines()]
    kept = [str(len(lines) // 10)] if rounded else lines
    (folder / "all.txt").write_text("\\n".join(kept))


def slow(folder, source, seconds):
    """Half of its work, a wait, the other half."""
    _note(folder, "slow")
    (folder / "first.txt").write_text(Path(source).read_text())
    time.sleep(seconds)
    (folder / "second.txt").write_text("done")


def fail(folder, unless):
    (folder / "half.txt").write_text("half")
    if not Path(unless).exists():
        raise RuntimeError("there is no such thing as " + unless)


def ask(folder, url):
    """What a served model says."""
    import urllib.request

    (folder / "answer.json").write_bytes(urllib.request.urlopen(url + "/answer").read())


def figures(folder, **named):
    (folder / "figures.json").write_text(json.dumps(named))


def _note(folder, name):
    """Beside the stages: which ran, in order."""
    with (folder.parent.parent / "calls.txt").open("a") as calls:
        calls.write(f"{folder.name}\\n")
'''
RECIPE = """
pipeline: {folder: out}
stages:
  corpus: {verb: make, function: "tiny:count", arguments: {lines: 3}}
  other: {verb: make, function: "tiny:count", arguments: {lines: 2, word: b}}
  both:
    verb: make
    function: "tiny:join"
    arguments: {sources: [${corpus.data.jsonl}, "${other}/data.jsonl", extra.txt]}
  last: {verb: make, function: "tiny:join", arguments: {sources: [${both.all.txt}]}}
"""


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


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


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
