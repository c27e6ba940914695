"""Prompts, templates, SFT examples and the samplers over them."""

import inspect
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import reasoning_gym
from r1_grading import logic
from refusals import raised, refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.rl_prompts import drop_long_prompts
from megatron_r1.commands.run_facts import describe_kind_weights
from megatron_r1.config import parse_recipe
from megatron_r1.config.data import DataConfig
from megatron_r1.data.prompt import Prompt, is_heldout, make_prompt, normalize_question
from megatron_r1.data.prompt_split import PromptSplit
from megatron_r1.data.prompt_templates import find_template, opens_thought, render_template
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.prompts import load_prompts, prompt_options
from megatron_r1.data.sampler import PromptSampler, drawn_fractions
from megatron_r1.data.sft import ExampleSampler, SFTExample, load_examples

SUMS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}


def write_lines(path, lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def questions(prompts):
    return [prompt.question for prompt in prompts]


def test_every_setting_of_the_recipe_reaches_the_loader():
    settings = {"path": "p.jsonl", "no_truth": ["?"], "bad_rows": "leave_out", "seed": 3}
    data = DataConfig(**settings, heldout_fraction=0.3, where={"level": 2}, columns={"truth": "a"})
    options = prompt_options(data)
    assert options == data.model_dump(exclude={"template"})
    assert options.keys() == inspect.signature(load_prompts).parameters.keys()


def test_a_file_becomes_prompts_with_their_fields(tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl",
        [
            {"question": "1 + 1?", "truth": 2},
            "",
            {"question": "Sort", "truth": None, "kind": "my.module:grade", "level": 3},
        ],
    )
    train = load_prompts(path=path, heldout_fraction=0.0).train
    assert [(p.question, p.kind, p.truth, p.fields) for p in train] == [
        ("1 + 1?", "math", 2, {}),
        ("Sort", "my.module:grade", None, {"level": 3}),
    ]
    assert len({p.id for p in train}) == 2 and train[0] == make_prompt("1 + 1?", "math", 2, {})


def test_columns_can_have_other_names(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"problem": "1 + 1?", "answer": "2", "source": "s"}])
    columns = {"question": "problem", "truth": "answer"}
    [prompt] = load_prompts(path=path, columns=columns, heldout_fraction=0.0).train
    assert (prompt.question, prompt.truth, prompt.fields) == ("1 + 1?", "2", {"source": "s"})
    with refused("columns.question", Cause.NOT_FOUND, f"{path}:1", "problm", "problem"):
        load_prompts(path=path, columns={"question": "problm"})
    with refused("columns.truth", Cause.NOT_FOUND, "'problme'") as caught:
        load_prompts(path=path, columns={"question": "problem", "truth": "problme"})
    assert "did you mean" not in str(caught.value)
    with refused("columns.questoin", Cause.UNKNOWN, "columns.question"):
        load_prompts(path=path, columns={"questoin": "problem", "truth": "answer"})


def test_a_system_prompt_in_a_column_stands_before_the_question(tmp_path):
    path = write_lines(tmp_path / "q.jsonl", [{"system": "Be.", "prompt": "1 + 1?", "answer": 2}])
    [prompt] = load_prompts(path=path, heldout_fraction=0.0).train
    assert prompt.messages_before == [{"role": "system", "content": "Be."}] and prompt.truth == 2


def test_a_context_joins_the_question_unless_the_recipe_maps_it(tmp_path):
    row = {"passage": "Tom has 2.", "question": "How many?", "answer": 2}
    path = write_lines(tmp_path / "q.jsonl", [row])
    for columns, asked in ({}, "Tom has 2.\n\nHow many?"), ({"question": "question"}, "How many?"):
        [prompt] = load_prompts(path=path, heldout_fraction=0.0, columns=columns).train
        assert prompt.question == asked
    write_lines(path, [row | {"question": "Tom has 2. How many?"}])
    assert questions(load_prompts(path=path, heldout_fraction=0.0).train) == [
        "Tom has 2. How many?"
    ]


def test_files_that_cannot_be_are_refused(tmp_path):
    for name, cause in (("absent.jsonl", Cause.NOT_FOUND), ("p.txt", Cause.UNSUPPORTED)):
        write_lines(tmp_path / "p.txt", ["a,b"])
        with refused("data.path", cause, tmp_path / name):
            load_prompts(path=tmp_path / name)
    with refused("data.path", Cause.EMPTY, "empty.jsonl"):
        load_prompts(path=write_lines(tmp_path / "empty.jsonl", []))
    with refused("data.path", Cause.MISSING):
        load_prompts()


@pytest.mark.parametrize(
    ("changes", "key", "cause", "shown"),
    [
        ({"task": "chainsum"}, "data.task", Cause.UNKNOWN, "chain_sum"),
        ({"parameters": {"terms": 1}}, "data.parameters.terms", Cause.UNKNOWN, "min_terms"),
        (
            {"parameters": {"min_terms": 3, "max_terms": 2}},
            *("data.parameters", Cause.OUT_OF_RANGE, "max_terms"),
        ),
        ({"num_train": None}, "data.num_train", Cause.MISSING, "data.num_heldout"),
        ({"heldout_fraction": 0.0}, "data.num_heldout", Cause.CONFLICT, "heldout_fraction"),
    ],
)
def test_tasks_that_cannot_be_are_refused(changes, key, cause, shown):
    settings = {"task": "chain_sum", "num_train": 1, "num_heldout": 1}
    with refused(key, cause, shown):
        load_prompts(**settings | changes)


def test_train_and_heldout_are_disjoint_whatever_the_seed_and_size():
    def load(**changes):
        settings = {"task": "chain_sum", "parameters": SUMS, "num_train": 500, "num_heldout": 60}
        return load_prompts(**settings | changes)

    first, neighbor, large = load(seed=1), load(seed=2), load(seed=9, num_train=2000)
    assert load(seed=1) == first
    assert questions(neighbor.train) != questions(first.train)
    heldout = {
        normalize_question(q) for split in (first, neighbor) for q in questions(split.heldout)
    }
    for split in (first, neighbor, large):
        train = [normalize_question(q) for q in questions(split.train)]
        assert len(set(train)) == len(train)
        assert heldout.isdisjoint(train)
    assert (len(large.train), len(large.heldout)) == (2000, 60)


def test_the_heldout_share_is_the_fraction_asked_for():
    share = sum(is_heldout(f"question {i}", 0.25) for i in range(4000)) / 4000
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5  # four standard errors


def test_spelling_does_not_make_another_question(tmp_path):
    rows = [{"question": q, "truth": 2} for q in ("1 +  1?", "1 + 1?", " １ + 1?\n", "1 + 2?")]
    path = write_lines(tmp_path / "p.jsonl", rows)
    assert questions(load_prompts(path=path, heldout_fraction=0.0).train) == ["1 +  1?", "1 + 2?"]
    other = write_lines(tmp_path / "h.jsonl", rows[2:3])
    split = load_prompts(path=path, heldout_path=other)
    assert (questions(split.train), len(split.heldout)) == (["1 + 2?"], 1)


def test_superscripts_and_subscripts_make_another_question(tmp_path):
    texts = ["What is 2³?", "What is 23?", "What is 2₃?", "2ᵏ⁻¹?", "2k-1?"]
    rows = [{"question": q, "truth": i} for i, q in enumerate(texts)]
    split = load_prompts(path=write_lines(tmp_path / "p.jsonl", rows), heldout_fraction=0.0)
    assert questions(split.train) == texts and not split.contradictions
    assert (
        normalize_question("What  is 2³?") == normalize_question("what is ２³?") == "what is 2^3?"
    )


def test_the_id_of_a_question_stays_the_same_between_versions():
    """Runs are continued and held-out questions are kept apart by it."""
    texts = {
        "1 + 1?": "c97c3a9c9b990740",
        "Größe １½ ℝ … ﬁ 你好\u3000？": "754336e4ba762c30",
        "$x^2_1$ at 90°": "2aecc831755cd212",
    }
    assert {text: make_prompt(text, "math", 1, {}).id for text in texts} == texts


def test_questions_beyond_the_held_out_ones_are_counted(tmp_path):
    rows = [{"question": f"{n} + 1 =", "truth": n + 1} for n in range(40)] * 2
    path = write_lines(tmp_path / "rows.jsonl", rows)
    split = load_prompts(path=path, heldout_fraction=0.5, num_heldout=3)
    report = split.reports[0]
    assert len(split.heldout) == 3 and report.num_unused == 40 - 3 - len(split.train) > 0
    assert report.num_duplicates == 40


def test_too_few_questions_is_an_error():
    one_digit = SUMS | {"max_terms": 2, "max_digits": 1}  # 10 x 10 operands, + or -
    with refused("data.num_train", Cause.TOO_LARGE, "chain_sum", 300):
        load_prompts(task="chain_sum", parameters=one_digit, num_train=300, num_heldout=5)
    everything = load_prompts(task="chain_sum", parameters=one_digit, num_train=150, num_heldout=5)
    assert len(everything.train) == 150


def test_task_prompts_are_json_and_score_full_marks_with_their_own_answer():
    for task in ("chain_sum", "knights_knaves", "arc_agi", "codeio"):
        split = load_prompts(task=task, num_train=2, num_heldout=0, heldout_fraction=0.0, seed=4)
        prompt = split.train[0]
        assert json.loads(json.dumps(prompt.fields)) == prompt.fields
        grade = logic.grade(f"<answer>{prompt.truth}</answer>", prompt.truth, **prompt.fields)
        assert (prompt.kind, grade.reward) == ("logic", 1.0), (task, grade.reason)


def test_a_task_can_be_graded_by_another_reward():
    split = load_prompts(
        task="chain_sum", parameters=SUMS, kind="math", seed=7, num_train=3, num_heldout=1
    )
    dataset = reasoning_gym.create_dataset("chain_sum", **SUMS, seed=7, size=50)
    answers = {item["question"]: item["answer"] for item in dataset}
    for prompt in split.train + split.heldout:
        assert (prompt.kind, prompt.truth, prompt.fields) == ("math", answers[prompt.question], {})


def make_prompts(num):
    return [make_prompt(f"question {i}", "math", i, {}) for i in range(num)]


def test_an_epoch_holds_every_prompt_once_and_the_next_is_shuffled_anew():
    prompts = make_prompts(7)
    sampler = PromptSampler(prompts, seed=1)
    epochs = [[p.truth for p in sampler.next(7)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = PromptSampler(prompts, seed=1)
    assert [p.truth for p in again.next(21)] == sum(epochs, [])
    assert [p.truth for p in PromptSampler(prompts, seed=2).next(21)] != sum(epochs, [])


@pytest.mark.parametrize("num_drawn", [0, 3, 7, 12, 70])
def test_a_sampler_continues_from_its_state(num_drawn):
    prompts = make_prompts(7)
    sampler = PromptSampler(prompts, seed=1)
    sampler.next(num_drawn)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = PromptSampler(prompts, seed=1)
    resumed.load_state_dict(state)
    assert resumed.next(20) == sampler.next(20)


def test_a_state_of_other_prompts_or_another_seed_is_refused():
    state = PromptSampler(make_prompts(7), seed=1).state_dict()
    with refused("data", Cause.CHANGED):
        PromptSampler(make_prompts(8), seed=1).load_state_dict(state)
    with refused("run.seed", Cause.CHANGED, 1, 2):
        PromptSampler(make_prompts(7), seed=2).load_state_dict(state)
    with raised(ValueError):
        PromptSampler([], seed=1)


def make_kinds(**sizes):
    return [
        make_prompt(f"{kind} {i}", kind, i, {}) for kind, size in sizes.items() for i in range(size)
    ]


def test_a_kind_of_weight_0_is_left_out_until_it_has_one():
    prompts = make_kinds(math=30, code=10, helpful=20)
    sampler = PromptSampler(prompts, seed=3)
    before = sampler.next_by_kind(80, {"helpful": 0})
    assert Counter(p.kind for p in before) == {"math": 60, "code": 20}  # two epochs of each
    assert Counter(p.id for p in before).most_common(1)[0][1] == 2
    state = json.loads(json.dumps(sampler.state_dict()))
    after = sampler.next_by_kind(120, {})
    resumed = PromptSampler(prompts, seed=3)
    resumed.load_state_dict(state)
    assert resumed.next_by_kind(120, {}) == after
    # What is left of the epoch, all of a kind that was passed over; then a whole one.
    left = len(prompts) - state["position"]
    assert {p.kind for p in after[:left]} <= {"helpful"}
    assert {p.id for p in after[left : left + 60]} == {p.id for p in prompts}


def test_no_weights_change_nothing_and_a_weight_is_a_share_of_each_epoch():
    prompts = make_kinds(math=3000, helpful=3000)
    plain = PromptSampler(prompts, seed=1).next(9000)
    assert PromptSampler(prompts, seed=1).next_by_kind(9000, {}) == plain
    drawn = PromptSampler(prompts, seed=1).next_by_kind(8000, {"math": 2.0, "helpful": 0.5})
    counts = Counter(p.kind for p in drawn)
    # A quarter of 3,000 next to 3,000; binomial, so within 5 deviations of sqrt(3000 / 4 * 3 / 4).
    assert counts["helpful"] / counts["math"] == pytest.approx(0.25, abs=5 * 23.7 / 3000)
    first_epoch, second = drawn[:3700], drawn[3800:7500]
    chosen = [{p.id for p in part if p.kind == "helpful"} for part in (first_epoch, second)]
    assert len(chosen[0] & chosen[1]) < 0.5 * len(chosen[0])  # others in each epoch


def test_weights_of_kinds_that_are_not_there_or_draw_nothing_are_refused():
    prompts = make_kinds(math=2, helpful=2)
    assert drawn_fractions(prompts, {"helpful": 3}) == {"helpful": 1, "math": 1 / 3}
    with refused("rl.kind_weights.helpfull", Cause.UNKNOWN, "helpful"):
        drawn_fractions(prompts, {"helpfull": 0})
    with refused("rl.kind_weights", Cause.EMPTY, 0):
        drawn_fractions(prompts, {"helpful": 0, "math": 0})
    schedule = [{"from_step": 7, "rl.kind_weights": {"code": 1.0}}]
    recipe = {"schedule": schedule, "kind_weights": {"helpful": 0}}
    with refused("rl.kind_weights.code", Cause.UNKNOWN, 7):
        describe_kind_weights(parse_recipe({"rl": recipe}), prompts)
    schedule[0]["rl.kind_weights"] = {"helpful": 0.5}
    lines = describe_kind_weights(parse_recipe({"rl": recipe}), prompts)
    shares = [re.findall(r"\d+\.\d%|math|helpful", line) for line in lines]
    assert shares == [["100.0%", "math", "0.0%", "helpful"], ["66.7%", "math", "33.3%", "helpful"]]
    assert describe_kind_weights(parse_recipe({}), prompts) == []


def test_templates_place_the_question_and_nothing_else():
    assert render_template("plain", "{x} + {question}?") == "User: {x} + {question}?\nAssistant:"
    assert render_template("Q {question} {A}", "1") == "Q 1 {A}"
    zero = render_template("r1_zero", "1 + 1?")
    assert zero.endswith("tags.\nUser: 1 + 1?\nAssistant:") and "<answer> </answer>" in zero
    with refused("data.template", Cause.UNKNOWN, "r1_zer0", "r1_zero", "plain", "chat"):
        render_template("r1_zer0", "1 + 1?")
    with refused("data.template", Cause.UNKNOWN, "{problem} is {question} now"):
        find_template("User: {problem}")
    with pytest.raises(ValueError, match="apply_chat_template"):
        find_template("chat")


def test_only_a_template_that_ends_in_a_thought_is_opened():
    assert opens_thought(render_template("{question}\nAssistant: <think>\n", "1 + 1?"))
    assert not opens_thought(render_template("r1_zero", "1 + 1?"))


def test_examples_load_and_a_bad_line_is_named(tmp_path):
    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(5)]
    path = write_lines(tmp_path / "s.jsonl", rows)
    examples = load_examples(path)
    assert examples == [SFTExample(f"p{i}", f"r{i}") for i in range(5)]
    sampler, resumed = ExampleSampler(examples, seed=0), ExampleSampler(examples, seed=0)
    assert sorted(example.prompt for example in sampler.next(5)) == [f"p{i}" for i in range(5)]
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.next(9) == sampler.next(9)
    bad = write_lines(tmp_path / "bad.jsonl", [*rows, {"prompt": "p"}])
    with refused("response", Cause.MISSING, f"{bad}:6"):
        load_examples(bad)
    with refused("sft.data", Cause.EMPTY):
        load_examples(write_lines(tmp_path / "none.jsonl", []))


def test_prompts_are_immutable():
    prompt = Prompt("id", "1 + 1?", "math", 2)
    with pytest.raises(AttributeError):
        prompt.truth = 3


def test_file_order_is_kept_epoch_after_epoch():
    examples = [SFTExample(str(i), "") for i in range(5)]
    sampler = ExampleSampler(examples, seed=3, shuffled=False)
    assert [e.prompt for e in sampler.next(12)] == list("012340123401")


def test_questions_longer_than_the_engines_room_are_left_out_and_told_of(capsys):
    """vLLM refuses a prompt as long as its context, which would end the run for good."""
    tokenizer = PromptTokenizer(
        str(Path(__file__).parents[3] / "examples/laptop/model"), "{question}"
    )
    short, long = (make_prompt("1 + 1 " * n, "math", "2", {}) for n in (2, 40))
    limit = len(tokenizer.encode(long.question))
    split = drop_long_prompts(PromptSplit([short, long], [long]), tokenizer, limit)
    assert (split.train, split.heldout) == ([short], [])
    assert str(limit) in capsys.readouterr().err
    assert drop_long_prompts(PromptSplit([long], []), tokenizer, limit + 1).train == [long]
    assert capsys.readouterr().err == ""
    with refused("data.path", Cause.TOO_LARGE, limit):
        drop_long_prompts(PromptSplit([long], []), tokenizer, limit)
