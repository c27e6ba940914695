"""Loads the prompts of an environment, which are the rows for its `reset`."""

import json
import tempfile
from dataclasses import replace
from typing import Unpack

from r1_grading.rewards import ENVIRONMENT

from megatron_r1.agents.environment_pool import describe_in_subprocess
from megatron_r1.agents.verifiers import list_tasks
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import AgentsConfig
from megatron_r1.data.prompt_reader import MissingTruth
from megatron_r1.data.prompt_split import PromptSplit
from megatron_r1.data.prompts import PromptOptions, load_prompts


def load_environment_prompts(environment: str, **options: Unpack[PromptOptions]) -> PromptSplit:
    """Load the prompts of a recipe; where `agents.environment` grades, rows need no truth.

    Raises:
        UserError: a bad row, an unknown task, parameter or kind, too few questions, or a truth that
            is missing where the environment does not grade.
    """
    if not environment:
        return load_prompts(**options)
    description = describe_in_subprocess(environment)
    if not description.has_reward:
        try:
            return load_prompts(**options)
        except MissingTruth as error:
            tools = {method: tool for tool, method in description.misspelt.items()}
            tool = tools.get("get_reward")
            suggestion = f" ({tool} is a tool; did you mean get_reward?)" if tool else ""
            raise UserError(
                f"agents.environment: {environment.rpartition(':')[2]} has no "
                f"get_reward{suggestion}, so kind {error.kind} grades the answer and needs "
                f"'truth': {error}",
                key="agents.environment",
                cause=Cause.MISSING,
            ) from None
    # The rows of a task have what its scorer needs; as questions of an environment they would not.
    options["kind"] = None if options.get("task") else ENVIRONMENT
    split = load_prompts(**options)
    train, heldout = (
        [replace(prompt, kind=ENVIRONMENT) for prompt in side]
        for side in (split.train, split.heldout)
    )
    return PromptSplit(train, heldout)


def load_run_prompts(agents: AgentsConfig, **options: Unpack[PromptOptions]) -> PromptSplit:
    """Return the prompts of a run: the tasks of `agents.verifiers.taskset`, each whole in the
    field `task`, or `load_environment_prompts`.

    Raises:
        UserError: data.path or task is set with a taskset, the tasks cannot be listed, or as
            `load_environment_prompts`.
    """
    if not agents.verifiers.taskset:
        return load_environment_prompts(agents.environment, **options)
    if options.get("path") or options.get("task"):
        raise UserError(
            "data.path: the questions are the taskset's; leave out data.path and task",
            key="data.path",
            cause=Cause.CONFLICT,
        )
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for task in list_tasks(agents.verifiers):
            prompt = task.get("prompt")
            question = prompt if isinstance(prompt, str) else json.dumps(task)
            print(json.dumps({"question": question, "task": task}), file=file)
        file.flush()
        options["path"] = file.name
        options["kind"] = ENVIRONMENT
        return load_prompts(**options)
