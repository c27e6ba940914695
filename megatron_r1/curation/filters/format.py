"""Responses without the form that the next model is to learn."""

from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.rewards.answer import ANSWER, END_ANSWER, END_THINK, THINK
from megatron_r1.rewards.format import grade

FORMS = ("either", "answer_tags", "summary")


def broken_format(response: TextResponse, prompt: Prompt, *, form: str = "either") -> str:
    """Drop a response that is not of the form `form`, or whose thought or summary is empty.

    form: "answer_tags": `<think>…</think><answer>…</answer>`, as R1-Zero writes it; "summary":
    `<think>…</think>` and plain text, as R1 does; "either". An empty thought would teach the model
    not to think. Raises ValueError for another form.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    text = response.whole.strip()
    for tag in (THINK, END_THINK):
        if (num_found := text.count(tag)) != 1:
            return f"{tag} occurs {num_found} times"
    thought, _, rest = text.partition(END_THINK)
    if not thought.startswith(THINK):
        return f"text before {THINK}"
    if not thought.removeprefix(THINK).strip():
        return "the thought is empty"
    has_tags = ANSWER in rest or END_ANSWER in rest
    if has_tags and form == "summary":
        return f"{ANSWER} in the summary"
    if has_tags or form == "answer_tags":
        verdict = grade(response.text, opened=response.opened)
        if not verdict.reward:
            return verdict.reason
        rest = rest.replace(ANSWER, "").replace(END_ANSWER, "")
    return "" if rest.strip() else "nothing follows the thought"
