"""The work of both systems: questions, limits, reward, algorithm and a Qwen2-shaped model.

Of the algorithm it is the part that they share; the model's responses have the lengths of
reasoning: most short, a few very long.

Weights are random except for two features of the residual stream that no layer writes to: a
constant, and the kind of the last token, plain or dwelling. The head reads these two, so that the
probability of the end token is about `Tail.end` after a plain token and `Tail.end_dwelling` after
a dwelling one, and the probability of a first dwelling token is `Tail.dwell`. Lengths follow a
two-state Markov chain, the same for every system that samples from the folder."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.base.files.json_lines import write_lines
from tools.bench.small_models import END, qwen2, write_folder


@dataclass(frozen=True)
class StepWork:
    """One setting. A step samples `questions` x `group` responses of at most `limit` tokens, then
    makes `minibatches` fp32 updates.

    Attributes:
        limit: the most tokens of a response.
        questions: questions of a step.
        group: responses to each.
        minibatches: updates of a step.
        kl_beta: weight of the KL to a reference model; at 0 neither system has a reference model.
        temperature: the sampling temperature.
        clip: ε on both sides.
        learning_rate: Adam's.
        peer_microbatch: responses in one of TRL's forward and backward passes; 0: all of an update.
    """

    limit: int
    questions: int = 16
    group: int = 16
    minibatches: int = 1
    kl_beta: float = 0.0
    temperature: float = 1.0
    clip: float = 0.2
    # So small that response lengths do not change while steps are measured.
    learning_rate: float = 1e-7
    peer_microbatch: int = 0

    @property
    def num_responses(self) -> int:
        return self.questions * self.group


def write_questions(path: Path, count: int, seed: int = 0) -> Path:
    """Write sums of two to four numbers as JSONL: prompts of unequal length.

    Args:
        path: the file.
        count: the number of questions.
        seed: the seed of the numbers."""
    draw, rows = random.Random(seed), []
    kind = "tools.bench.step.work:grade"
    for _ in range(count):
        numbers = range(draw.randrange(2, 5))
        terms = [str(draw.randrange(1, 10 ** draw.randrange(1, 5))) for _ in numbers]
        rows.append({"question": f"{' + '.join(terms)} =", "truth": "0", "kind": kind})
    return write_lines(path, rows)


def reward(response: str) -> float:
    """Return the parity of the length: free to compute, and different within a group."""
    return float(len(response) % 2)


def grade(response: str, truth: str, **entry: object) -> Any:
    """Return `reward` as megatron-r1 takes it, for the questions' "kind"."""
    from r1_grading import Grade  # here, as TRL's interpreter need not have it

    return Grade(reward(response), "parity of its length")


SPECIAL_TOKENS = 3  # the end token is the only one of them that is sampled
NEVER = -40.0  # a logit
# Both features; others have standard deviation 1. So large that the RMS norm hardly depends on the
# others.
FEATURE = 30.0
WORD_STD = 0.5  # about the standard deviation of the other tokens' logits


@dataclass(frozen=True)
class Tail:
    """Probabilities per token.

    Attributes:
        end: the probability that a plain response ends.
        end_dwelling: the probability that a dwelling response ends.
        dwell: the probability of going from plain to dwelling, which is final."""

    end: float = 1 / 20
    end_dwelling: float = 1 / 150
    dwell: float = 1 / 200


def write_model(folder: Path, tail: Tail, seed: int = 0) -> Path:
    """Write such a model with the laptop's tokenizer; return its folder.

    Args:
        folder: the folder to make.
        tail: the probabilities that decide how long responses are.
        seed: the seed of the weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = qwen2(hidden=128, layers=4, heads=4)
    write_folder(folder, config)
    vocabulary = config["vocab_size"]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, weight.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[:2] = 0.0
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.normal_()
        embedding[:, 0], embedding[:, 1] = FEATURE, FEATURE * _token_kinds(vocabulary)
        text = torch.randint(SPECIAL_TOKENS, vocabulary, (8, 64))
        constant = model.model(text).last_hidden_state[..., 0].mean()
        _write_chances(head, tail, float(constant))
    model.save_pretrained(folder)
    # As it was, without the entries that transformers adds.
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def _token_kinds(vocabulary: int) -> Any:
    """Return (vocabulary,): -1 for plain tokens, 1 for dwelling ones, the later half."""
    import torch

    return torch.where(torch.arange(vocabulary) < vocabulary // 2, -1.0, 1.0)


def _write_chances(head: Any, tail: Tail, constant: float) -> None:
    """Fill `head` (vocabulary, hidden) so that each next token has its probability.

    Args:
        head: the matrix to fill.
        tail: the chances of ending and of dwelling.
        constant: the first feature after the last norm, also the second's absolute value."""
    import torch

    kinds = _token_kinds(len(head))
    kinds[:SPECIAL_TOKENS] = 0
    num_plain, num_dwelling = (kinds == -1).sum(), (kinds == 1).sum()
    after_plain = torch.full((len(head),), NEVER)
    after_dwelling = after_plain.clone()
    after_plain[kinds == -1] = torch.log((1 - tail.end) * (1 - tail.dwell) / num_plain)
    after_plain[kinds == 1] = torch.log((1 - tail.end) * tail.dwell / num_dwelling)
    after_dwelling[kinds == 1] = torch.log((1 - tail.end_dwelling) / num_dwelling)
    after_plain[END], after_dwelling[END] = math.log(tail.end), math.log(tail.end_dwelling)
    head.normal_(0.0, WORD_STD * head.shape[1] ** -0.5)
    head[:, 0] = (after_dwelling + after_plain) / 2 / constant
    head[:, 1] = (after_dwelling - after_plain) / 2 / constant
