import json
import random
import re

from examples.laptop import make_corpus
from megatron_r1 import config as configuration
from megatron_r1.data.prompts import load_prompts, prompt_options

STEP = re.compile(r"(-?\d+) ([+-]) (\d) = (-?\d+)")


def test_worked_examples_are_right_in_every_step_and_in_the_answer():
    draw = random.Random(1)
    for _ in range(300):
        text, terms = make_corpus.question(draw)
        response = make_corpus.worked(draw, terms)
        steps = STEP.findall(response)
        assert len(steps) == make_corpus.TERMS - 1
        for left, sign, right, result in steps:
            assert int(left) + (int(right) if sign == "+" else -int(right)) == int(result)
        expression = text.split(": ")[1].removesuffix(" =")
        assert response.endswith(f"<answer>{eval(expression)}</answer>")


def test_questions_are_worded_as_the_recipe_asks_them_and_none_is_held_out(tmp_path, monkeypatch):
    recipe = configuration.load_recipe("examples/laptop/r1_zero.yaml")
    prompts = load_prompts(**prompt_options(recipe.data))
    monkeypatch.setattr(make_corpus, "NUM_WORKED", 3_000)
    monkeypatch.setattr(make_corpus, "NUM_MIXED", 3_000)
    monkeypatch.setattr("sys.argv", ["make_corpus", str(tmp_path / "out.jsonl"), "--seed", "5"])
    make_corpus.main()
    corpus = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    asked = {example["prompt"] for example in corpus}
    heldout = {recipe.data.template.replace("{question}", p.question) for p in prompts.heldout}
    trained = {recipe.data.template.replace("{question}", p.question) for p in prompts.train}
    assert not asked & heldout
    assert len(asked & trained) > len(trained) / 2, "the corpus words its questions differently"
