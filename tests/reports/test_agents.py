"""Episodes: tokens that stay as they were sampled, and ends that are not the policy's."""

import json
from array import array

import pytest

from megatron_r1.agents.continuation import Continuation
from megatron_r1.agents.token_tree import TokenTree
from megatron_r1.base.errors import RunError
from megatron_r1.controller.rollouts.metrics import rollout_metrics
from megatron_r1.controller.rollouts.response_grader import check_grades
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group, Rollout
from megatron_r1.controller.rollouts.training_samples import training_samples
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.episodes import Episode
from megatron_r1.engines.server.responses import Response
from tests.harness.chat_tokenizer import QWEN3, chat_tokenizer

MERGING = (
    "{% for m in messages %}{% set before = loop.previtem.role if loop.previtem %}"
    "{% if m.role == 'tool' %}{% if before != 'tool' %}<|im_start|>user{% endif %}\n"
    "<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n' }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Several results in one turn of the user, as Qwen3's template writes them."""


class Session:
    """A conversation whose answers are written beforehand."""

    def __init__(self, template):
        self.tokenizer = chat_tokenizer(template)
        self.continuation, self.tree = Continuation(self.tokenizer), TokenTree()

    def ask(self, messages, answer, pieces=None):
        """Send a request; the answer's tokens are those of `pieces`, each by itself."""
        prompt = self.continuation.next_prompt(self.tree, messages)
        given = self.tree.add_prompt(prompt.parent, prompt.token_ids, prompt.messages, ())
        ids = [t for piece in pieces or [answer["content"]] for t in self.encode(piece)]
        ids = array("i", [*ids, self.tokenizer.eos_token_id])
        logprobs, versions = array("f", [-1.0] * len(ids)), array("i", [0] * len(ids))
        node = self.tree.add_sampled(given, Response(ids, logprobs, versions, "stop"), answer)
        return prompt, node

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def rendered(self, messages):
        return self.encode(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


def asked(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize("results", [["408"], ["408", "the answer"], ["", "", "next step"]])
def test_b25_results_in_a_row_have_the_tokens_of_the_whole_conversation(results):
    session = Session(MERGING)
    functions = [{"name": "calculate", "arguments": {"expression": str(i)}} for i in range(2)]
    calls = [{"id": f"c{i}", "type": "function", "function": f} for i, f in enumerate(functions)]
    answer = said("Use the tool.", tool_calls=calls)
    written = "".join(f"\n<tool_call>\n{json.dumps(f)}\n</tool_call>" for f in functions)
    session.ask([asked("u")], answer, pieces=[answer["content"] + written])
    new = [{"role": "tool", "tool_call_id": "c0", "content": text} for text in results]
    conversation = [asked("u"), answer, *new]
    prompt, _ = session.ask(conversation, said("Done."))
    assert prompt.parent is not None
    before = session.tree.token_ids(prompt.parent).tolist() + list(prompt.token_ids)
    assert before == session.rendered(conversation)


@pytest.mark.parametrize(
    "pieces", [["th", "e an", "swer"], ["the", " ", "answer"], list("the answer")]
)
def test_b26_sampled_ids_stay(pieces):
    session = Session(MERGING)
    answer = said("".join(pieces))
    _, node = session.ask([asked("u")], answer, pieces)
    sampled = session.tree.nodes[node].token_ids.tolist()
    assert sampled[:-1] != session.encode(answer["content"])
    prompt, _ = session.ask([asked("u"), answer, asked("go on")], said("Done."))
    assert prompt.parent == node
    whole = session.tree.token_ids(node).tolist()
    assert whole[-len(sampled) :] == sampled


def test_b26_a_thought_that_the_template_drops_begins_a_branch():
    session = Session(QWEN3)
    answer = said("The answer is 408.", reasoning_content="Let me think")
    thought = "<think>\nLet me think\n</think>\n\nThe answer is 408."
    session.ask([asked("u")], answer, [thought])
    conversation = [asked("u"), answer, asked("next")]
    prompt, _ = session.ask(conversation, said("Done."))
    assert prompt.parent is None and prompt.token_ids == session.rendered(conversation)
    assert len(session.tree.branches()) == 2


def graded_episode(tree, advantage=0.5):
    episode = Episode("done", [], tree.branches())
    graded = GradedResponse(episode.response(), "", {"accuracy": 1.0}, 1.0, "", episode=episode)
    group = Group(make_prompt("?", "environment", None, {}), [1], [graded])
    [samples] = training_samples([group], [[advantage]])
    return episode, samples


def test_b30_both_calls_stay_where_one_was_run():
    """parallel_tool_calls false: the tokens of the second call stay in the context.

    The next turn continues it, so that every token is trained in the context in which it was
    sampled."""
    session = Session(MERGING)
    functions = [{"name": "calculate", "arguments": {"expression": str(i)}} for i in range(2)]
    written = "".join(f"\n<tool_call>\n{json.dumps(f)}\n</tool_call>" for f in functions)
    kept = said("", tool_calls=[{"id": "c", "type": "function", "function": functions[0]}])
    _, node = session.ask([asked("u")], kept, [written])
    result = {"role": "tool", "tool_call_id": "c", "content": "408"}
    prompt, _ = session.ask([asked("u"), kept, result], said("Done."))
    assert prompt.parent == node
    text = session.tokenizer.decode(session.tree.token_ids(node))
    assert text.count('"expression"') == 2


@pytest.mark.parametrize("num_turns", [1, 3])
def test_b33_a_summary_begins_a_branch_and_the_weights_add_up(num_turns):
    session = Session(MERGING)
    conversation = [asked("u")]
    sampled = 0
    for turn in range(num_turns):
        answer = said(f"step {turn}")
        _, node = session.ask(conversation, answer)
        sampled += len(session.tree.nodes[node].token_ids)
        conversation += [answer, asked("go on")]
    summary = said("Let me think about the next step.")
    _, node = session.ask(conversation[:-1] + [asked("Use the tool")], summary)
    sampled += len(session.tree.nodes[node].token_ids)
    begun = [{"role": "system", "content": summary["content"]}, asked("go on")]
    prompt, node = session.ask(begun, said("The answer is 408."))
    assert prompt.parent is None
    sampled += len(session.tree.nodes[node].token_ids)
    prompt, node = session.ask([*begun, said("The answer is 408."), asked("next")], said("Done."))
    sampled += len(session.tree.nodes[node].token_ids)
    episode, samples = graded_episode(session.tree)
    assert len(samples) == 2 and {sample.outcome_advantage for sample in samples} == {0.5}
    assert sum(sample.weight for sample in samples) == pytest.approx(1.0)
    assert sum(sample.num_responses for sample in samples) == 1
    assert sum(branch.is_sampled.count(1) for branch in episode.branches) == sampled
    first, second = (session.tokenizer.decode(branch.token_ids) for branch in episode.branches)
    # The summary was sampled in the first branch, and is given to the second.
    assert summary["content"] in first and second.count(summary["content"]) == 1


def test_b32_an_answer_of_its_end_token_trains_and_one_of_none_does_not():
    prompt = make_prompt("?", "math", "4", {})

    def response(count):
        ids = array("i", [7] * count)
        return Response(ids, array("f", [-1.0] * count), array("i", [0] * count), "stop")

    graded = [GradedResponse(response(n), "", {"accuracy": 0.0}, 0.0, "") for n in (1, 0)]
    [one], [none] = training_samples([Group(prompt, [1, 2], graded)], [[1.0, -1.0]])
    assert one.is_trained and len(one) == 3
    assert not none.is_trained and len(none) == 2


@pytest.mark.parametrize(("num_failed", "stops"), [(0, False), (1, False), (6, True), (10, True)])
def test_b31_a_failing_environment_is_counted_and_stops_the_run(num_failed, stops):
    """ConnectionError in 60% of the episodes: none of them is a reward of 0."""
    empty = Response(array("i"), array("f"), array("i"), "stop")
    failed = Episode("environment_error", [], [], reason="ConnectionError: refused")
    lost = GradedResponse(
        empty, "", {"accuracy": 0.0}, 0.0, failed.reason, ("accuracy",), False, episode=failed
    )
    fine = GradedResponse(empty, "", {"accuracy": 1.0}, 1.0, "", episode=Episode("done", [], []))
    rows = [lost] * num_failed + [fine] * (10 - num_failed)
    groups = [Group(make_prompt("?", "environment", None, {}), [1], rows)]
    metrics = rollout_metrics(Rollout(groups, 1.0, 1.0), policy_version=0)
    assert metrics["episode/status/environment_error"] == num_failed / 10
    assert metrics["reward/mean"] == (1.0 if num_failed < 10 else 0.0)
    if not stops:
        return check_grades(groups, 0.1)
    with pytest.raises(RunError, match=rf"{num_failed} of 10 .*environment_error.*refused"):
        check_grades(groups, 0.1)
