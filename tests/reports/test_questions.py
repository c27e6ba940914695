"""Which questions are one: those of one text, but for blanks and spellings of its characters."""

import json

import pytest

from megatron_r1.data.prompts import load_prompts


def rows(path, *pairs):
    path.write_text("".join(json.dumps({"question": q, "truth": t}) + "\n" for q, t in pairs))
    return str(path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("find A", "find a"),
        ("What is X + x?", "What is x + x?"),
        ("Convert 3 MW to W.", "Convert 3 mW to W."),
        ("Straße", "STRASSE"),
    ],
)
def test_questions_that_differ_in_case_are_two(one, other, tmp_path):
    prompts = load_prompts(
        path=rows(tmp_path / "q.jsonl", (one, "1"), (other, "2")), heldout_fraction=0.0
    )
    assert {p.question: p.truth for p in prompts.train} == {one: "1", other: "2"}
    assert prompts.contradictions == [] and len({p.id for p in prompts.train}) == 2


def test_questions_that_differ_in_blanks_are_one(tmp_path):
    prompts = load_prompts(
        path=rows(tmp_path / "q.jsonl", ("find  A\n", "1"), (" find A", "1")), heldout_fraction=0.0
    )
    assert len(prompts.train) == 1


def test_near_spellings_are_not_trained_on_and_held_out(tmp_path):
    train = rows(tmp_path / "q.jsonl", ("Find A", "1"), ("add 2 and 2", "4"))
    heldout = rows(tmp_path / "h.jsonl", ("find a", "2"))
    prompts = load_prompts(path=train, heldout_path=heldout, heldout_fraction=0.0)
    assert [p.question for p in prompts.train] == ["add 2 and 2"]
    pairs = [(f"{word} {i}", "1") for i in range(60) for word in ("Find A", "find a")]
    split = load_prompts(path=rows(tmp_path / "m.jsonl", *pairs), heldout_fraction=0.5)
    sides = [{p.question.casefold() for p in side} for side in (split.train, split.heldout)]
    assert not sides[0] & sides[1] and len(split.train) + len(split.heldout) == 120
