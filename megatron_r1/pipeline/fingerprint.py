"""Fingerprints of a stage: settings, inputs and outputs in a form that can be compared; files and
folders by their `digests`."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_r1.base.user_code import module_syntax
from megatron_r1.config import RESUMABLE, Config
from megatron_r1.config.setting_keys import changed_keys, flatten_sections, is_within, value_text
from megatron_r1.pipeline.digests import digest_of_outputs, digest_of_value, digest_path, is_hidden
from megatron_r1.pipeline.references import iter_references, iter_texts, substitute_references
from megatron_r1.pipeline.stages import PipelinePlan, PipelineStage

START_FILES = frozenset(
    ("begun.json", "config.yaml", "logs", "stop", "tensorboard", "wandb", "mlflow", "trackers.json")
)
"""Files of a stage that are written before its verb reads any input."""
NOT_OUTPUT = START_FILES | {"checkpoints", "report.html", "sample_log", "sampled", "stage.json"}
"""Files of a stage that no other stage reads: resuming, logs, reports, what `sample` of it adds."""
FINAL_SETTINGS = ("run.steps", "rl.schedule", "eval")
"""Resumable settings that decide the result of a finished run."""
FILE_OF_STAGE = re.compile(r"\$\{([^{}\n.]+)\}/([^$\n]+)")
"""`${stage}/file`: that file alone is an input."""
USER_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
SECTIONS_OF_VERB = {
    "sft": ("sft",),
    "rl": ("rl", "push", "critic", "teacher"),
    "reward-model": ("reward_model",),
    "sample": ("sample",),
}
"""Sections that only one verb reads."""


def deciding_settings(plan: PipelinePlan, stage: PipelineStage, finished: bool) -> dict[str, Any]:
    """Return the settings that decide the stage's result, by dotted keys.

    References stay as written, since what they mean is an input: a pipeline's folder may be moved.

    Args:
        plan: the plan of the pipeline.
        stage: the pipeline stage.
        finished: whether the stage is done; one that is not may continue with another number of
            steps."""
    if stage.is_function:
        arguments = substitute_references(stage.settings, plan.unresolved)
        settings = flatten_sections({"function": stage.config.function, "arguments": arguments})
    else:
        free_keys = [name for name in RESUMABLE if not (finished and name in FINAL_SETTINGS)]
        for verb, sections in SECTIONS_OF_VERB.items():
            if verb != stage.config.verb:
                free_keys += sections
        flat_config = flatten_sections(plan.config(stage).model_dump())
        settings = {
            key: value for key, value in flat_config.items() if not is_within(key, free_keys)
        }
    for name, server in stage.config.serve.items():
        server_settings = {
            key: getattr(server, key) for key in ("model", "task", "arguments", "command")
        }
        settings |= flatten_sections({f"serve.{name}": server_settings})
    return json.loads(json.dumps(settings, default=str))


def default_settings() -> dict[str, Any]:
    """Return the default of every setting, for stages run before a setting was introduced."""
    return json.loads(json.dumps(flatten_sections(Config().model_dump()), default=str))


def input_digests(
    plan: PipelinePlan, stage: PipelineStage, upstream: tuple[str, ...]
) -> dict[str, str]:
    """Return the digest of each input: references, files named in settings, functions.

    Args:
        plan: the stages of one seed.
        stage: the stage whose inputs they are.
        upstream: the stages that it needs."""
    digests: dict[str, str] = {}
    for _, text in iter_texts(stage.all_settings):
        if (file := FILE_OF_STAGE.fullmatch(text)) and file[1] in upstream:
            digests[text] = digest_path(plan.folder_of(file[1]) / file[2])
            continue
        for _, reference in iter_references(text):
            head = reference.partition(".")[0]
            if head in upstream:
                digests[f"${{{reference}}}"] = (
                    digest_of_outputs(output_digests(plan.folder_of(head)))
                    if reference == head
                    else digest_path(Path(str(plan.reference_value(reference, {}))))
                )
    for name in stage.config.after:
        digests[f"after {name}"] = digest_of_outputs(output_digests(plan.folder_of(name)))
    for place, text in plan.named_files(stage):
        digests[f"{place} {text}"] = digest_path(Path(plan.resolve_here(text)))
    for function, syntax in _function_syntax(stage).items():
        digests[f"function {function}"] = digest_of_value(syntax)
    return digests


def output_digests(folder: Path) -> dict[str, str]:
    """Return name → digest of every output in a stage's folder."""
    if not folder.is_dir():
        return {}
    paths = sorted(path for path in folder.iterdir() if not is_hidden(path))
    return {path.name: digest_path(path) for path in paths if path.name not in NOT_OUTPUT}


def describe_setting_changes(
    before: dict[str, Any], after: dict[str, Any], defaults: dict[str, Any] | None = None
) -> list[str]:
    """Return a sentence such as `rl.group_size: 16 then, 8 now` for each difference.

    Args:
        before: the settings or digests that were recorded.
        after: those of now.
        defaults: values of keys that `before`, written by an earlier version, may lack."""
    before = {key: value for key, value in (defaults or {}).items() if key in after} | before
    missing_text = "not there"
    return [
        f"{key}: {value_text(before, key, missing_text)} then, "
        f"{value_text(after, key, missing_text)} now"
        for key in changed_keys(before, after)
    ]


def _function_syntax(stage: PipelineStage) -> dict[str, str]:
    """Return the syntax of the modules of all user functions that the stage names: its own, and
    those that rewrite, judge, filter or reward."""
    if stage.is_function:
        return {stage.config.function: module_syntax(stage.config.function)}
    functions = {}
    for text in filter(USER_FUNCTION.fullmatch, _texts_and_keys(stage.settings)):
        with contextlib.suppress(ValueError):  # it only has the form of a function's name
            functions[text] = module_syntax(text)
    return functions


def _texts_and_keys(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts_and_keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_and_keys(item)
