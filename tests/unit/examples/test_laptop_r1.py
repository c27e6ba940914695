"""The questions and replies of examples/laptop/r1.yaml, as its judge and its stages see them."""

import json
import re

import pytest

from examples.laptop.r1 import questions
from examples.laptop.r1.judge import is_safe, quality


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    questions.write(folder)
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*.jsonl")}
    return {name: [json.loads(line) for line in path.open()] for name, path in files.items()}


def test_replies_to_learn_from_are_right_and_leave_something_to_prefer(written):
    points = []
    for row in written["replies.jsonl"]:
        question = row["prompt"].removeprefix("User: ").removesuffix("\nAssistant: ")
        reply = re.search("<answer>(.*)</answer>", row["response"], re.DOTALL).group(1)
        assert is_safe(question, row["response"])
        points.append(quality(question, reply))
    assert set(points) == {2.0, 3.0, 4.0}  # right always; with name and wishes in a quarter
    assert points.count(4.0) / len(points) == pytest.approx(0.25, abs=0.08)


def test_the_last_part_asks_as_much_of_everyday_as_of_reasoning_and_nothing_held_out(written):
    kinds = [row["kind"] for row in written["all.jsonl"]]
    talk = sum(kind in ("helpful", "safety") for kind in kinds)
    assert talk > 400 and len(kinds) == 2 * talk
    hidden = {row["question"] for name in written if "heldout" in name for row in written[name]}
    asked = {row["question"] for row in written["all.jsonl"]}
    assert hidden and not hidden & asked
    replies = {row["prompt"] for row in written["replies.jsonl"]}
    assert not replies & {f"User: {question}\nAssistant: " for question in hidden}
