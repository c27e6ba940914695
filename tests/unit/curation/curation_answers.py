"""Answers to decide about, made without a model."""

import asyncio

from megatron_r1.config.sample import KeepConfig
from megatron_r1.curation.candidate import Candidate
from megatron_r1.curation.filters import DUPLICATE, filters_of, first_objection
from megatron_r1.curation.selection import Decision, Selection
from megatron_r1.data.prompts import make_prompt

PROMPT = make_prompt("What is 6 x 7?", "math", "42", {})


def answer(index, accuracy=1.0, text=None, num_tokens=10, reward=None, **more):
    """A graded answer in R1's form; accuracy None: not graded."""
    graded = {"rewards": {"accuracy": accuracy}, "reward": accuracy if reward is None else reward}
    return Candidate(
        index,
        f"<think>Answer number {index}.</think>It is 42." if text is None else text,
        num_tokens,
        **(graded if accuracy is not None else {}),
        **more,
    )


def selection(keep=None, output="answers", filters=None, seed=0):
    """keep: settings, None where nothing is graded. The filters run in this process."""
    chosen = filters_of(output, filters or {})

    async def objection(prompt, candidate):
        name, why = first_objection(candidate, prompt, chosen)
        return Decision(name, why) if name else None

    settings = KeepConfig(**({"min_accuracy": None} if keep is None else keep))
    return Selection(settings, objection, DUPLICATE in chosen, seed)


def curate(curator, candidates, prompt=PROMPT):
    """({index: code of its decision}, rows)"""
    curated = asyncio.run(curator(prompt, candidates))
    indices = (candidate.index for candidate in candidates)
    decided = (decision.code for decision in curated.decisions)
    return dict(zip(indices, decided, strict=True)), list(curated.rows)
