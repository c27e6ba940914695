"""B63: a number or truth value has one meaning in every place of a recipe, or is refused there."""

import pytest
import yaml

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import algorithms
from megatron_r1.config.algorithms import AlgorithmRules
from megatron_r1.config.overrides import parse_overrides
from megatron_r1.config.recipe_files import load_recipe
from megatron_r1.config.yaml_text import dump_yaml, format_value, parse_value

RULES = AlgorithmRules(options={"rate": 0.5, "count": 3, "switch": False, "word": "a"})
FLOATS = {
    "optimizer.learning_rate": lambda c: c.optimizer.learning_rate,
    "rl.clip_low": lambda c: c.rl.clip_low,
    "rl.kind_weights.sums": lambda c: c.rl.kind_weights["sums"],
    "rl.options.rate": lambda c: RULES.read_options(c.rl.options)["rate"],
    "rewards.weights.format": lambda c: c.rewards.weights["format"],
    "rewards.weights.language.weight": lambda c: c.rewards.weights["language"].weight,
    "model.lora.alpha": lambda c: c.model.lora.alpha,
}
INTS = {
    "rl.group_size": lambda c: c.rl.group_size,
    "rl.options.count": lambda c: RULES.read_options(c.rl.options)["count"],
    "rewards.weights.language.from_step": lambda c: c.rewards.weights["language"].from_step,
    "rewards.options.repetition.window": lambda c: c.rewards.options["repetition"]["window"],
    "run.steps": lambda c: c.run.steps,
}
BOOLS = {
    "rl.dynamic_sampling": lambda c: c.rl.dynamic_sampling,
    "rl.options.switch": lambda c: RULES.read_options(c.rl.options)["switch"],
    "rewards.options.repetition.mask_numbers": lambda c: c.rewards.options["repetition"][
        "mask_numbers"
    ],
}
TEXTS = {
    "data.columns.truth": lambda c: c.data.columns["truth"],
    "run.folder": lambda c: c.run.folder,
    "rl.options.word": lambda c: RULES.read_options(c.rl.options)["word"],
}
PLACES = {**FLOATS, **INTS, **BOOLS, **TEXTS}
BESIDE = {"rewards.weights.language.from_step": ("rewards.weights.language.weight", "0.5")}


@pytest.fixture(autouse=True)
def own_algorithm(monkeypatch):
    monkeypatch.setitem(algorithms.ALGORITHMS, "own", RULES)


def recipe(key, text):
    """Return a recipe's YAML with `key: text`, as a user writes it."""
    given = dict([(key, text), *([BESIDE[key]] if key in BESIDE else [])])
    if key.startswith("rl.options"):
        given["rl.algorithm"] = "own"
    tree = {}
    for dotted in given:
        here = tree
        for part in dotted.split("."):
            here = here.setdefault(part, {})

    def lines(tree, prefix, indent):
        for name, inner in tree.items():
            path = f"{prefix}{name}"
            yield " " * indent + f"{name}:" + ("" if inner else f" {given[path]}")
            yield from lines(inner, f"{path}.", indent + 2)

    return "\n".join(lines(tree, "", 0)) + "\n"


def value_of(key, text, tmp_path):
    """Return what the text means at `key`: in a recipe and on the command line, where it must be
    the same; Cause.MALFORMED or OUT_OF_RANGE where it is refused in both."""
    found = []
    path = tmp_path / "recipe.yaml"
    for is_file in (True, False):
        options = [f"--{key}={text}"]
        if key in BESIDE:
            options.append("--{}={}".format(*BESIDE[key]))
        if key.startswith("rl.options"):
            options.append("--rl.algorithm=own")
        path.write_text(recipe(key, text) if is_file else "{}\n")
        try:
            found.append(
                PLACES[key](load_recipe(path, {} if is_file else parse_overrides(options)))
            )
        except UserError as error:
            assert key.split(".")[-1] in str(error), error
            found.append((error.cause, str(error)))
    file, line = (each[0] if isinstance(each, tuple) else each for each in found)
    assert (type(file), file) == (type(line), line), found
    return found[0]


def is_refused(found, *shown):
    return isinstance(found, tuple) and all(text in found[1] for text in shown)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-1", 0.1), ('"1e-1"', 0.1), ("'0.25'", 0.25), (".5", 0.5), ("5E-1", 0.5)),
        *(("+1e-1", 0.1), ("1", 1.0), ("1.", 1.0), ("0.000_1", 1e-4), ("1.0e-1", 0.1)),
    ],
)
def test_a_fraction_is_the_same_everywhere(tmp_path, text, value):
    for key in FLOATS:
        found = value_of(key, text, tmp_path)
        assert (type(found), found) == (float, value) or (type(found), found) == (int, value), key


@pytest.mark.parametrize(
    ("text", "value"),
    [("8", 8), ('"8"', 8), ("8.0", 8), ("8e0", 8), ("1_000", 1000), ("1e3", 1000), ('"1e3"', 1000)],
)
def test_a_whole_number_is_the_same_everywhere(tmp_path, text, value):
    for key in INTS:
        found = value_of(key, text, tmp_path)
        assert (type(found), found) == (int, value), key


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        *(("010", "write 10"), ('"010"', "write 10"), ("0x10", "write 16"), ("0o17", "write 15")),
        *(("0b11", "write 3"), ("00.5", "write 0.5"), ("1,5", "write 1.5"), ("50%", "write 0.5")),
        *(("1:30", "1:30"), ("inf", "inf"), ("nan", "nan"), ("1e-", "1e-"), ("ten", "ten")),
        *((".inf", ""), (".nan", ""), ("1e400", ""), ("[1]", ""), ('""', "")),
        *(("yes", "truth value"), ("true", "truth value"), ("off", "truth value")),
    ],
)
def test_what_is_no_number_is_refused_everywhere(tmp_path, text, meant):
    for key in (*FLOATS, *INTS):
        found = value_of(key, text, tmp_path)
        assert is_refused(found, meant), (key, found)


@pytest.mark.parametrize("text", ["1.5", "15e-1", '"1.5"'])
def test_a_fraction_is_no_whole_number(tmp_path, text):
    for key in INTS:
        assert is_refused(value_of(key, text, tmp_path), "1.5"), key


@pytest.mark.parametrize(
    ("text", "value"),
    [("yes", True), ("no", False), ("On", True), ("off", False), ("TRUE", True)]
    + [('"yes"', True), ('"False"', False), ("true", True)],
)
def test_a_truth_value_is_the_same_everywhere(tmp_path, text, value):
    for key in BOOLS:
        assert value_of(key, text, tmp_path) is value, key


@pytest.mark.parametrize("text", ["1", "0", "y", '"1"', "1.0", "maybe", "t"])
def test_other_words_and_numbers_are_no_truth_values(tmp_path, text):
    for key in BOOLS:
        assert is_refused(value_of(key, text, tmp_path), "true or false"), key


@pytest.mark.parametrize(
    ("text", "value"),
    [('"1e-6"', "1e-6"), ("'yes'", "yes"), ("010", "010"), ("1:30", "1:30"), ("0x10", "0x10")]
    + [("2024-01-01", "2024-01-01"), ('"12"', "12"), ("1e", "1e")],
)
def test_text_is_the_text_that_was_written(tmp_path, text, value):
    for key in TEXTS:
        assert value_of(key, text, tmp_path) == value, key


@pytest.mark.parametrize("text", ["12", "1e-6", "yes", "off", "1_000", ".5"])
def test_numbers_and_truth_values_are_text_in_quotes_only(tmp_path, text):
    for key in TEXTS:
        assert is_refused(value_of(key, text, tmp_path), "quotes"), key


def test_null_is_refused_where_a_setting_has_no_null(tmp_path):
    for key in (*FLOATS, *INTS, *BOOLS):
        assert is_refused(value_of(key, "null", tmp_path)), key


@pytest.mark.parametrize("text", ["1e-6", '"1e-6"'])
def test_entries_of_a_schedule_are_read_alike(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "rl:\n  schedule:\n"
        f'  - {{from_step: "3", optimizer.learning_rate: {text}, rl.group_size: "1e1"}}\n'
    )
    ((_, first), (step, changed)) = load_recipe(path).schedule_parts()
    assert (step, changed.optimizer.learning_rate, changed.rl.group_size) == (3, 1e-6, 10)
    assert first.optimizer.learning_rate != 1e-6


TEXTS_LIKE_NUMBERS = ["1e-6", "010", "1:30", "yes", "1_000", ".5", "null", "2024-01-01", "0x1", ""]


@pytest.mark.parametrize("text", TEXTS_LIKE_NUMBERS)
def test_what_is_written_is_read_back(text):
    for value in (text, [text], {text: text}, 1e-6, 1e22, -0.0, 7, True, None):
        assert parse_value(format_value(value)) == value
        assert parse_value(dump_yaml({"a": value})) == {"a": value}
    assert yaml.safe_load(dump_yaml([text, 1e-6])) == [text, 1e-6]  # for other readers, too


def test_a_run_s_config_means_the_same_when_it_is_read_again(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text('data: {columns: {truth: "1e3", id: "010"}}\nrl: {clip_low: 1e-7}\n')
    first = load_recipe(path)
    path.write_text(configuration.dump_recipe(first))
    assert load_recipe(path) == first


def test_a_refusal_has_a_cause_that_programs_read(tmp_path):
    found = value_of("rl.group_size", "010", tmp_path)
    assert found[0] == Cause.MALFORMED
