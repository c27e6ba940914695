"""The engines of a run's teachers, which only compute log-probabilities of what the student sampled
(`EngineFleet.compute_logprobs`).

Their weights never change. One teacher has all questions, further ones have single sources
(multi-teacher on-policy distillation, MOPD: arXiv 2606.30406)."""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config import Config
from megatron_r1.config.teacher import DEFAULT, OTHER_SOURCES, TeacherConfig, source_key
from megatron_r1.controller.rollouts.rollout import Group
from megatron_r1.data.prompt import Prompt
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.fleet.external_fleet import ExternalFleet
from megatron_r1.engines.server import gpu, model_config, recipe_settings

NUM_SHOWN = 8
"""Sources that an error names."""


class TeacherFleets:
    """The engines of all teachers, to be started with their models.

    Args:
        fleets: the engines by source; `DEFAULT`: of all other sources.
        paths: the model folder of each."""

    def __init__(self, fleets: Mapping[str, EngineFleet], paths: Mapping[str, str]):
        self.fleets, self._paths = dict(fleets), dict(paths)

    async def start(self) -> None:
        """Start all engines at once and wait for them."""
        await asyncio.gather(
            *(fleet.start(self._paths[source]) for source, fleet in self.fleets.items())
        )

    async def close(self) -> None:
        """End all engines. Safe to call more than once."""
        await asyncio.gather(*(fleet.close() for fleet in self.fleets.values()))

    async def compute_logprobs(
        self, prompt: Prompt, token_ids: Sequence[int], first: int, step: int = 0
    ) -> array[float]:
        """Return the log-probabilities of a sample's tokens by the teacher of its prompt.

        Args:
            prompt: the row, whose source names the teacher.
            token_ids: the sample with its prompt.
            first: the index of the first token to compute.
            step: the training step; calls of an earlier one come first.

        Raises:
            EngineError: the teacher's engines fail."""
        fleet = self.fleets[teacher_source(prompt, self.fleets)]
        return await fleet.compute_logprobs(token_ids, first, step=step)

    def kl_by_source(self, groups: Iterable[Group]) -> dict[str, float]:
        """Return "teacher/kl/SOURCE" of each of several teachers, `OTHER_SOURCES` of the default
        one: the mean over response tokens of log π_engine - log π_teacher, in nats; empty for one
        teacher.

        Args:
            groups: a rollout's, with the teachers' log-probabilities."""
        if len(self.fleets) == 1:
            return {}
        sums: Counter[str] = Counter()
        num_tokens: Counter[str] = Counter()
        for group in groups:
            source = teacher_source(group.prompt, self.fleets) or OTHER_SOURCES
            for graded_response in group.responses:
                if graded_response.teacher_logprobs is not None:
                    logprobs = np.asarray(graded_response.response.logprobs, np.float64)
                    sums[source] += (logprobs - graded_response.teacher_logprobs).sum()
                    num_tokens[source] += len(logprobs)
        return {f"teacher/kl/{name}": float(sums[name] / n) for name, n in num_tokens.items() if n}

    def metrics(self) -> dict[str, float]:
        """Return the counters of all engines together."""
        counters: Counter[str] = Counter()
        for fleet in self.fleets.values():
            counters.update(fleet.metrics())
        return dict(counters)


def teacher_fleet(
    config: Config, logs: Path, notify: Callable[[str], None], source: str = DEFAULT
) -> EngineFleet:
    """Return the engines of a teacher, to be started with the model of its path.

    Args:
        config: the recipe.
        logs: the folder of the engines' logs.
        notify: called with a line when an engine is replaced.
        source: a key of `teacher.by_source`; default: the section's own teacher."""
    teacher = config.teacher.engines_of(source)
    role = f"teacher-{quote(source, safe='')}" if source else "teacher"
    supervision = {**recipe_settings.fleet_settings(teacher), "role": role, "notify": notify}
    # vLLM samples one token after the given ones. If that is beyond the model's positions it must
    # be allowed; nothing is computed there, as the token is not an input.
    max_model_len = model_config.max_model_len(config) + 1
    if teacher.url:
        return ExternalFleet(teacher.url, logs, max_model_len=max_model_len, **supervision)
    return EngineFleet(
        teacher.engines,
        logs,
        device=gpu.engine_device(),
        max_model_len=max_model_len,
        prefix_caching=False,  # vLLM computes the whole prompt for its log-probabilities
        extra_args=["--max-num-batched-tokens", str(teacher.max_num_batched_tokens)],
        extra_env={"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"},
        section=source_key(source),
        **supervision,
        **recipe_settings.engine_settings(teacher),
    )


def open_teachers(
    config: Config, logs: Path, notify: Callable[[str], None]
) -> TeacherFleets | None:
    """Return the teachers of section `teacher`; None for a run without one.

    Args:
        config: the recipe.
        logs: the folder of the engines' logs.
        notify: called with a line when an engine is replaced."""
    teacher = config.teacher
    if not teacher.path:
        return None
    sources = (DEFAULT, *teacher.by_source)
    fleets = {source: teacher_fleet(config, logs, notify, source) for source in sources}
    return TeacherFleets(fleets, {source: teacher.engines_of(source).path for source in sources})


def teacher_source(prompt: Prompt, sources: Iterable[str]) -> str:
    """Return the source of a prompt's teacher: its data source, or else its kind, where a teacher
    has that; `DEFAULT` where none has."""
    names = [name for name in (prompt.data_source, prompt.kind) if name]
    return next((name for name in names if name in sources), DEFAULT)


def count_sources(teacher: TeacherConfig, prompts: Sequence[Prompt]) -> dict[str, int]:
    """Return the number of questions of each teacher, by source.

    Args:
        teacher: section `teacher`.
        prompts: the questions to train on.

    Raises:
        UserError: a teacher has no question."""
    counts = Counter(teacher_source(prompt, teacher.by_source) for prompt in prompts)
    for name in teacher.by_source:
        if not counts[name]:
            sources = Counter(
                source
                for prompt in prompts
                for source in (prompt.data_source, prompt.kind)
                if source
            )
            names = [source for source, _ in sources.most_common(NUM_SHOWN)]
            num_others = len(sources) - len(names)
            suggestion = did_you_mean(name, names, "{}")
            raise UserError(
                f"{source_key(name)}: no question is of that source{suggestion}; data sources and "
                f"kinds are {', '.join(names)}{f' and {num_others:,} more' if num_others else ''}",
                key=source_key(name),
                cause=Cause.UNKNOWN,
            )
    return dict(counts)
