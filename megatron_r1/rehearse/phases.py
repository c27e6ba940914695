"""Runs the phases of a rehearsal in their order, and records what each phase has shown."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import RunError
from megatron_r1.config import Config
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.push.matching.planned_links import links_per_rank
from megatron_r1.push.matching.recipe_plan import planned_push
from megatron_r1.rehearse import launch, layout
from megatron_r1.rehearse.started_phase import StartedPhase
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.sample.second_pass import OUTPUT_FILES
from megatron_r1.trainer.checkpoints.checkpoint_folders import complete_checkpoints

MAX_UNPLANNED_FRACTION = 0.01
"""Largest share of a push's bytes that its plan may miss. vLLM keeps the routers of GLM-4 in fp32,
which are planned in the push's dtype: 0.2% of a miniature."""


@dataclass(frozen=True)
class PhaseResult:
    """The result of a phase.

    Attributes:
        phase: what was exercised.
        evidence: the figures or files that show the result.
        seconds: how long it took.
        cpu_seconds: CPU time of all processes of the phase; None for a part of another phase."""

    phase: str
    evidence: str
    seconds: float
    cpu_seconds: float | None = None


class PhaseRunner:
    """Runs the phases of one miniature.

    Attributes:
        settings: added to every command line.
        notify: called with a line at the start of each phase."""

    def __init__(
        self,
        verb: str,
        recipe: Path,
        config: Config,
        settings: Sequence[str],
        timeout_seconds: float,
        notify: Callable[[str], None],
    ):
        """Prepare to run the phases.

        Args:
            verb: the subcommand of megatron-r1.
            recipe: the file of the miniature's recipe.
            config: the miniature's settings.
            settings: added to every command line, as --key=value.
            timeout_seconds: the limit for one phase.
            notify: called with a line at the start of each phase."""
        self.verb = verb
        self.recipe = recipe
        self.config = config
        self.settings = settings
        self.timeout_seconds, self.notify = timeout_seconds, notify
        self.run_folder = RunFolder(config.run.folder)
        self.results: list[PhaseResult] = []

    def run(self) -> list[PhaseResult]:
        """Run all phases.

        Raises:
            RunError: a phase fails; it names the phase, with the end of its log.
        """
        if self.verb == "sample":
            self._rehearse_sampling()
            return self.results
        self._run_until_killed()
        self._resume_in_other_layout()
        self._check_export()
        return self.results

    def _run_until_killed(self) -> None:
        title = "start, first step, checkpoint, kill -9"
        with self._running_phase(title) as phase:
            phase.wait(lambda: complete_checkpoints(self.run_folder.checkpoints))
        lines = list(self.run_folder.read_metrics())
        steps = [line["step"] for line in lines]
        saved = complete_checkpoints(self.run_folder.checkpoints)[-1].name
        self._add_result(title, phase, f"{saved} is complete; steps {steps} before the kill")
        if self.verb == "rl":
            self._compare_with_plan(round(lines[0]["push/links"]), lines[0]["push/bytes"])

    def _resume_in_other_layout(self) -> None:
        parallel = layout.different_layout(self.config.parallel)
        changed = {
            f"parallel.{key}": value
            for key, value in parallel.model_dump().items()
            if value != getattr(self.config.parallel, key)
        }
        config = self.config.model_copy(update={"parallel": parallel})
        if self.verb == "rl":
            fewer = layout.fewer_engine_ranks(config.rollout)
            changed |= {f"rollout.{key}": value for key, value in fewer.items()}
            config = config.with_changes(rollout=fewer)
        settings = [f"--{key}={value}" for key, value in changed.items()]
        title = "resume in another layout, to the end"
        with self._running_phase(title, config, settings) as phase:
            phase.wait_for_end()
        lines = list(self.run_folder.read_metrics())
        steps = [line["step"] for line in lines]
        if steps != list(range(1, self.config.run.steps + 1)):
            raise RunError(f"rehearse: {title}: metrics.jsonl has steps {steps}, one is missing")
        self._add_result(title, phase, f"{' '.join(settings)}; steps {steps}, each once")
        if self.verb == "rl":
            self._show_pushes(lines)

    def _compare_with_plan(self, links: int, num_bytes: float) -> None:
        """Compare the first push with what `megatron-r1 plan` counts before engines run."""
        hf_config = read_hf_config(self.config.model.path, None)
        plan = planned_push(self.config, hf_config)
        planned_bytes = sum(
            link.num_bytes for set_plan in plan for link in chain.from_iterable(set_plan)
        )
        if abs(num_bytes - planned_bytes) > MAX_UNPLANNED_FRACTION * planned_bytes:
            raise RunError(
                f"rehearse: push: trainer ranks send {num_bytes:,.0f} bytes, where their plan, by "
                f"which megatron-r1 plan counts, has {planned_bytes:,.0f}: engines need other "
                "parts of tensors than push/matching/predicted_sharding.py says, or were replaced"
            )
        planned = max(links_per_rank(plan, self.config.parallel.processes))
        if links > planned:
            raise RunError(
                f"rehearse: push: a trainer rank has {links} links to engine ranks, where its "
                f"plan, by which megatron-r1 plan counts, has {planned}"
            )
        evidence = (
            f"a trainer rank has at most {links} to engine ranks, of {planned} planned; all send "
            f"{num_bytes:,.0f} bytes, of {planned_bytes:,.0f} planned"
        )
        self.results.append(PhaseResult("links", evidence, 0.0))

    def _show_pushes(self, lines: Sequence[dict[str, Any]]) -> None:
        probes = [line.get("push/probe_diff") for line in lines]
        diffs = [line["logprob_diff/mean"] for line in lines]
        norms = [line.get("grad_norm") for line in lines]  # none while a critic warms up
        if not any(norms):
            raise RunError(f"rehearse: the gradients of all steps are zero: {norms}")
        self._show_schedule(lines)
        method = self.config.rollout.speculative.method
        drafts = [line.get("speculative/acceptance") for line in lines]
        if method != "none" and all(share is None for share in drafts):
            raise RunError(f"rehearse: no token was drafted (rollout.speculative.method: {method})")
        drafted = "" if method == "none" else f"; {method}: accepted drafts {_join_numbers(drafts)}"
        self.results += [
            PhaseResult(
                "rollout, rewards, update",
                f"gradient norms {_join_numbers(norms)}; log-probabilities of engine and trainer "
                f"differ by {_join_numbers(diffs)} on average{drafted}",
                sum(line["time/rollout"] + line["time/train"] for line in lines),
            ),
            PhaseResult(
                "push with proof",
                f"checksums equal in every engine rank; probes differ by {_join_numbers(probes)}",
                sum(line["time/push"] for line in lines),
            ),
        ]

    def _show_schedule(self, lines: Sequence[dict[str, Any]]) -> None:
        """Show that longer responses of `rl.schedule` were sampled: random weights rarely end."""
        limits = [self.config.at(line["step"]).rollout.max_response_tokens for line in lines]
        if len(set(limits)) == 1:
            return
        longest = [round(line["response_length/max"]) for line in lines]
        for before, limit, length in zip([0, *limits], limits, longest, strict=False):
            if length > limit or limit > before >= length:
                raise RunError(
                    f"rehearse: rl.schedule: rollout.max_response_tokens of the steps is {limits}, "
                    f"but their longest responses have {longest} tokens"
                )
        evidence = f"responses of up to {longest} tokens, where {limits} are the most"
        self.results.append(PhaseResult("schedule", evidence, 0.0))

    def _check_export(self) -> None:
        title, start, cpu_start = "export", time.monotonic(), launch.cpu_seconds()
        self.notify(title)
        process = subprocess.run(
            [sys.executable, "-m", "megatron_r1.rehearse.check_export"]
            + [str(self.run_folder.hf_folder), self.config.model.path, self.config.model.mtp],
            env=os.environ | launch.QUIET_ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        if process.returncode:
            raise RunError(f"rehearse: {title}: {process.stdout}{process.stderr[-2000:]}")
        seconds, cpu_seconds = time.monotonic() - start, launch.cpu_seconds() - cpu_start
        self.results.append(PhaseResult(title, process.stdout.strip(), seconds, cpu_seconds))

    def _rehearse_sampling(self) -> None:
        samples = self.run_folder.samples_path
        title = "start, sampling, kill -9"
        with self._running_phase(title) as phase:
            phase.wait(lambda: samples.exists() and samples.stat().st_size)
        self._add_result(title, phase, f"{_num_lines(samples)} responses before the kill")
        title = "the same command, to the end"
        with self._running_phase(title) as phase:
            phase.wait_for_end()
        responses = _num_lines(samples)
        file = OUTPUT_FILES.get(self.config.sample.output)
        written = self.run_folder.path / file if file else samples
        num_kept = _num_lines(written) if written.exists() else 0
        self._add_result(title, phase, f"{responses} responses; {num_kept} lines in {written.name}")

    @contextlib.contextmanager
    def _running_phase(
        self, title: str, config: Config | None = None, settings: Sequence[str] = ()
    ) -> Iterator[StartedPhase]:
        """Start the command, which is killed with all its processes at the end of the block."""
        self.notify(title)
        log = self.recipe.with_name(f"log-{len(self.results)}.txt")
        settings = [*self.settings, *settings]
        stacks_path = self.run_folder.path / "logs" / "controller-blocked.txt"
        start, cpu_start = time.monotonic(), launch.cpu_seconds()
        started = launch.running_command(
            self.verb, self.recipe, config or self.config, settings, log
        )
        with started as process:
            phase = StartedPhase(title, process, log, stacks_path, self.timeout_seconds, start)
            yield phase
            phase.seconds = time.monotonic() - start
            # Before the kill: the children of killed processes have no parent that waits for them.
            phase.cpu_seconds = launch.cpu_seconds() - cpu_start

    def _add_result(self, title: str, phase: StartedPhase, evidence: str) -> None:
        self.results.append(PhaseResult(title, evidence, phase.seconds, phase.cpu_seconds))


def _join_numbers(values: Sequence[float | None]) -> str:
    return ", ".join("–" if value is None else f"{value:.2g}" for value in values)


def _num_lines(path: Path) -> int:
    return sum(1 for _ in path.open("rb"))
