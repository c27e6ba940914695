"""`python -m megatron_r1.commands.check_model.reference FOLDER DTYPE MTP PLAIN OUT`: a model folder
alone.

Every tensor is read once or named, the tokenizer fits the model and gives texts back, and
transformers computes the log-probabilities of a few token sequences. MTP: `model.mtp`. OUT gets
`ReferenceResult` as JSON; PLAIN gets a copy of a quantized folder that transformers and vLLM can
load. A mistake ends the process with its message."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.commands.check_model.results import ReferenceFailure, ReferenceResult
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.transformers_model import load_with_transformers
from megatron_r1.models.weights.formats.dequantized_folder import write_dequantized
from megatron_r1.models.weights.formats.hf_folder import HFWeights

TEXTS = (
    "What is the capital of France?",
    "The sum of 59 and 63 is 122.",
    "def f(x):\n    return x ** 2\n\n",
    "Ä ü ß 漢字 \u2200x \U0001f600",
)
RANDOM_LENGTHS = (48, 17)
PROBE_QUESTION = "What is 2 + 3?"


def main(folder: Path, dtype: str, with_mtp: bool, plain_folder: Path) -> ReferenceResult:
    """Return what was found.

    Args:
        folder: the model's Hugging Face folder.
        dtype: the dtype that it is computed in.
        with_mtp: whether MTP layers must be there.
        plain_folder: the folder that a copy with plain weights is written to where transformers
            needs one.

    Raises:
        UserError: for what does not fit."""
    hf_config = read_hf_config(folder, key="HF_FOLDER")
    with HFWeights(folder, hf_config) as weights:
        weights.check(with_mtp)
        weights.check_repeated()
        num_tensors = len(weights.tensors)
        if hf_config.get("quantization_config"):
            write_dequantized(weights, plain_folder)
    tokenizer = _load_fitting_tokenizer(folder, hf_config["vocab_size"])
    # Texts reach tokens that are usual, random ids all others.
    draw = random.Random(0)
    sequences = [draw.choices(range(hf_config["vocab_size"]), k=n) for n in RANDOM_LENGTHS]
    if tokenizer is not None:
        sequences += [tokenizer.encode(text) for text in TEXTS]
    sequences = [ids for ids in sequences if len(ids) > 1]
    source = plain_folder if plain_folder.exists() else folder
    exact = _compute_logprobs(source, hf_config, torch.float32, sequences)
    logprobs = (
        exact
        if dtype == "float32"
        else _compute_logprobs(source, hf_config, getattr(torch, dtype), sequences)
    )
    noise = max((a - b).abs().max().item() for a, b in zip(exact, logprobs, strict=True))
    return ReferenceResult(
        num_tensors,
        None if tokenizer is None else len(tokenizer),
        getattr(tokenizer, "chat_template", None) is not None,
        sequences,
        [values.tolist() for values in logprobs],
        noise,
    )


def _load_fitting_tokenizer(folder: Path, vocab_size: int) -> Any:
    """Return the folder's tokenizer, or None where it has no files of one.

    Raises:
        UserError: the tokenizer does not fit the model or loses text.
    """
    if not any(folder.glob("tokenizer*")):
        return None
    tokenizer = load_tokenizer(str(folder), "HF_FOLDER")
    largest_id = max(tokenizer.get_vocab().values())
    if largest_id >= vocab_size:
        raise UserError(
            f"{folder}: the tokenizer's token {tokenizer.convert_ids_to_tokens(largest_id)!r} has "
            f"id {largest_id}, but the model has vocab_size={vocab_size}: "
            f"{_suggest_remedy(folder, tokenizer, largest_id)}",
            key="tokenizer",
            cause=Cause.CONFLICT,
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: the tokenizer has no eos_token, so no response would end; set it in "
            "tokenizer_config.json",
            key="tokenizer",
            cause=Cause.MISSING,
        )
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        round_trip = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if round_trip.strip() != text.strip() and tokenizer.unk_token_id not in ids:
            raise UserError(
                f"{folder}: the tokenizer turns {text!r} into {round_trip!r}",
                key="tokenizer",
                cause=Cause.CONFLICT,
            )
    if tokenizer.chat_template is not None:
        _check_template(folder, tokenizer)
    return tokenizer


def _suggest_remedy(folder: Path, tokenizer: Any, last: int) -> str:
    """Return what to do about the token `last`, which the model does not have."""
    token, file = tokenizer.convert_ids_to_tokens(last), folder / "tokenizer.json"
    if file.is_file() and Tokenizer.from_file(str(file)).token_to_id(token) is None:
        names = [name for name, value in tokenizer.special_tokens_map.items() if value == token]
        return (
            f"it is not in tokenizer.json, {type(tokenizer).__name__} of transformers adds it as "
            f"{' and '.join(names)}: name a token of yours as such in tokenizer_config.json"
        )
    return "use the tokenizer that the model was trained with"


def _check_template(folder: Path, tokenizer: Any) -> None:
    """Raise UserError unless the chat template has the question in it, and its text has the same
    tokens as the template itself."""
    messages = [{"role": "user", "content": PROBE_QUESTION}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # a template is a program, and may raise anything
        raise UserError(
            f"{folder}: the chat template fails: {error}; correct it",
            key="chat_template",
            cause=Cause.FAILED,
        ) from error
    if PROBE_QUESTION not in text:
        raise UserError(
            f"{folder}: the chat template leaves out the question: {text!r}",
            key="chat_template",
            cause=Cause.CONFLICT,
        )
    if list(ids) != tokenizer.encode(text, add_special_tokens=False):
        raise UserError(
            f"{folder}: the chat template's text has other tokens than the template",
            key="chat_template",
            cause=Cause.CONFLICT,
        )


def _compute_logprobs(
    folder: Path, hf_config: HFConfig, dtype: torch.dtype, sequences: list[list[int]]
) -> list[torch.Tensor]:
    """Return transformers' log-probability of each token but the first, (n - 1,) fp32, for each
    sequence of n.

    Args:
        folder: the model's folder.
        hf_config: its `config.json`.
        dtype: the dtype that the model computes in.
        sequences: token ids."""
    model = load_with_transformers(folder, hf_config, dtype).eval()
    sequence_logprobs = []
    with torch.no_grad():
        for ids in sequences:
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
            sequence_logprobs.append(
                logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            )
    if not all(values.isfinite().all() for values in sequence_logprobs):
        bad = [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
        reason = f"NaN or infinite numbers are in {', '.join(bad[:4])}" if bad else "they overflow"
        raise UserError(
            f"{folder}: transformers computes no log-probabilities in {dtype}: {reason}; fetch or "
            "write the weights again",
            key="weights",
            cause=Cause.MALFORMED,
        )
    return sequence_logprobs


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        answers = main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] != "none", Path(sys.argv[4]))
    except UserError as error:
        failure = ReferenceFailure(str(error), error.key, error.cause)
        Path(sys.argv[5]).write_bytes(msgspec.json.encode(failure))
        sys.exit(str(error))
    Path(sys.argv[5]).write_bytes(msgspec.json.encode(answers))
