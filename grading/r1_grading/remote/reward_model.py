"""Reward models served by vLLM: `helpful` and `safety`, DeepSeek-R1's rewards on general prompts.

reward = sigmoid((score - shift) / scale), with the model's raw score (its logit). For a model
trained on pairs (Bradley-Terry) that is the probability of being preferred to a response with score
`shift`; for a pointwise model, with shift 0 and scale 1, it is the probability of "safe" that the
model was trained on. For a model with several classes, `label` is the good class and the reward its
softmax. With `threshold`, the reward is 1 from that score on and 0 below: GRPO divides by the
standard deviation within a group, so where all answers are safe it would learn from differences in
the fourth digit.
Sources: arXiv 2501.12948 v2, section 3.1 and supplement B.3."""

import math
from typing import Annotated, Any, Self

import msgspec
import numpy as np
from pydantic import AfterValidator, Field, model_validator

from r1_grading.base.errors import Cause, UserError
from r1_grading.reading import (
    Part,
    chat_messages,
    check_template,
    fill_template,
    prepare_texts,
)
from r1_grading.remote.service import Service, ServiceError, Ungradable
from r1_grading.remote.settings import ServiceSettings
from r1_grading.rewards import Grade

CHECK_SECONDS = 10.0
CHECK_QUESTION, CHECK_RESPONSE = "What is 7 + 5?", "<think>7 + 5 = 12</think>The answer is 12."


class RewardModelSettings(ServiceSettings):
    """Settings of `helpful` and `safety`."""

    shift: float = Field(0.0, description="the score that gets 0.5")
    scale: float = Field(1.0, gt=0, description="points of score per unit of the sigmoid")
    label: int | None = Field(None, ge=0, description="the good class of a model with several")
    threshold: float | None = Field(None, description="1 from this score on, else 0; null: sigmoid")
    template: Annotated[str | None, AfterValidator(check_template)] = Field(
        None,
        description="text with {question} and {response}, and any special tokens the model needs; "
        "default: the server's chat template",
    )

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        if self.threshold is not None and {"shift", "scale"} & self.model_fields_set:
            message = f"threshold={self.threshold:g} is a raw score: leave out shift, scale"
            raise UserError(message, key="threshold", cause=Cause.CONFLICT)
        return self


class _Classes(msgspec.Struct):
    probs: list[float]
    """The raw scores, one per class, since use_activation is false."""


class _Usage(msgspec.Struct):
    prompt_tokens: int


class _Classification(msgspec.Struct):
    data: list[_Classes]
    usage: _Usage


class RewardModel:
    """A reward that scores one part of a response by vLLM's /classify."""

    settings_type = RewardModelSettings
    part: Part = "summary"

    def __init__(self, settings: RewardModelSettings) -> None:
        self.settings = settings
        self._probe = self._request_body(CHECK_QUESTION, CHECK_RESPONSE)
        url = f"{settings.url.removesuffix('/v1')}/classify"
        self.service = Service(settings, url, _Classification, self._probe)

    async def check(self) -> None:
        """Raise ServiceError unless the service scores a text as the settings expect.

        It has to reply within seconds, with as many scores as they say, and its chat template has
        to keep all of the text it scores."""
        error_prefix = (
            f"{self.service.url}: model {self.settings.model!r} cannot serve as a reward model"
        )
        try:
            full_reply = await self.service.request(self._probe, CHECK_SECONDS)
            self._grade_of_reply(full_reply)
            summary = CHECK_RESPONSE.partition("</think>")[2]
            part = await self.service.request(self._request_body(CHECK_QUESTION, summary))
        except (Ungradable, ValueError) as error:
            raise ServiceError(f"{error_prefix}: {error}") from None
        # Chat templates of reasoning models drop the thought from assistant messages.
        if self.part == "response" and full_reply.usage.prompt_tokens <= part.usage.prompt_tokens:
            raise ServiceError(
                f"{error_prefix}: the server's chat template drops <think>…</think>, which this "
                "reward is to see; serve it with another --chat-template, or set the option "
                "template"
            )

    async def grade(
        self,
        response: str,
        truth: object = None,
        *,
        question: str | None = None,
        thought_opened: bool = False,
        **entry: object,
    ) -> Grade:
        """Return the response's score as a reward in [0, 1].

        Args:
            response: the text that the policy sampled.
            truth: not used.
            question: the prompt's question.
            thought_opened: the prompt ended with `<think>`.
            **entry: the prompt's other fields, which are not used.

        Raises:
            UserError: no question.
            Ungradable: only this response cannot be graded.
            ServiceError: the service is down or refuses the client."""
        if not isinstance(question, str):
            raise UserError(
                "a reward model needs the question: add it to the row",
                key="question",
                cause=Cause.MISSING,
            )
        question_text, part = prepare_texts(
            question, response, self.part, thought_opened, self.settings.max_chars
        )
        if part.text is None:
            return Grade(0.0, part.reason)
        classification = await self.service.request(self._request_body(question_text, part.text))
        try:
            return self._grade_of_reply(classification)
        except ValueError as error:
            raise ServiceError(f"{self.service.url}: {error}") from None

    async def close(self) -> None:
        """Close the connections to the service."""
        await self.service.close()

    def _grade_of_reply(self, reply: _Classification) -> Grade:
        scores = reply.data[0].probs if len(reply.data) == 1 else []
        label = self.settings.label
        if not scores or not all(map(math.isfinite, scores)):
            raise ValueError(f"it answers {reply.data} instead of scores")
        if (len(scores) == 1) != (label is None) or (label or 0) >= len(scores):
            remedy = "leave out label" if len(scores) == 1 else f"set label, 0 to {len(scores) - 1}"
            raise ValueError(f"it has {len(scores)} classes and label is {label}: {remedy}")
        if label is None:
            score = scores[0]
        else:  # log(p / (1 - p)) of its softmax
            other_scores = scores[:label] + scores[label + 1 :]
            score = scores[label] - float(np.logaddexp.reduce(other_scores))
        settings = self.settings
        if settings.threshold is None:
            # The logistic function; tanh does not overflow.
            reward = (1 + math.tanh((score - settings.shift) / settings.scale / 2)) / 2
        else:
            reward = float(score >= settings.threshold)
        return Grade(reward, f"score {score:.4g}")

    def _request_body(self, question: str, response: str) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.settings.model, "use_activation": False}
        if self.settings.template is not None:
            text = fill_template(self.settings.template, question, response)
            return body | {"input": text, "add_special_tokens": False}
        return body | {"messages": chat_messages(question, response)}


class Helpful(RewardModel):
    """Trained on pairs. It scores the summary only, so that it does not influence the reasoning."""


class Safety(RewardModel):
    """Trained on single responses. It scores the whole response: harm in a thought is harm."""

    part: Part = "response"
