"""Rows as public data sets have them: padded, as text, with several truths or none."""

import json

import pytest
from r1_grading import RewardPool, RewardTerms, code, exact_match
from r1_grading import math as math_reward
from r1_grading.code.outputs import same_output
from r1_grading.code.problem import parse_problem
from r1_grading.code.public_formats import parse_language
from r1_grading.terms import RewardUnusable
from r1_grading.truths import NO_TRUTH, is_missing
from refusals import refused

from megatron_r1.agents.player import reset_arguments
from megatron_r1.base.errors import Cause
from megatron_r1.data.chats import read_chat, tool_calls
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompts import load_prompts
from megatron_r1.data.sft import read_example
from tests.grading.code_answers import needs_sandbox


def read(tmp_path, rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_prompts(path=path, heldout_fraction=0.0, **settings)


# B34: nested columns padded with null.


def test_null_keys_of_tests_count_as_absent():
    padded = {"stdin": "1\n", "stdout": "2\n", "args": None, "kwargs": None, "result": None}
    plain = {"stdin": "1\n", "stdout": "2\n"}
    same = parse_problem({"tests": [plain]}, "python")
    assert parse_problem({"tests": [padded], "function": None, "time_limit": None}, None) == same
    # Not LiveCodeBench's form, which compares numbers by value.
    form = {**plain, "input": None, "output": None}
    assert parse_problem({"tests": [form]}, "python") == same
    call = {"args": [1], "result": 2}
    same = parse_problem({"tests": [call], "function": "f"}, "python")
    for more in ({"kwargs": None}, {"stdin": None, "stdout": None}, {"input": None}):
        assert parse_problem({"tests": [call | more], "function": "f"}, "python") == same


def test_null_results_stay_and_padded_keyword_arguments_go():
    tests = [{"args": [1], "kwargs": None, "result": None}]
    assert parse_problem({"tests": tests, "function": "f"}).tests[0].expected is None
    tests = [{"args": None, "kwargs": {"a": 1, "b": None}, "result": 2}]
    assert parse_problem({"tests": tests, "function": "f"}).tests[0].kwargs == {"a": 1}
    tests += [{"kwargs": {"a": 1, "b": 3}, "result": 2}]
    assert parse_problem({"tests": tests, "function": "f"}).tests[0].kwargs == {"a": 1, "b": None}


def test_null_keys_of_a_row_and_of_a_call_count_as_absent():
    fields = {"tools_kwargs": {"calc": {"create": {"x": 1, "y": None}}, "search": None}, "n": None}
    row = reset_arguments(Prompt("p", "q", "environment", {"a": None}, fields))
    assert row == {
        **{"question": "q", "truth": {}, "n": None},
        "tools_kwargs": {"calc": {"create": {"x": 1}}},
    }
    (call,) = tool_calls([{"name": "f", "arguments": {"x": 1, "y": None}, "id": None}])
    assert call["function"]["arguments"] == {"x": 1} and "id" not in call


def test_parquet_pads_rows_of_two_kinds_of_tests(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"question": "a?", "truth": {"tests": [{"stdin": "1", "stdout": "2"}]}},
        {"question": "b?", "truth": {"tests": [{"args": [1], "result": 2}], "function": "f"}},
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    prompts = load_prompts(path=path, heldout_fraction=0.0).train
    assert [prompt.kind for prompt in prompts] == ["code", "code"]
    assert [parse_problem(p.truth) for p in prompts] == [parse_problem(r["truth"]) for r in rows]
    # B40: a row without a prompt.
    rows.append({"question": None, "truth": rows[1]["truth"]})
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with refused("question", Cause.MALFORMED, "rows.parquet:3", "None"):
        load_prompts(path=path, heldout_fraction=0.0)
    split = load_prompts(path=path, heldout_fraction=0.0, bad_rows="leave_out")
    [left_out] = split.reports[0].left_out.values()
    assert (len(split.train), left_out.count, left_out.first) == (2, 1, f"{path}:3")


# B35: prompts of several messages.

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1 + 1?"}
ANSWER = {"role": "assistant", "content": "2"}


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    "chat",
    [
        [SYSTEM, USER],
        [{"content": "Be brief.", "role": "system"}, {"content": "1 + 1?", "role": "user"}],
        [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1 + 1?"}],
        [SYSTEM | {"name": None}, USER | {"content": [{"type": "text", "text": "1 + 1?"}]}],
        [{"role": "developer", "content": "Be brief."}, USER | {"tool_calls": None}],
    ],
)
def test_a_question_has_the_messages_before_it(tmp_path, chat, as_text):
    row = {"prompt": json.dumps(chat) if as_text else chat, "reward_model": {"ground_truth": "2"}}
    (prompt,) = read(tmp_path, [row]).train
    assert (prompt.question, prompt.messages_before) == ("1 + 1?", [SYSTEM])


def test_a_question_may_have_turns_before_it_and_ends_with_the_user(tmp_path):
    later = {"role": "user", "content": "And + 3?"}
    rows = [{"question": [USER, ANSWER, later], "truth": "5"}, {"question": "And + 3?", "truth": 4}]
    split = read(tmp_path, rows)
    assert [prompt.messages_before for prompt in split.train] == [[USER, ANSWER], []]
    with refused("question", Cause.MALFORMED, "rows.jsonl:1"):
        read(tmp_path, [{"question": [USER, ANSWER], "truth": "2"}])
    with refused("question", Cause.MALFORMED, "judge"):
        read(tmp_path, [{"question": [{"role": "judge", "content": "?"}], "truth": "2"}])


# B36: conversations as examples.


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, USER, ANSWER], "num_tokens": 3, "source": "x"},
        {"messages": json.dumps([SYSTEM, USER, ANSWER])},
        {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}],
         "system": "Be brief."},
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        {"instruction": "1 + 1?", "input": "", "output": "2", "system": "Be brief."},
        {"question": "1 + 1?", "response": "2", "system_prompt": "Be brief."},
    ],
)  # fmt: skip
def test_a_row_is_one_conversation(row):
    example = read_example("rows:1", row)
    assert example.messages == [SYSTEM, USER, ANSWER] and not example.prompt


def test_text_stays_text():
    row = {"instruction": "Add.", "context": "1 1", "response": "2"}
    assert read_example("rows:1", row).messages[0]["content"] == "Add.\n\n1 1"
    example = read_example("rows:1", {"prompt": "1 + 1 =", "completion": " 2"})
    assert (example.prompt, example.response, example.messages) == ("1 + 1 =", " 2", [])
    assert read_example("rows:1", {"text": "all of it"}).response == "all of it"
    with refused("messages", Cause.MALFORMED, "rows:1"):
        read_example("rows:1", {"messages": [USER]})
    assert read_chat("[1, 2]") is None and read_chat("plain") is None


# B37: words that stand for a missing truth.


@pytest.mark.parametrize(
    "truth",
    ["proof", "notfound", "n/a", "N/A", "None", "null", "unknown", "undefined", "No answer", "—",
     "[INVALID]", "-", "?", "TODO", r"\text{proof}", "nan", "", " ", None, [], [None, "N/A"],
     {"target": []}, float("nan"), "Let x be even. " * 30, "def f(x):\n    return x"],
)  # fmt: skip
def test_a_truth_that_is_none_is_left_out_and_counted(tmp_path, truth):
    rows = [{"question": "a?", "truth": "42"}, {"question": "b?", "truth": truth}]
    split = read(tmp_path, rows)
    assert [prompt.truth for prompt in split.train] == ["42"]
    ((_, left_out),) = split.reports[0].left_out.items()
    assert (left_out.count, left_out.first) == (1, f"{tmp_path}/rows.jsonl:2")


def test_a_file_without_any_truth_is_refused_by_its_column(tmp_path):
    rows = [{"problem": f"{n}?", "answer": "proof"} for n in range(3)]
    with refused("answer", Cause.EMPTY, "all 3 rows", "proof", "rows.jsonl:1"):
        read(tmp_path, rows)
    with refused("question", Cause.MALFORMED, "rows.jsonl:1", "bad_rows"):
        read(tmp_path, [{"question": None, "answer": "1"}, {"question": "a?", "answer": "2"}])


@pytest.mark.parametrize("truth", ["0", 0, "no", "-1", "E", "false", False, "none of them", "D"])
def test_a_short_truth_is_one(tmp_path, truth):
    assert not is_missing(truth)
    (prompt,) = read(tmp_path, [{"question": "a?", "truth": truth}]).train
    assert math_reward.grade(f"<answer>{truth}</answer>", prompt.truth).reward == 1


def test_the_words_are_a_setting(tmp_path):
    rows = [{"question": "Is it so?", "truth": "Unknown"}, {"question": "b?", "truth": "none"}]
    kept = [word for word in NO_TRUTH if word != "unknown"]
    assert len(read(tmp_path, rows, no_truth=kept).train) == 1
    assert len(read(tmp_path, rows, no_truth=[]).train) == 2
    with refused("truth", Cause.EMPTY, "rows.jsonl:1", "Unknown"):
        read(tmp_path, rows)


# B38: truths that are lists, mixed, or bad in later rows.


@pytest.mark.parametrize(
    "truth", ["72", ["72"], 72, {"target": ["72"]}, '["72"]', '{"target": ["72"]}', ["7", 72]]
)
def test_one_of_several_truths_is_enough(tmp_path, truth):
    (prompt,) = read(tmp_path, [{"question": "a?", "truth": truth}]).train
    assert math_reward.grade("<answer>72</answer>", prompt.truth).reward == 1
    assert math_reward.grade("<answer>73</answer>", prompt.truth).reward == 0


def test_names_are_compared_without_case_articles_and_punctuation():
    truth = {"target": ["The Eiffel Tower", "La tour Eiffel"]}
    for answer in ("eiffel tower.", "the Eiffel-Tower", "La Tour Eiffel"):
        expected = answer != "the Eiffel-Tower"  # "eiffeltower", as SQuAD's script has it
        assert exact_match.grade(f"<answer>{answer}</answer>", truth).reward == expected
    assert exact_match.grade("<answer></answer>", truth).reward == 0
    assert exact_match.grade("<answer>the</answer>", ["a"]).reward == 0


@pytest.mark.parametrize(
    "bad",
    [{"a": 1}, {"tests": []}, {"inputs": [], "outputs": []}, {"inputs": ["1"], "outputs": []},
     "####", float("inf"), {"language": "rust", "test_cases": [{"input": "", "output": ""}]}],
)  # fmt: skip
def test_every_row_s_truth_is_checked(tmp_path, bad):
    rows = [{"question": "a?", "truth": bad}, {"question": "b?", "truth": "72"}]
    for at in (1, 2):
        with refused("truth", Cause.MALFORMED, f"rows.jsonl:{at}"):
            read(tmp_path, rows)
        rows.reverse()
    split = read(tmp_path, rows, bad_rows="leave_out")
    assert len(split.train) == 1 and len(split.reports[0].left_out) == 1


@pytest.mark.parametrize("kind, bad", [("math", {"a": 1}), ("code", {"inputs": []})])
def test_a_grader_checks_every_prompt(kind, bad):
    import asyncio

    prompts = [Prompt("a", "a?", kind, bad), Prompt("b", "b?", "my:own", None)]

    async def check():
        async with RewardPool(1) as pool:
            await RewardTerms(pool, {}).check((), prompts)

    with pytest.raises(RewardUnusable, match="a\\?"):
        asyncio.run(check())


# B39: files that repeat their questions.


def test_repeated_questions_are_counted(tmp_path):
    rows = [{"question": f"{n % 3} + 1?", "truth": n % 3 + 1} for n in range(300)]
    split = read(tmp_path, rows)
    report = split.reports[0]
    assert (len(split.train), report.num_read, report.num_duplicates) == (3, 300, 297)


def test_questions_that_differ_in_case_are_two_on_one_side(tmp_path):
    pairs = [(f"find {letter}{n}", n) for n in range(40) for letter in "Aa"]
    rows = [{"question": q, "truth": f"{q}"} for q, _ in pairs]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    split = load_prompts(path=path, heldout_fraction=0.5)
    assert len(split.train) + len(split.heldout) == 80 and not split.contradictions
    for side in (split.train, split.heldout):
        names = {prompt.question.casefold() for prompt in side}
        assert len(side) == 2 * len(names)
    assert len({prompt.id for prompt in split.train + split.heldout}) == 80


# B59: tests of code as public sets spell them.

APPS = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "3\n"]}
CASES = [{"input": "1\n", "output": "2\n", "type": "stdin_stdout", "fn_name": None},
         {"input": "2\n", "output": "3\n", "type": "stdin_stdout", "fn_name": None}]  # fmt: skip
LISTS = {"input": ["2\n"], "output": ["3\n"]}


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    "truth",
    [
        APPS,
        APPS | {"fn_name": None},
        {"inputs": [["1"], ["2"]], "outputs": [["2"], ["3"]]},
        {"language": "python", "test_cases": CASES},
        {"language": "Python3", "test_cases": json.dumps(CASES)},
        CASES,
        [{"input": c["input"], "output": c["output"], "testtype": "stdin"} for c in CASES],
        {"public_tests": {"input": ["1\n"], "output": ["2\n"]}, "private_tests": LISTS},
        {"public_tests": json.dumps(CASES[:1]), "generated_tests": LISTS, "private_tests": None},
        {"input": ["1\n", "2\n"], "output": ["2\n", "3\n"]},
    ],
)
def test_programs_tests_of_public_sets_are_read(truth, as_text):
    problem = parse_problem(json.dumps(truth) if as_text else truth, None)
    stripped = [(test.stdin.strip(), test.expected.strip()) for test in problem.tests]
    assert stripped == [("1", "2"), ("2", "3")]
    assert (problem.function, problem.language) == (None, "python")


@pytest.mark.parametrize(
    "truth",
    [
        {"inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]], "fn_name": "add"},
        {"inputs": ["1\n2", "3\n4"], "outputs": ["3", "7"], "fn_name": "add"},
        {"test_cases": [{"input": [1, 2], "output": 3, "fn_name": "add", "type": "function_call"},
                        {"input": [3, 4], "output": 7, "fn_name": "add", "type": "function_call"}]},
        [{"input": "1\n2", "output": "3", "testtype": "functional", "metadata":
          '{"func_name": "add"}'},
         {"input": "3\n4", "output": "7", "testtype": "functional", "metadata":
          {"func_name": "add"}}],
        ["assert add(1, 2) == 3", "assert 7 == add(3, 4)"],
        "assert add(1, 2) == 3\nassert add(3, 4) == 7",
        {"test_list": ["assert Solution().add(1, 2) == 3", "assert add(3, 4) == 7"]},
    ],
)  # fmt: skip
def test_calls_of_public_sets_are_read(truth):
    problem = parse_problem(truth, "python")
    assert problem.function == "add"
    for test, (args, result) in zip(problem.tests, [((1, 2), 3), ((3, 4), 7)], strict=True):
        assert test.args == args and result in (test.expected, *test.alternatives)


def test_asserts_of_truth_and_of_values_of_json_are_read():
    lines = ["assert f((1, 2), k='x')", "assert not f([])", "assert f({1: 2}) is None",
             "assert f(0) == (1, [2], {3: None})"]  # fmt: skip
    tests = parse_problem(lines).tests
    assert [test.expected for test in tests] == [True, False, None, [1, [2], {"3": None}]]
    assert tests[0].args == ((1, 2),) and tests[0].kwargs == {"k": "x"}
    for line in (
        "assert f(1) == g(2)",
        "assert set(f(1)) == {1}",
        "assert f(1) == {1}",
        "assert x",
    ):
        with pytest.raises(ValueError, match="assert"):
            parse_problem([line])
    with pytest.raises(ValueError, match="2 functions"):
        parse_problem(["assert f(1) == 1", "assert g(1) == 1"])


def test_languages_are_spelled_as_data_sets_do():
    for name in ("Python", "python3", "PYTHON 3", "py", "Python 3.11", "PyPy3"):
        assert parse_language(name) == "python"
    for name in ("C++", "cpp", "c++17", "C++ 20", "GNU C++17", "g++"):
        assert parse_language(name) == "cpp"
    assert parse_language(None) is None and parse_language(" ") is None
    for name in ("java", "c", 3, "English"):
        with pytest.raises(ValueError, match="python, cpp"):
            parse_language(name)
    problem = parse_problem({"language": "C++", "test_cases": CASES}, None)
    assert problem.language == "cpp"
    with pytest.raises(ValueError, match="cpp.*python"):
        parse_problem({"language": "C++", "test_cases": CASES}, "python")


def test_null_settings_of_a_prompt_are_the_defaults():
    with pytest.raises(ValueError, match="must be lists"):
        code.grade("", {"inputs": []}, language=None, partial=None, limits=None, standard=None)


# B58: a program that prints only a part.


@pytest.mark.parametrize("printed", [b"1", b"1\n2", b"1\n2\n3\n4", b"", b"1\n\n2\n3", b"2\n3"])
def test_a_part_of_the_lines_is_wrong(printed):
    for tolerance in (None, 0.0):
        assert not same_output(printed, "1\n2\n3\n", tolerance)
        assert same_output(b"1\n2\n3", "1\n2\n3\n", tolerance)


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    ["print(1)", "import sys\nprint(1)\nsys.exit(0)\nprint(2)", "import os\nos._exit(0)", "pass"],
)
def test_a_program_that_ends_early_fails(program):
    truth = {"inputs": [""], "outputs": ["1\n2\n3"]}
    assert code.grade(f"```python\n{program}\n```", truth).reward == 0
    assert code.grade("```python\nprint(1, 2, 3, sep='\\n')\n```", truth).reward == 1
