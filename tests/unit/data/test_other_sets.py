"""Rows of further public data sets, as `init` takes them: what is asked, compared and learned."""

import json
from pathlib import Path

import pytest
from r1_grading.code.problem import parse_problem
from r1_grading.truths import accepted_answers, math_truth

from megatron_r1.base.errors import UserError
from megatron_r1.commands.init.supervised_drafts import are_examples
from megatron_r1.data.columns import guess_columns
from megatron_r1.data.preferences import read_preferences
from megatron_r1.data.prompts import load_prompts
from megatron_r1.data.rows import read_canonical_rows
from megatron_r1.data.sft import has_loss, load_examples

LINES = (Path(__file__).parents[2] / "shapes/other_sets.jsonl").read_text(encoding="utf-8")
SETS = {case["set"]: case for case in map(json.loads, LINES.splitlines())}


def of_verb(verb):
    return [name for name, case in SETS.items() if case["verb"] == verb]


@pytest.fixture
def path(request, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, SETS[request.param]["rows"])))
    return path


def each(verb):
    return pytest.mark.parametrize(
        ("path", "case"), [(name, SETS[name]) for name in of_verb(verb)], indirect=["path"]
    )


def read_as_init_does(path):
    rows = [row for _, row in read_canonical_rows(path)]
    columns = guess_columns(str(path), rows)
    names = {"question": columns.question} | ({"truth": columns.truth} if columns.truth else {})
    renamed = {ours: theirs for ours, theirs in names.items() if ours != theirs}
    return load_prompts(path=path, heldout_fraction=0.0, columns=renamed, kind=columns.kind)


def stated(prompt):
    if prompt.kind == "code":
        return len(parse_problem(prompt.truth, prompt.fields.get("language")).tests)
    return math_truth(accepted_answers(prompt.truth)[0])


@each("rl")
def test_questions_and_truths_are_found(path, case):
    assert not are_examples(case["rows"])
    split = read_as_init_does(path)
    wanted = [math_truth(t) if isinstance(t, str) else t for t in case["truths"]]
    assert [stated(prompt) for prompt in split.train] == wanted
    kinds = {prompt.kind for prompt in split.train}
    assert kinds == ({case["kind"]} if "kind" in case else {"math", "code"})
    assert case.get("asks", "") in split.train[0].question
    assert sum(rows.count for rows in split.reports[0].left_out.values()) == case.get("left_out", 0)


@each("sft")
def test_the_assistant_s_texts_are_learned(path, case):
    assert are_examples(case["rows"])
    [example] = load_examples(path)
    learned = [m for m in example.messages[example.first_loss_message :] if has_loss(m)]
    texts = [
        m["tool_calls"][0]["function"]["name"] if m.get("tool_calls") else m["content"]
        for m in learned
    ] or [example.response[1:]]  # a text is learned from its second token on
    assert texts == case["learned"]


@each("pref")
def test_pairs_are_of_one_question(path, case):
    [pair] = read_preferences(path, "pairwise")
    assert pair.question == "Hi" and pair.responses[0].startswith("Hello")


@each("refused")
def test_what_is_not_read_is_named(path, case):
    with pytest.raises(UserError) as refused:
        read_as_init_does(path)
    assert all(shown in str(refused.value) for shown in case["shows"])
