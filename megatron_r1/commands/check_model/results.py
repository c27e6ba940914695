"""The results of `megatron-r1 check-model`: of its reference process, and of the whole check."""

from __future__ import annotations

import msgspec

from megatron_r1.base.errors import Cause

LOGPROB_TOLERANCE = 1e-4
"""The largest difference in float32; about 1e-5 is seen, of sums in another order."""


class ReferenceResult(msgspec.Struct):
    """The result of `commands.check_model.reference`.

    Attributes:
        num_tensors: the number of tensors in the folder.
        num_tokens: number of tokens of the tokenizer; None: the folder has no tokenizer.
        template: whether the tokenizer has a chat template.
        sequences: token ids.
        logprobs: log-probability of each token but the first, given the tokens before it, by
            transformers in the checked dtype.
        noise: the largest difference of `logprobs` from transformers' own in float32."""

    num_tensors: int
    num_tokens: int | None
    template: bool
    sequences: list[list[int]]
    logprobs: list[list[float]]
    noise: float

    @property
    def tolerance(self) -> float:
        """The largest difference that counts as agreement: both sides have rounding of their
        own."""
        return max(LOGPROB_TOLERANCE, 2 * self.noise)


class ReferenceFailure(msgspec.Struct):
    """The UserError of `commands.check_model.reference`."""

    message: str
    key: str
    cause: Cause


class NotCompared(msgspec.Struct, frozen=True):
    """Why vLLM's log-probabilities were not compared.

    Attributes:
        reason: the message.
        is_failure: vLLM could not run the model; False where vLLM is not installed."""

    reason: str
    is_failure: bool = True

    def __str__(self) -> str:
        return f"{'FAILED' if self.is_failure else 'NOT RUN'}: {self.reason}"


class ModelCheckResult(msgspec.Struct, omit_defaults=True):
    """The result of a check, as `--json` writes it.

    Attributes:
        folder: the folder that was checked.
        architecture: the class that config.json names.
        dtype: the dtype of the comparison.
        parameters: their number.
        memory_bytes: what RL takes for weights, gradients, optimizer, reference and engine, in
            fp32.
        free_bytes: the host's free memory.
        tensors: the number of tensors in the folder.
        tokens: the tokenizer's number of tokens; None without a tokenizer.
        template: whether the tokenizer has a chat template.
        compared: the number of log-probabilities that were compared.
        tolerance: the largest difference that counts as agreement, nats.
        megatron: the largest difference of Megatron's log-probabilities from transformers', nats,
            or why there is none.
        vllm: that of vLLM's, or why there is none.
        agree: whether the exit status is 0.
        end_tokens: those that end a response.
        problem: why not; left out where it is.
        config_changes: sentences on what config.json does not say."""

    folder: str
    architecture: str
    dtype: str
    parameters: int
    memory_bytes: int
    free_bytes: int
    tensors: int
    tokens: int | None
    template: bool
    compared: int
    tolerance: float
    megatron: float | str
    vllm: float | str
    agree: bool
    end_tokens: str = ""
    problem: str | None = None
    config_changes: list[str] = []
