"""Reads what `megatron-r1 sample` needs: questions, worked examples, the form of its output."""

from dataclasses import dataclass
from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.data.few_shot import FewShotExamples
from megatron_r1.data.prompts import load_prompts, prompt_options
from megatron_r1.evaluation.prompt_sets import PromptSet
from megatron_r1.sample.decontamination import find_contaminated, load_avoided
from megatron_r1.sample.sft_examples import Rendering
from megatron_r1.sample.user_functions import UserFunction, load_function

KIND_WITHOUT_TRUTH = "helpful"
"""The kind of rows that name none, if nothing is graded: it needs no truth."""


@dataclass(frozen=True)
class SampleInputs:
    """The inputs of a recipe, read and checked.

    Attributes:
        prompt_set: the questions, and the number of samples of each.
        avoided_prompts: prompt id → why it is not sampled.
        shots: worked examples that stand before each question, if any.
        rendering: how sft.jsonl is written; None for other outputs.
        rewrite: the user's function that rewrites responses, if any."""

    prompt_set: PromptSet
    avoided_prompts: dict[str, str]
    shots: FewShotExamples | None
    rendering: Rendering | None
    rewrite: UserFunction | None


def load_sample_inputs(config: Config) -> SampleInputs:
    """Load what a run samples and how it writes it: questions that no benchmark has, worked
    examples, the rewriting function, the form of its output.

    Raises:
        UserError: no question is left.
    """
    sample = config.sample
    options = prompt_options(config.data)
    if not sample.is_graded and config.data.kind is None:
        options["kind"] = KIND_WITHOUT_TRUTH
    split = load_prompts(**options)
    avoid = load_avoided(sample.decontaminate)
    if config.data.heldout_path:  # data.heldout_fraction makes a disjoint set by itself
        avoid += [prompt.question for prompt in split.heldout]
    avoided_prompts = (
        find_contaminated(split.train, avoid, sample.decontaminate_ngram) if avoid else {}
    )
    prompts = [prompt for prompt in split.train if prompt.id not in avoided_prompts]
    if not prompts:
        raise UserError(
            f"sample.decontaminate: all {len(split.train):,} questions are among those to be "
            f"avoided, the first because of {avoided_prompts[split.train[0].id]}; give other "
            "questions, or set sample.decontaminate_ngram: 0 for equality only",
            key="sample.decontaminate",
            cause=Cause.EMPTY,
        )
    shots = (
        FewShotExamples(sample.shots, sample.num_shots, config.run.seed) if sample.shots else None
    )
    rewrite, rendering = None, None
    if sample.rewrite:
        rewrite = load_function(sample.rewrite, "sample.rewrite", "question, response")
    if sample.output == "sft":
        # A run's folder has its tokenizer in hf/.
        path = Path(config.model.path)
        tokenizer = path if (path / "config.json").is_file() else path / "hf"
        model_path = str(tokenizer) if config.model.path else ""
        rendering = Rendering(sample.render, config.data.template, model_path)
    return SampleInputs(
        PromptSet("", prompts, sample.samples), avoided_prompts, shots, rendering, rewrite
    )
