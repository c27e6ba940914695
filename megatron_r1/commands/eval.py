"""Evaluates a model on benchmarks: pass@1, pass@k, cons@N, with intervals; keeps every answer. See
docs/evaluation.md."""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from r1_grading import RewardPool
from r1_grading.base.errors import shorten
from r1_grading.rewards import ENVIRONMENT
from r1_grading.terms import ACCURACY
from r1_grading.truths import truth_answer

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.base.files.json_lines import read_lines, write_lines
from megatron_r1.commands.parts.sampling_run import (
    open_evaluated_model,
    require_same_settings,
    run_in_folder,
)
from megatron_r1.config import Config
from megatron_r1.data.prompt import Prompt
from megatron_r1.evaluation.evaluation_plot import write_figure
from megatron_r1.evaluation.evaluation_report import print_table, write_evaluation_report
from megatron_r1.evaluation.identity import identity_settings
from megatron_r1.evaluation.package_versions import package_versions
from megatron_r1.evaluation.prompt_sets import PromptSet, load_prompt_sets, prompt_digest
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.evaluation.response_log import ResponseLog
from megatron_r1.evaluation.sampling import ResponseSampler
from megatron_r1.evaluation.sampling_settings import SamplingSettings
from megatron_r1.evaluation.summary import Summary, summarize_benchmark
from megatron_r1.evaluation.text_response_grader import TextResponseGrader
from megatron_r1.reporting.run_folder import RunFolder

REQUIRED_KEYS = ("run.folder", "eval.benchmarks")
MAX_TRUTH_CHARS = 200


def run(config: Config) -> None:
    """Sample what is missing, grade it, and write the results.

    Raises:
        UserError: a mistake in the recipe, before any long work starts.
        RunError: an engine or a server fails; the same command continues.
    """
    if not config.eval.server and not config.model.path:
        raise UserError(
            "eval needs a model: model.path (a Hugging Face folder or a run's folder) or "
            "eval.server ({url: …, model: …})",
            key="model.path",
            cause=Cause.MISSING,
        )
    if config.eval.server and config.model.path:
        raise UserError(
            f"eval has two models: model.path {config.model.path} and eval.server "
            f"{config.eval.server.url}. Leave one out: --model.path '' or --eval.server null",
            key="eval.server",
            cause=Cause.CONFLICT,
        )
    sets = load_prompt_sets(config)
    mode = config.rewards.options.get("judge", {}).get("mode", "verify")
    if (compared := [s.title for s in sets if s.is_pairwise]) and mode != "compare":
        raise UserError(
            f"benchmark {compared[0]} compares responses with another model's: set "
            f"rewards.options.judge.mode: compare (it is {mode})",
            key="rewards.options.judge.mode",
            cause=Cause.CONFLICT,
        )
    run_in_folder(config, "the evaluation", lambda folder: _evaluate_sets(config, folder, sets))


async def _evaluate_sets(config: Config, folder: RunFolder, sets: list[PromptSet]) -> None:
    started_at = time.monotonic()
    log = ResponseLog(folder.samples_path, "eval")
    limit = config.rollout.max_response_tokens
    decoding = SamplingSettings.from_options(
        config.rollout, config.eval.temperature, config.eval.top_p, limit
    )
    model = await open_evaluated_model(
        config, folder.path, config.eval.server, "eval.server", decoding
    )
    played = {s.title: s.agents.model_dump() for s in sets if s.agents is not None}
    identity = model.identity | ({"agents": played} if played else {})
    settings = identity_settings(config, identity)
    require_same_settings(folder, config, settings, log)
    rewards = config.rewards
    pool = RewardPool(rewards.workers, rewards.timeout_seconds, rewards.memory_bytes)
    try:
        grader = TextResponseGrader(pool, {ACCURACY: 1.0}, rewards.call_options)
        seed = config.run.seed
        sampler = ResponseSampler(model, grader, log, sets, seed, _audit_fields, by_prompt=False)
        write_lines(folder.path / "questions.jsonl", _question_lines(sets))
        for prompt_set in sets:
            try:
                if prompt_set.agents is not None:
                    await model.check(prompt_set.agents, prompt_set.prompts)
                await grader.check([p for p in prompt_set.prompts if p.kind != ENVIRONMENT])
            except UserError as error:
                raise UserError(
                    f"benchmark {prompt_set.title}, {error}", key=error.key, cause=error.cause
                ) from None
        await sampler.run()
        part = rewards.options.get("judge", {}).get("part", "summary")
        summaries = [
            await summarize_benchmark(pool, log, prompt_set, seed, part, rewards.reading)
            for prompt_set in sets
        ]
    finally:
        await asyncio.gather(model.close(), pool.close())
    _write_results(config, folder, settings, summaries, time.monotonic() - started_at)


def _audit_fields(prompt_set: PromptSet, prompt: Prompt, response: TextResponse) -> dict[str, Any]:
    """Return the fields of a line of samples.jsonl besides the response, for a check by hand."""
    return {
        "reward": response.reward or 0.0,  # a refusal and a failed grader count as wrong
        "reason": response.reason or response.refusal,
        "refused": bool(response.refusal),
        "truth": shorten(truth_answer(prompt.truth), MAX_TRUTH_CHARS),
    }


def _question_lines(sets: Sequence[PromptSet]) -> Iterator[dict[str, Any]]:
    for prompt_set in sets:
        for prompt in prompt_set.prompts:
            yield {
                "benchmark": prompt_set.title,
                "id": prompt.id,
                "digest": prompt_digest(prompt),
                "kind": prompt.kind,
                "question": prompt.question,
                "truth": shorten(truth_answer(prompt.truth), 10 * MAX_TRUTH_CHARS),
            }


def _write_results(
    config: Config,
    folder: RunFolder,
    settings: dict[str, Any],
    summaries: list[Summary],
    seconds: float,
) -> None:
    result = {
        "benchmarks": {summary.title: summary.as_json() for summary in summaries},
        "model": config.eval.server.url if config.eval.server else config.model.path,
        "settings": settings,
        "versions": package_versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 1),
    }
    atomic_write(folder.path / "eval.json", json.dumps(result, indent=1) + "\n")
    figure = write_figure(folder.path / "eval.png", summaries)
    questions = {(q["benchmark"], q["id"]): q for q in read_lines(folder.path / "questions.jsonl")}
    write_evaluation_report(
        folder.report_path,
        title=f"evaluation · {folder.path.name}",
        settings={"model": str(result["model"]), **{n: str(v) for n, v in settings.items()}},
        summaries=summaries,
        figure=figure,
        questions=questions,
        samples=read_lines(folder.samples_path),
    )
    print_table(summaries)
    print(f"{folder.path}/: eval.json, samples.jsonl, eval.png, report.html", flush=True)
