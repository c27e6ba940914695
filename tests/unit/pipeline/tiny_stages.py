"""What the stages of these tests do."""

import json
import time
from pathlib import Path


def count(folder, *, lines, word="a", remark=""):
    """Two files; no stage reads the remark."""
    _note(folder, "count")
    (folder / "remark.txt").write_text(remark)
    (folder / "data.jsonl").write_text("".join(f"{word}{i}\n" for i in range(lines)))


def join(folder, sources, rounded=False):
    """All lines of the sources; rounded: their number down to tens, which hides small changes."""
    _note(folder, "join")
    lines = [line for source in sources for line in Path(source).read_text().splitlines()]
    kept = [str(len(lines) // 10)] if rounded else lines
    (folder / "all.txt").write_text("\n".join(kept))


def slow(folder, source, waits):
    """Half of its work, a wait for the end of the process, the other half."""
    _note(folder, "slow")
    (folder / "first.txt").write_text(Path(source).read_text())
    while waits:
        time.sleep(3600)
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
    """Next to the stages: which ran, in order."""
    with (folder.parent.parent / "calls.txt").open("a") as calls:
        calls.write(f"{folder.name}\n")
