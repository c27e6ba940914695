"""Which rows a reward model is trained on, held out for, and spared."""

import importlib
import json
import shlex

import pytest
from r1_grading.reading import response_part
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.parts.supervised_training import resolve_steps
from megatron_r1.commands.reward_model import RowSampler, _next_commands, load_rows
from megatron_r1.config import Config
from megatron_r1.config.overrides import parse_overrides

HF = {"max_position_embeddings": 40, "pad_token_id": 0}


class Characters:
    """Stands in for the tokenizer: a character is a token, and the end is token 1."""

    def __init__(self, part="summary", end=1):
        self.part, self.end = part, end

    def encode(self, question, response, thought_opened):
        shown = response_part(response, self.part, thought_opened).text
        return None if shown is None else [*map(ord, question + shown), self.end]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


def config(path, **settings) -> Config:
    return Config.model_validate({"reward_model": {"data": str(path), **settings}})


def pairs(folder, *pairs):
    path = folder / "pairs.jsonl"
    rows = [{"question": q, "chosen": c, "rejected": r} for q, c, r in pairs]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_question_is_on_one_side_whatever_its_rows_and_spelling(tmp_path):
    made = [(f"Q{i}", "yes", "no") for i in range(60)] + [
        (f"  q{i} ", "oh", "no") for i in range(60)
    ]
    rows = load_rows(config(pairs(tmp_path, *made), heldout_fraction=0.3), Characters(), HF)
    train, heldout = ({row.question for row in side} for side in (rows.train, rows.heldout))
    assert len(rows.train) == 2 * len(train) and len(rows.heldout) == 2 * len(heldout)
    assert not train & heldout and 8 <= len(heldout) <= 30 and not rows.dropped_rows


def test_a_pair_is_two_samples_with_the_chosen_first(tmp_path):
    rows = load_rows(
        config(pairs(tmp_path, ("Q", "yes", "no")), heldout_fraction=0), Characters(), HF
    )
    (row,) = rows.train
    texts = [bytes(sample.token_ids[::4]) for sample in row.samples]
    assert texts == [b"Qyes\1", b"Qno\1"] and [s.label for s in row.samples] == [1.0, 0.0]
    assert [s.prompt_length for s in row.samples] == [5, 4]


def test_what_serving_would_not_score_is_left_out_and_counted(tmp_path):
    path = pairs(
        tmp_path,
        ("Q", "yes", "no"),
        ("Q", "<think>still", "no"),
        ("Q", "<think>a</think>same", "<think>b</think>same"),
        ("Q", "y" * 38, "no"),
        ("Q", "y" * 39, "no"),
    )
    rows = load_rows(config(path, heldout_fraction=0), Characters(), HF)
    assert [len(row.samples[0]) for row in rows.train] == [5, 40]
    assert dict(rows.dropped_rows) == {
        "a response has no summary to score": 1,
        "both responses have the same summary": 1,
        "a text is longer than 40 tokens": 1,
    }
    shorter = load_rows(config(path, heldout_fraction=0, max_tokens=20), Characters(), HF)
    assert len(shorter.train) == 1 and shorter.dropped_rows["a text is longer than 20 tokens"] == 2


def test_nothing_left_says_why(tmp_path):
    path = pairs(tmp_path, ("Q", "<think>a", "b"))
    with refused("reward_model.data", Cause.EMPTY, path):
        load_rows(config(path, heldout_fraction=0), Characters(), HF)
    with refused("reward_model.data", Cause.EMPTY, "heldout_fraction=1e-09"):
        load_rows(config(pairs(tmp_path, ("Q", "a", "b")), heldout_fraction=1e-9), Characters(), HF)


def test_a_text_that_ends_with_padding_is_refused(tmp_path):
    with refused("reward_model.template", Cause.CONFLICT, "pairs.jsonl:1", "pad_token_id"):
        load_rows(config(pairs(tmp_path, ("Q", "a", "b"))), Characters(end=0), HF)


def test_a_changed_label_is_not_the_data_a_checkpoint_was_made_of(tmp_path):
    def sampler(label):
        row = {"question": "Q", "response": "a", "label": label}
        (tmp_path / "labels.jsonl").write_text(json.dumps(row))
        settings = config(tmp_path / "labels.jsonl", kind="pointwise", heldout_fraction=0)
        assert settings.reward_model.scored_part == "response"
        return RowSampler(load_rows(settings, Characters("response"), HF).train, seed=0)

    state = sampler(1).state_dict()
    sampler(1).load_state_dict(state)
    with refused("data", Cause.CHANGED):
        sampler(0).load_state_dict(state)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_stages_of_language_models_refuse_a_score_head(stage):
    module = importlib.import_module(f"megatron_r1.commands.{stage}")
    with refused("model.head", Cause.CONFLICT):
        module.run(Config.model_validate({"model": {"path": "x", "head": "score"}}))


def test_epochs_are_steps_over_the_rows_that_are_left(tmp_path):
    path = pairs(tmp_path, *((f"Q{i}", "yes", "no") for i in range(10)))
    settings = config(path, heldout_fraction=0, epochs=1.5, batch_size=4)
    rows = load_rows(settings, Characters(), HF)
    assert resolve_steps(settings, "reward_model", len(rows.train)).run.steps == 4


@pytest.mark.parametrize(
    "template",
    [None, "Q: {question}\nA: {response}", """it's "{question}", $HOME: `{response}`\n"""],
)
def test_the_command_that_uses_the_model_has_its_template(template):
    recipe = Config.model_validate({"reward_model": {"template": template}})
    [command] = [text for what, text in _next_commands(recipe) if what == "use it as a reward"]
    verb, options = shlex.split(command)[:3], shlex.split(command)[3:]
    assert verb == ["megatron-r1", "rl", "RECIPE.yaml"]
    given = {"url": "http://127.0.0.1:8000", "model": "pairwise-rm"}
    given |= {} if template is None else {"template": template}
    assert parse_overrides(options) == {"rewards.options.helpful": given}
