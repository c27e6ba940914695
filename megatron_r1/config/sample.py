"""Section `sample`: training data (how many responses are drawn, which are kept, in what form).

The defaults are those of DeepSeek-R1's rejection sampling (arXiv 2501.12948:
every correct response without mixed languages, long paragraphs and code blocks); see
docs/sample.md."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from r1_grading.reading import Part

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.eval import ServerConfig
from megatron_r1.config.section import Section

Output = Literal["sft", "pairs", "labels", "responses"]
SERVED_JUDGE = "judge"


class KeepConfig(Section):
    """Which of a prompt's graded responses are kept."""

    min_accuracy: float | None = Field(1.0, ge=0, le=1)
    """least reward of the prompt's own kind; null: responses are not graded"""
    min_reward: float | None = None
    """least weighted sum of rewards.weights; null: no limit"""
    per_prompt: int | None = Field(None, ge=1)
    """responses kept of a prompt; null: all"""
    choose: Literal["random", "shortest", "first", "best"] = "random"
    """which are kept of more than per_prompt; best: by reward"""
    min_pass_rate: float | None = Field(None, ge=0, le=1)
    """prompts that are right less often are left out"""
    max_pass_rate: float | None = Field(None, ge=0, le=1)
    """prompts that are right more often are left out"""

    @model_validator(mode="after")
    def _has_the_grades_it_needs(self) -> Self:
        limits = ("min_reward", "min_pass_rate", "max_pass_rate")
        grade_settings = [name for name in limits if getattr(self, name) is not None]
        grade_settings += ["choose: best"] if self.choose == "best" else []
        if self.min_accuracy is None and grade_settings:
            raise UserError(
                f"sample.keep.{grade_settings[0]} needs grades, and sample.keep.min_accuracy: null "
                "is not to grade; set min_accuracy, 0 for any grade",
                key=f"sample.keep.{grade_settings[0].partition(':')[0]}",
                cause=Cause.CONFLICT,
            )
        low, high = self.min_pass_rate, self.max_pass_rate
        if low is not None and high is not None and low > high:
            raise UserError(
                f"sample.keep: min_pass_rate {low} is above max_pass_rate {high}, so no question "
                "would be left",
                key="sample.keep.min_pass_rate",
                cause=Cause.CONFLICT,
            )
        return self


class RenderConfig(Section):
    """The form in which kept responses are written to sft.jsonl."""

    template: str | None = None
    """template of the prompt; default: data.template"""
    response: str = "{response}"
    """text with {thought}, {summary}, {answer} or {response}, such as
    <think>{thought}</think>{summary}"""
    tokenizer: str | None = None
    """folder whose chat template renders, for another model; default: that of model.path"""

    @field_validator("response")
    @classmethod
    def _has_a_placeholder(cls, response: str) -> str:
        if not any(
            f"{{{name}}}" in response for name in ("thought", "summary", "answer", "response")
        ):
            raise UserError(
                f"sample.render.response: {response!r} has none of {{thought}}, {{summary}}, "
                "{answer} and {response}, so all responses would be the same",
                key="sample.render.response",
                cause=Cause.MALFORMED,
            )
        return response


class PairsConfig(Section):
    """Preference pairs (arXiv 2501.12948 v2, section on the helpful reward model)."""

    per_prompt: int = Field(1, ge=1)
    """pairs of a prompt, no response in two of them"""
    margin: float = Field(0.5, ge=0, le=1)
    """share of votes won less share lost; with less, a near-tie"""
    votes: int = Field(4, ge=2)
    """calls of a judge function per pair; a served judge has rewards.options.judge"""
    part: Part = "summary"
    """what is compared and measured: summary, or response"""
    max_length_bias: float | None = Field(0.05, ge=0)
    """mean of log(length of chosen / length of rejected) that may be left, either way; null: any"""

    @field_validator("votes")
    @classmethod
    def _half_in_each_order(cls, votes: int) -> int:
        if votes % 2:
            raise UserError(
                f"sample.pairs.votes: {votes} is odd; each response is to be first equally often, "
                f"so make it {votes + 1}",
                key="sample.pairs.votes",
                cause=Cause.INDIVISIBLE,
            )
        return votes


class SampleConfig(Section):
    """Which responses `sample` draws and keeps, and what it writes of them."""

    samples: int = Field(4, ge=1)
    """responses drawn for each prompt"""
    output: Output = "sft"
    """sft: kept responses; pairs: preferences; labels: safe or unsafe; responses: all, graded
    only"""
    server: ServerConfig | None = None
    """{url, model, …}: a served model that answers instead of model.path"""
    shots: str | None = None
    """JSONL of {question, response}: worked examples in front of the question"""
    num_shots: int | None = Field(None, ge=1)
    """how many examples precede each question, drawn anew for each; default: all"""
    decontaminate: list[str] = []
    """files of questions that must not be sampled"""
    decontaminate_ngram: int = Field(13, ge=0)
    """words in a row that such a question must not share; 0: equality only"""
    keep: KeepConfig = KeepConfig()
    """which graded responses are kept"""
    filters: dict[str, Any] = {}
    """{name: its options, true, or false to switch it off}, over the defaults of output"""
    rewrite: str | None = None
    """module:function(question, response) → readable response, or None"""
    render: RenderConfig = RenderConfig()
    """the form of sft.jsonl"""
    judge: str = SERVED_JUDGE
    """who judges pairs and labels: judge (rewards.options.judge), or module:function"""
    pairs: PairsConfig = PairsConfig()
    """the pairs of output `pairs`"""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.output == "pairs" and self.samples < 2:
            raise UserError(
                f"sample.samples: {self.samples} response cannot be compared with another; "
                "sample.output: pairs needs 2 or more",
                key="sample.samples",
                cause=Cause.CONFLICT,
            )
        if self.rewrite is not None and self.output != "sft":
            raise UserError(
                f"sample.rewrite: only sample.output: sft has kept responses to rewrite, not "
                f"{self.output}",
                key="sample.rewrite",
                cause=Cause.CONFLICT,
            )
        changed_names = [name for name, value in self.keep if value != getattr(KeepConfig(), name)]
        if changed_names and not self.keeps:
            raise UserError(
                f"sample.keep.{changed_names[0]}: only graded responses are kept or not; the judge "
                f"decides on sample.output: {self.output}. Leave it out",
                key=f"sample.keep.{changed_names[0]}",
                cause=Cause.CONFLICT,
            )
        if self.num_shots is not None and self.shots is None:
            raise UserError(
                f"sample.num_shots: {self.num_shots} of which file? set sample.shots",
                key="sample.shots",
                cause=Cause.MISSING,
            )
        return self

    @property
    def keeps(self) -> bool:
        """Whether `keep` selects the responses; for pairs and labels a judge does."""
        return self.output in ("sft", "responses")

    @property
    def is_graded(self) -> bool:
        """Whether rewards grade the responses."""
        return self.keeps and self.keep.min_accuracy is not None
