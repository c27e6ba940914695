"""A run of the command line with a planted fault, and the seconds until a sentence names it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tiny_models
from command_line import command, environment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLANTED = ROOT / "tests/system/planted"
MAKE_MODEL = """
import sys
from pathlib import Path
import tiny_models
from examples.laptop.make_tokenizer import make_tokenizer
tokenizer, folder = make_tokenizer(), Path(sys.argv[1])
ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": len(tokenizer)}
tiny_models.write_drafting_model(folder, 0, tiny_models.DRAFTING | ids)
tokenizer.save_pretrained(folder)
"""


def write_model(folder: Path) -> None:
    """Random weights of `tiny_models.DRAFTING`, made by transformers in a process of its own."""
    path = os.pathsep.join([str(Path(tiny_models.__file__).parent), str(ROOT)])
    env = environment() | {"PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}"}
    making = [sys.executable, "-c", MAKE_MODEL, folder]
    subprocess.run(making, check=True, env=env, cwd=ROOT, capture_output=True)


@dataclass
class Ended:
    """A run that has ended. seconds: from the fault until `sentence` was printed; None: it was
    not."""

    folder: Path
    returncode: int
    printed: str
    seconds: float | None

    @property
    def metrics(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.open()] if path.exists() else []

    @property
    def checkpoints(self) -> list[str]:
        """Names of the checkpoints that are complete."""
        folders = (self.folder / "checkpoints").glob("step_*")
        return sorted(path.name for path in folders if path.is_dir() and any(path.iterdir()))


class Replay:
    """Runs `recipe.yaml`; the same folder again continues the run."""

    def __init__(self, model: Path, folder: Path):
        self.model, self.folder = model, folder

    def run(self, fault: str | None, sentence: str, *settings: object) -> Ended:
        """Run to its end.

        Args:
            fault: a key of `planted.sitecustomize.PLANTED`; it leaves a file at the moment it
                happens.
            sentence: a part of what must be printed."""
        paths = ["--run.folder", self.folder / "run", "--model.path", self.model / "hf"]
        paths += ["--data.path", self.model / "questions.jsonl"]
        struck, printed = self.folder / "struck", self.folder / "printed"
        env = environment() | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if fault:
            path = f"{PLANTED}:{env['PYTHONPATH']}"
            env |= {"PLANTED": fault, "PLANTED_AT": str(struck), "PYTHONPATH": path}
        with open(printed, "w") as output:
            process = subprocess.Popen(
                command("rl", HERE / "recipe.yaml", *paths, *settings),
                stdout=output,
                stderr=output,
                env=env,
                cwd=ROOT,
                start_new_session=True,
            )
            seconds = None
            while process.poll() is None:
                if seconds is None and struck.exists() and sentence in printed.read_text():
                    seconds = time.time() - struck.stat().st_mtime
                time.sleep(0.1)
        text = printed.read_text()
        if seconds is None and struck.exists() and sentence in text:
            seconds = time.time() - struck.stat().st_mtime
        ended = Ended(self.folder / "run", process.returncode, text, seconds)
        if fault and seconds is not None:
            record(fault, seconds, next(line for line in text.splitlines() if sentence in line))
        return ended


def record(fault: str, seconds: float, sentence: str) -> None:
    """Print when and how the fault was noticed; also into the file that REPLAYS_JSON names."""
    line = {"fault": fault, "seconds": round(seconds, 1), "sentence": sentence}
    print(json.dumps(line))
    if path := os.environ.get("REPLAYS_JSON"):
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
