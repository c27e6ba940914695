"""A run's folder: one process writes it at a time, and it holds every step exactly once."""

import errno
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

from pydantic_core import to_jsonable_python
from yaml import YAMLError

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import access, atomic_write
from megatron_r1.base.files.access import READ_ONLY
from megatron_r1.base.files.json_lines import append_lines, filter_lines, read_lines
from megatron_r1.config.former_keys import REMOVED_KEYS
from megatron_r1.config.recipe import SCHEDULED
from megatron_r1.config.setting_keys import changed_keys, flatten_sections, is_within, value_text
from megatron_r1.config.yaml_text import dump_yaml, format_value, parse_value
from megatron_r1.reporting.folder_lock import LOCK, FolderLock

NO_FOLDER = (errno.EEXIST, errno.ENOTDIR, errno.ENOENT)


class RunFolder:
    """The files of one run; reading them needs no lock, writing does.

        with RunFolder("runs/demo") as folder:      # UserError if another process has it
            folder.write_config(config)
            folder.truncate_after(checkpoint_step)  # on resume
            folder.append_metrics({"step": 1, "loss": 2.5})

    `config.yaml` (resolved settings), `metrics.jsonl` (a line per step), `evaluations.jsonl`
    (a line per held-out evaluation), `samples.jsonl`, `advice.jsonl` (what keeps the run from
    learning, a line per topic), `checkpoints/`, `hf/`, `adapter/` (model.lora), `tensorboard/`,
    `report.html`, `why.html`, `implementations.json` (layers and kernels in use), `sample_log/`
    (finished groups of the steps since the oldest checkpoint), `logs/`, `trackers.json`
    (run.trackers)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples.jsonl"
        self.evaluations_path = self.path / "evaluations.jsonl"
        self.advice_path = self.path / "advice.jsonl"
        self.sample_log = self.path / "sample_log"
        self.checkpoints = self.path / "checkpoints"
        self.hf_folder = self.path / "hf"
        self.adapter_folder = self.path / "adapter"
        self.tensorboard = self.path / "tensorboard"
        self.report_path = self.path / "report.html"
        self._lock: FolderLock | None = None
        self._last_step: int | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            access.narrow_readers(self.path)
            self._lock = FolderLock(self.path / LOCK)
        except OSError as error:
            if error.errno in NO_FOLDER:
                fault = "cannot be a folder"
            elif error.errno in READ_ONLY:
                fault = "cannot be written"
            else:
                raise
            raise UserError(
                f"run.folder {self.path} {fault} ({error.strerror}); choose another",
                key="run.folder",
                cause=Cause.UNREADABLE if error.errno in READ_ONLY else Cause.MALFORMED,
            ) from None
        try:
            self._require_writable()
        except UserError:
            self._lock.release()
            raise
        return self

    def _require_writable(self) -> None:
        """Raise UserError where an earlier run left something that this one could not write to: it
        would stop after its first step, or at its export."""
        logs = self.path / "logs"
        folders = (
            self.path,
            self.checkpoints,
            self.hf_folder,
            self.adapter_folder,
            self.tensorboard,
        )
        appended = (self.metrics_path, self.samples_path, self.evaluations_path, self.advice_path)
        replaced = (self.config_path, self.report_path)
        for path in (*folders, self.sample_log, logs, *appended, *replaced):
            if not os.path.lexists(path):
                continue
            is_folder = path not in (*appended, *replaced)
            if path.is_dir() != is_folder:
                fault, cause = "is a file" if is_folder else "is no file", Cause.MALFORMED
            elif path not in replaced and not os.access(path, os.W_OK):
                fault, cause = "cannot be written", Cause.UNREADABLE
            else:
                continue
            raise UserError(
                f"run.folder {self.path}: {path} {fault}; make it writable (chmod u+w, chattr -i), "
                "remove it, or choose another folder",
                key="run.folder",
                cause=cause,
            )

    def __exit__(self, *exception: object) -> None:
        if self._lock:
            self._lock.release()
            self._lock = None

    def write_config(
        self,
        config: Mapping[str, Any],
        may_change: Collection[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `config.yaml`, or check that a run which began here did so with the same settings.

        Args:
            config: nested sections of plain values (paths and tuples become text and lists).
            may_change: dotted keys ("run.steps") or whole sections ("eval") that a re-run may
                change; they are updated in the file.
            defaults: values of settings that a run started by an earlier version does not have.

        Raises:
            UserError: naming every other difference with both values.
        """
        new = to_jsonable_python(config)
        if self.config_path.exists() and self.has_begun:
            after = flatten_sections(new)
            unknown_then = {
                k: v
                for k, v in flatten_sections(to_jsonable_python(defaults or {})).items()
                if k in after
            }
            before = unknown_then | flatten_sections(self.read_config())
            changed = sorted(changed_keys(before, after))
            # None of the removed keys changed what a run learns.
            may_change = {*may_change, *REMOVED_KEYS}
            refused = [key for key in changed if not is_within(key, may_change)]
            if refused:
                raise UserError(
                    self._refusal_text(refused, before, after), key=refused[0], cause=Cause.CHANGED
                )
            if not changed:
                return
        atomic_write(self.config_path, dump_yaml(new))

    @property
    def has_begun(self) -> bool:
        """Whether the folder holds results, which other settings would have made differently. A run
        that failed before its first line may start anew."""
        lines = (self.metrics_path, self.samples_path, self.evaluations_path)
        places = (self.sample_log, self.checkpoints, self.hf_folder)
        files = chain(lines, *(place.rglob("*") for place in places))
        return any(path.is_file() and path.stat().st_size for path in files)

    def read_config(self) -> dict[str, Any]:
        """Return the settings the run was started with; empty before its start.

        Raises:
            UserError: `config.yaml` is not a mapping, or no YAML.
        """
        if not self.config_path.exists():
            return {}
        try:
            config = parse_value(self.config_path.read_text(encoding="utf-8"))
        except (YAMLError, UnicodeDecodeError) as error:
            cause = " ".join(str(error).split())
            raise UserError(
                f"{self.config_path}: not YAML ({cause}); restore it, or choose another run.folder",
                key="run.folder",
                cause=Cause.MALFORMED,
            ) from None
        if not isinstance(config, dict):
            raise UserError(
                f"{self.config_path}: not a YAML mapping; restore it, or choose another run.folder",
                key="run.folder",
                cause=Cause.MALFORMED,
            )
        return config

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append the line of one step, which is durable when this returns.

        NaN and infinities are written as null and named in "nonfinite".

        Raises:
            ValueError: metrics["step"] is not larger than every step in the file: no step may be in
                it twice.
        """
        step = _integer_step(metrics, "a metrics line")
        if self._last_step is None:
            steps = [line["step"] for line in self.read_metrics()]
            self._last_step = max(steps, default=step - 1)
        if step <= self._last_step:
            raise ValueError(
                f"{self.metrics_path} already has step {self._last_step}, cannot append step "
                f"{step}; call truncate_after(checkpoint step) before continuing a run"
            )
        append_lines(self.metrics_path, [metrics])
        self._last_step = step

    def append_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append one line per sample, each with an integer "step"; durable when this returns."""
        for sample in samples:
            _integer_step(sample, "a sample")
        append_lines(self.samples_path, samples)

    def append_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Append the line of one held-out evaluation: integer "step" and "eval/..." numbers."""
        _integer_step(metrics, "an evaluation")
        append_lines(self.evaluations_path, [metrics])

    def append_advice(self, line: Mapping[str, Any]) -> None:
        """Append a line with "step", "topic" and "text"."""
        _integer_step(line, "a line of advice")
        append_lines(self.advice_path, [line])

    def truncate_after(self, step: int) -> int:
        """Remove the lines after `step`, and torn last lines, to continue from that checkpoint.

        Returns the number of removed lines. A run that starts over passes -1."""
        self._last_step = None
        step_files = (self.metrics_path, self.samples_path, self.evaluations_path)
        paths = (*step_files, self.advice_path)
        return sum(filter_lines(path, lambda line: line["step"] <= step) for path in paths)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return every step's line in order, without a torn last one.

        Raises:
            UserError: a line is not a JSON object, or has no step.
        """
        lines = list(read_lines(self.metrics_path))
        for number, line in enumerate(lines, start=1):
            step = line.get("step")
            if not isinstance(step, int) or isinstance(step, bool):
                raise UserError(
                    f"{self.metrics_path}, line {number}: step is {value_text(line, 'step')}, not "
                    "an integer; delete that line, or restore the file",
                    key=self.metrics_path.name,
                    cause=Cause.MALFORMED,
                )
        return lines

    def last_step(self) -> int:
        """Return the last step that is recorded; 0 where there is none."""
        return max((line["step"] for line in read_lines(self.metrics_path)), default=0)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """Return the held-out evaluations by step; of a step evaluated twice, the later one."""
        by_step = {line["step"]: line for line in read_lines(self.evaluations_path)}
        return [by_step[step] for step in sorted(by_step)]

    def read_advice(self) -> list[dict[str, Any]]:
        """Return the lines of `advice.jsonl`."""
        return list(read_lines(self.advice_path))

    def read_samples(self) -> Iterator[dict[str, Any]]:
        """Yield the samples one by one: the file of a long run need not fit in memory."""
        return read_lines(self.samples_path)

    def _refusal_text(self, keys: list[str], before: dict[str, Any], after: dict[str, Any]) -> str:
        lines = [f"{self.path} holds a run with other settings:"]
        lines += [
            f"  {k}: {value_text(before, k)} in the folder, {value_text(after, k)} now"
            for k in keys
        ]
        lines.append(
            "To continue that run, give it the settings it has; to start another one, choose "
            "another folder or remove this one."
        )
        if scheduled := [key for key in keys if is_within(key, SCHEDULED)]:
            step = 1 + self.last_step()
            schedulable = [key for key in scheduled if key in SCHEDULED and key in after]
            values = ", ".join(f"{key}: {format_value(after[key])}" for key in schedulable) or "…"
            lines.append(
                f"To change {', '.join(scheduled)} on the way of an RL run, add an entry to "
                f"rl.schedule: {{from_step: {step}, {values}}}"
            )
        return "\n".join(lines)


def _integer_step(record: Mapping[str, Any], noun: str) -> int:
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"{noun} has step {step!r}; give it the integer number of its step")
    return step
