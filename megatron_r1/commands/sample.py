"""Sample a model's responses and turn them into training data: cold start, rejection sampling,
preference pairs, safety labels. See docs/sample.md. `sample RUN_FOLDER` asks a run's trained
model the run's own questions, and writes into `sampled/` there.

The first pass samples and grades every response and logs it in samples.jsonl; the second decides
which are kept. If only what is kept has changed, the second pass alone is repeated."""

import contextlib
import json
from pathlib import Path
from typing import Any

from r1_grading import RewardPool
from r1_grading.reading import THINK
from r1_grading.terms import weights_at

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, RunError, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.commands.parts.sampling_run import (
    open_evaluated_model,
    require_same_settings,
    run_in_folder,
)
from megatron_r1.commands.sample_inputs import SampleInputs, load_sample_inputs
from megatron_r1.config import Config
from megatron_r1.config.sample import KeepConfig
from megatron_r1.data.few_shot import FewShotExamples
from megatron_r1.data.prompt_templates import TEMPLATES
from megatron_r1.evaluation.evaluated_model import EvaluatedModel
from megatron_r1.evaluation.package_versions import package_versions
from megatron_r1.evaluation.response_log import ResponseLog
from megatron_r1.evaluation.sampling import ResponseSampler
from megatron_r1.evaluation.sampling_settings import SamplingSettings
from megatron_r1.evaluation.text_response_grader import TextResponseGrader
from megatron_r1.reporting.formatting import format_count
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.sample.filter_settings import FILTER_NAMES, active_filters, check_filters
from megatron_r1.sample.filters import PooledFilters
from megatron_r1.sample.preference_pairs import PreferencePairs
from megatron_r1.sample.response_judges import ResponseJudge, make_judge
from megatron_r1.sample.result_cache import ResultCache
from megatron_r1.sample.safety_labels import SafetyLabels
from megatron_r1.sample.second_pass import OUTPUT_FILES, Decide, decide_all, write_outputs
from megatron_r1.sample.selection import DUPLICATE, DecisionCounts, Selection
from megatron_r1.sample.sft_examples import SFTKeeper, cached_rewriter

REQUIRED_KEYS = ("run.folder",)
EMPTY_OUTPUT_REMEDIES = {
    "sft": "sample.keep or sample.filters, such as sample.keep.min_accuracy: 0",
    "responses": "sample.keep or sample.filters, such as sample.keep.min_accuracy: 0",
    "pairs": "sample.judge, sample.pairs (margin, max_length_bias) or sample.filters",
    "labels": "sample.judge or sample.filters",
}


def from_run(folder: str) -> tuple[str, dict[str, Any]]:
    """Return the recipe of a run's folder, and the settings that sample its trained model instead
    of training on.

    Raises:
        UserError: the folder is not a run's.
    """
    recipe = Path(folder) / "config.yaml"
    if not recipe.is_file():
        raise UserError(
            f"sample {folder}: a folder without config.yaml is no run's; give a run's folder, or a "
            "recipe with model.path",
            key="RECIPE",
            cause=Cause.NOT_FOUND,
        )
    settings = {
        "model.path": folder,
        "model.checkpoint": None,
        "run.folder": str(Path(folder) / "sampled"),
        "rollout.colocated": False,
        "parallel.offload_between_phases": "none",
        "parallel.offload_folder": None,
    }
    trained = configuration.load_recipe(recipe)
    template = TEMPLATES.get(trained.data.template, trained.data.template)
    if "format" not in trained.rewards.weights and THINK not in template:
        settings["sample.filters.format"] = False  # the run's responses have no thoughts
    return str(recipe), settings


def check(config: Config) -> None:
    """Raise UserError for unknown `sample.filters` and options."""
    check_filters(config.sample.filters)


def run(config: Config) -> None:
    """Sample what is missing, decide, write the outputs.

    Raises:
        UserError: a mistake in the recipe or its data, before any long work starts.
        RunError: an engine or a service fails, or no response is kept; after a failure the same
            command continues.
    """
    if bool(config.sample.server) == bool(config.model.path):
        raise UserError(
            "sample needs one model: either model.path (a Hugging Face folder or a run's folder) "
            "or sample.server ({url: …, model: …})",
            key="model.path",
            cause=Cause.CONFLICT if config.model.path else Cause.MISSING,
        )
    agents = config.agents
    if name := agents.environment or agents.harness or agents.verifiers.taskset:
        raise UserError(
            f"agents: {name}: sample draws responses of a single turn; leave section agents out",
            key="agents",
            cause=Cause.CONFLICT,
        )
    inputs = load_sample_inputs(config)
    run_in_folder(config, "the sampling", lambda folder: _sample_and_decide(config, folder, inputs))


async def _sample_and_decide(config: Config, folder: RunFolder, inputs: SampleInputs) -> None:
    """Sample and grade what the log lacks, then decide about everything in the log."""
    log = ResponseLog(folder.samples_path, "sample")
    async with contextlib.AsyncExitStack() as stack:
        judge = None
        if config.sample.output in ("pairs", "labels"):
            cache = ResultCache(folder.path / "judgements.jsonl")
            judge = make_judge(config.sample, config.rewards.options.get("judge", {}), cache)
            stack.push_async_callback(judge.close)
        rewards = config.rewards
        pool = RewardPool(rewards.workers, rewards.timeout_seconds, rewards.memory_bytes)
        stack.push_async_callback(pool.close)
        grader = None
        if config.sample.is_graded:
            # As a training run grades in its first step.
            grader = TextResponseGrader(
                pool, weights_at(rewards.weights, step=1), rewards.call_options
            )
        rollout, server = config.rollout, config.sample.server
        decoding = SamplingSettings.from_rollout(rollout)
        key = "sample.server"
        model = await open_evaluated_model(config, folder.path, server, key, decoding, inputs.shots)
        stack.push_async_callback(model.close)
        settings = _identity_settings(config, model, inputs.shots)
        require_same_settings(folder, config, settings, log)
        if grader is not None:
            await grader.check(inputs.prompt_set.prompts)
        if judge is not None:
            await judge.check()
        sampler = ResponseSampler(
            model,
            grader,
            log,
            [inputs.prompt_set],
            config.run.seed,
            lambda prompt_set, prompt, response: {"kind": prompt.kind, "question": prompt.question},
            by_prompt=True,
        )
        await sampler.run()
        await _decide_responses(config, folder.path, inputs, log, pool, grader, judge, settings)


def _identity_settings(
    config: Config, model: EvaluatedModel, shots: FewShotExamples | None
) -> dict[str, Any]:
    """Return all that changes responses and grades, but not how many there are or are kept."""
    rollout, rewards = config.rollout, config.rewards
    settings = {
        "run.seed": config.run.seed,
        "rollout.temperature": rollout.temperature,
        "rollout.top_p": rollout.top_p,
        **({"rollout.top_k": rollout.top_k} if rollout.top_k else {}),
        **({"rollout.min_p": rollout.min_p} if rollout.min_p else {}),
        "rollout.max_response_tokens": rollout.max_response_tokens,
        "sample.shots": shots.identity if shots else None,
        **model.identity,
    }
    if config.sample.is_graded:
        settings["rewards.weights"] = rewards.model_dump(include={"weights"})["weights"]
        settings["rewards.options"] = rewards.call_options
    return settings


async def _decide_responses(
    config: Config,
    folder: Path,
    inputs: SampleInputs,
    log: ResponseLog,
    pool: RewardPool,
    grader: TextResponseGrader | None,
    judge: ResponseJudge | None,
    settings: dict[str, Any],
) -> None:
    """Decide about every logged response by `sample.output`, and write the output file and the
    report.

    Args:
        config: the recipe.
        folder: the run's folder.
        inputs: the questions and the model.
        log: the logged responses.
        pool: grades responses in processes.
        grader: grades a response's text; None: no rewards are computed.
        judge: the judge model's grades; None: no judge is asked.
        settings: the settings of the sampling, for the report.

    Raises:
        RunError: nothing is kept."""
    sample = config.sample
    filters = active_filters(sample.output, sample.filters)
    keep = sample.keep if sample.keeps else KeepConfig(min_accuracy=None)
    run_filters, drops_duplicates = PooledFilters(pool, filters), DUPLICATE in filters
    selection = Selection(keep, run_filters, drops_duplicates, config.run.seed)
    decide: Decide
    facts: dict[str, Any] = {}
    if sample.output == "pairs":
        assert judge is not None
        decide = pairs = PreferencePairs(selection, sample.pairs, judge)
        # All pairs must be judged before lengths can be balanced; the second pass uses the cache.
        async for _ in decide_all(log, inputs.prompt_set, pairs):
            pass
        pairs.balance()
        facts = pairs.length_bias()
    elif sample.output == "labels":
        assert judge is not None
        decide = SafetyLabels(selection, judge)
    else:
        cache = ResultCache(folder / "rewrites.jsonl")
        rewriter = cached_rewriter(inputs.rewrite, cache) if inputs.rewrite else None
        decide = SFTKeeper(selection, inputs.rendering, rewriter, grader)
    counts = DecisionCounts()
    file = OUTPUT_FILES.get(sample.output)
    await write_outputs(log, inputs.prompt_set, decide, folder / file if file else None, counts.add)
    _write_sample_report(folder, inputs, counts, file, facts, {"filters": filters, **settings})
    if not counts.num_kept:
        raise RunError(
            f"{folder}: no response is kept; most are {counts.decisions.most_common(1)[0][0]} "
            f"(samples.jsonl has the reason of each). {_filter_hint(counts)}Change "
            f"{EMPTY_OUTPUT_REMEDIES[sample.output]}: the same command then decides again "
            "without sampling"
        )


def _filter_hint(counts: DecisionCounts) -> str:
    """Return which filter drops the most responses that would be kept without it, and its switch;
    "" if none does."""
    name = next((name for name, _ in counts.decisions.most_common() if name in FILTER_NAMES), None)
    if name is None:
        return ""
    return (
        f"The filter {name} drops {format_count(counts.decisions[name], 'response')} that would be "
        f"kept: sample.filters.{name}: false keeps them. "
    )


def _write_sample_report(
    folder: Path,
    inputs: SampleInputs,
    counts: DecisionCounts,
    file: str | None,
    facts: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    result = counts.as_json() | facts
    result |= {
        "avoided": len(inputs.avoided_prompts),
        "settings": settings,
        "versions": package_versions(),
    }
    atomic_write(folder / "sample.json", json.dumps(result, indent=1) + "\n")
    (folder / "curation.json").unlink(missing_ok=True)  # its name up to 0.2
    print(counts.table(), flush=True)
    if inputs.avoided_prompts:
        print(
            f"  {len(inputs.avoided_prompts):,} questions were not sampled: sample.decontaminate",
            flush=True,
        )
    if facts:
        print(
            f"  {facts['pairs']:,} pairs; log(chosen / rejected length) {facts['length_bias']:+.3f}"
            f", {facts['length_bias_before']:+.3f} before pairs were left out for it",
            flush=True,
        )
    names = ("samples.jsonl", "sample.json", file)
    print(f"{folder}/: {', '.join(filter(None, names))}", flush=True)
