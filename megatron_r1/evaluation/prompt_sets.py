"""The prompts that are sampled: every benchmark of the recipe, loaded and checked."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r1_grading.rewards import ENVIRONMENT

from megatron_r1.agents.environment import check_parameters
from megatron_r1.agents.environment_pool import describe_in_subprocess
from megatron_r1.agents.environment_prompts import load_environment_prompts
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import AgentsConfig, Config
from megatron_r1.config.eval import BenchmarkConfig, EvalConfig
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompts import prompt_options
from megatron_r1.evaluation.benchmarks import find_benchmark
from megatron_r1.evaluation.benchmarks.base import Rows, to_prompts
from megatron_r1.evaluation.benchmarks.benchmark_files import read_rows
from megatron_r1.evaluation.response_log import PromptKey

OWN_QUESTIONS = "questions"
"""The benchmark of the user's own questions."""
UNSET_VALUES: tuple[object, ...] = (None, [], {})
"""Values of an entry that is not set."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are each sampled `num_samples` times.

    Attributes:
        title: the benchmark's; "" for the prompts of `sample`.
        prompts: each asks one question, or begins an episode.
        num_samples: responses to each prompt.
        is_pairwise: responses are compared with others (`benchmarks.base`).
        agents: where episodes are played, their environment and limits."""

    title: str
    prompts: list[Prompt]
    num_samples: int
    is_pairwise: bool = False
    agents: AgentsConfig | None = None

    def key(self, prompt: Prompt) -> PromptKey:
        """Return what names a prompt among all sets: the set's title and the prompt's id."""
        return self.title, prompt.id


def load_prompt_sets(config: Config) -> list[PromptSet]:
    """Load all benchmarks of the recipe.

    Raises:
        UserError: two benchmarks have the same title.
        Exception: what loading raises.
    """
    entries = config.eval.benchmarks
    if not entries:
        raise UserError(
            "eval.benchmarks must be set, for example to [gym/arithmetic]",
            key="eval.benchmarks",
            cause=Cause.MISSING,
        )
    titles = [entry.title for entry in entries]
    for title in titles:
        if titles.count(title) > 1:
            raise UserError(
                f"eval.benchmarks names {title} twice: give each a label of its own",
                key="label",
                cause=Cause.DUPLICATE,
            )
    return [_load_entry(entry, config) for entry in entries]


def prompt_digest(prompt: Prompt) -> str:
    """Return a digest of the prompt's messages, kind, truth and fields."""
    content: list[Any] = [prompt.question, prompt.kind, prompt.truth, prompt.fields]
    content += [prompt.messages_before] if prompt.messages_before else []
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _load_entry(entry: BenchmarkConfig, config: Config) -> PromptSet:
    if entry.name.partition("/")[0] == ENVIRONMENT:
        return _load_rows(entry, config)
    return (
        _load_questions(entry, config)
        if entry.name == OWN_QUESTIONS
        else _load_prompt_set(entry, config.eval)
    )


def _load_questions(entry: BenchmarkConfig, config: Config) -> PromptSet:
    """Load the user's own questions: all questions of `path`, or the questions that the recipe's
    `data` holds out. The columns and the kind are those of `data`."""
    if refused := _set_entries(entry, ("instruction", "files", "options")):
        raise UserError(
            f"benchmark {entry.title}: your own questions take none of these: {refused}; leave "
            "them out",
            key="eval.benchmarks",
            cause=Cause.UNSUPPORTED,
        )
    prompts = _environment_prompts("", entry, config)
    if not prompts:
        raise UserError(
            f"benchmark {entry.title}: data holds no questions out; give the benchmark a path, or "
            "raise data.heldout_fraction",
            key="path",
            cause=Cause.MISSING,
        )
    return PromptSet(entry.title, prompts, entry.samples or config.eval.samples)


def _set_entries(entry: BenchmarkConfig, names: Sequence[str]) -> str:
    """Return the entries of these names that are set, with their values; "" where none is."""
    values = {name: getattr(entry, name) for name in names}
    return ", ".join(
        f"{name}: {value!r}" for name, value in values.items() if value not in UNSET_VALUES
    )


def _environment_prompts(environment: str, entry: BenchmarkConfig, config: Config) -> list[Prompt]:
    data = config.data
    if entry.path is None:
        prompts = load_environment_prompts(environment, **prompt_options(data)).heldout
    else:
        prompts = load_environment_prompts(
            environment,
            path=entry.path,
            heldout_fraction=0.0,
            columns=data.columns,
            kind=data.kind,
        ).train
    return prompts[: entry.limit or config.eval.limit]


def _load_prompt_set(entry: BenchmarkConfig, config: EvalConfig) -> PromptSet:
    benchmark, part = find_benchmark(entry.name)
    entry_options = dict(entry.options) | ({"suite": part} if part else {})
    options = benchmark.with_defaults(entry.name, entry_options)
    rows: Rows = ()
    if benchmark.hubs:
        rows = read_rows(entry.name, benchmark.hubs, options, entry.path, entry.files)
    elif entry.path is not None:
        raise UserError(
            f"benchmark {entry.name} makes its own questions: it takes no path ({entry.path})",
            key="path",
            cause=Cause.CONFLICT,
        )
    instruction = benchmark.instruction if entry.instruction is None else entry.instruction
    all_prompts = to_prompts(benchmark.questions(rows, options), instruction)
    prompts = list(itertools.islice(all_prompts, entry.limit or config.limit))
    if not prompts:
        raise UserError(
            f"benchmark {entry.title}: no questions are left; loosen its options ({options})",
            key="options",
            cause=Cause.EMPTY,
        )
    samples = entry.samples or config.samples
    return PromptSet(entry.title, prompts, samples, benchmark.is_pairwise)


def _load_rows(entry: BenchmarkConfig, config: Config) -> PromptSet:
    """Load the rows of benchmark `environment/NAME`: all rows of `path`, or the rows that the
    recipe's `data` holds out. Without a name the environment is `agents.environment`."""
    agents_config = config.agents
    name = entry.name.partition("/")[2] or agents_config.environment
    if not name:
        raise UserError(
            f"benchmark {entry.name}: name the environment, such as environment/calculator, or set "
            "agents.environment",
            key="agents.environment",
            cause=Cause.MISSING,
        )
    if refused := _set_entries(entry, ("instruction", "files")):
        raise UserError(
            f"benchmark {entry.title}: rows of an environment take none of these: {refused}; "
            "leave them out",
            key="eval.benchmarks",
            cause=Cause.UNSUPPORTED,
        )
    parameters = entry.options or (
        agents_config.parameters if name == agents_config.environment else {}
    )
    check_parameters(name, describe_in_subprocess(name), parameters)
    played = {"environment": name, "harness": "", "parameters": parameters}
    if not (entry.path is not None or config.data.path or config.data.task):
        raise UserError(
            f"benchmark {entry.title}: give its rows as path, or set data.path, whose held-out "
            "rows are played then",
            key="path",
            cause=Cause.MISSING,
        )
    prompts = _environment_prompts(name, entry, config)
    if not prompts:
        raise UserError(
            f"benchmark {entry.title}: no rows are held out; give data.heldout_path",
            key="data.heldout_path",
            cause=Cause.MISSING,
        )
    agents = agents_config.model_copy(update=played)
    return PromptSet(entry.title, prompts, entry.samples or config.eval.samples, agents=agents)
