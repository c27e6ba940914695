"""Responses to decide on, without a model."""

import asyncio

from megatron_r1.config.sample import KeepConfig
from megatron_r1.data.prompt import make_prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.sample.filter_settings import active_filters
from megatron_r1.sample.filters import first_objection
from megatron_r1.sample.selection import DUPLICATE, Decision, Selection

PROMPT = make_prompt("What is 6 x 7?", "math", "42", {})


def answer(index, accuracy=1.0, text=None, num_tokens=10, reward=None, **more):
    """A graded response in R1's form; accuracy None: not graded."""
    graded = {"rewards": {"accuracy": accuracy}, "reward": accuracy if reward is None else reward}
    return TextResponse(
        f"<think>Answer number {index}.</think>It is 42." if text is None else text,
        num_tokens,
        index=index,
        **(graded if accuracy is not None else {}),
        **more,
    )


def selection(keep=None, output="responses", filters=None, seed=0):
    """keep: settings, None where nothing is graded. The filters run in this process."""
    chosen = active_filters(output, filters or {})

    async def run_filters(prompt, response):
        name, why = first_objection(response, prompt, chosen)
        return Decision(name, why) if name else None

    settings = KeepConfig(**({"min_accuracy": None} if keep is None else keep))
    return Selection(settings, run_filters, DUPLICATE in chosen, seed)


def run_decide(decide, responses, prompt=PROMPT):
    """({index: code of its decision}, rows)"""
    result = asyncio.run(decide(prompt, responses))
    indices = (response.index for response in responses)
    codes = (decision.code for decision in result.decisions)
    return dict(zip(indices, codes, strict=True)), list(result.rows)
