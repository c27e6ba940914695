"""Benchmarks from tiny files in exactly their public layouts."""

import base64
import csv
import json
import os
import pickle
import sys
import zlib
from pathlib import Path

import pytest
from r1_grading import code
from r1_grading.sandbox import programs
from refusals import refused

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import parse_recipe
from megatron_r1.data.table_files import READER_BY_SUFFIX
from megatron_r1.evaluation.benchmarks import find_benchmark
from megatron_r1.evaluation.benchmarks.gym import SUITES
from megatron_r1.evaluation.benchmarks.packed_tests import decode_tests
from megatron_r1.evaluation.prompt_sets import load_prompt_sets


def load(name, path=None, **entry):
    entry = {"name": name, **({"path": str(path)} if path else {}), **entry}
    [found] = load_prompt_sets(parse_recipe({"eval": {"benchmarks": [entry]}}))
    return found.prompts


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


LINES = Path(__file__).with_name("public_rows.jsonl").read_text(encoding="utf-8").splitlines()
ROWS = {line["name"]: line["row"] for line in map(json.loads, LINES)}
AIME_H4, AIME_MJ, MATH, GPQA, MMLU, CODEFORCES = ROWS.values()


@pytest.mark.parametrize(
    ("row", "id", "truth"), [(AIME_H4, "60", "25"), (AIME_MJ, "2024-II-4", "33")]
)
def test_aime_in_both_layouts(tmp_path, row, id, truth):
    [prompt] = load("aime_2024", write_jsonl(tmp_path / "a.jsonl", [row]))
    assert (prompt.id, prompt.kind, prompt.truth) == (id, "math", truth)
    assert prompt.question.endswith("put your final answer within \\boxed{}.")


def test_an_answer_that_aime_cannot_have_is_refused_with_its_place(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [AIME_H4, AIME_H4 | {"answer": "1024"}])
    with refused("answer", Cause.OUT_OF_RANGE, "a.jsonl:2", 1024):
        load("aime_2024", path)


def test_math_500_and_its_levels(tmp_path):
    harder = MATH | {"level": 5, "unique_id": "test/1.json"}
    path = write_jsonl(tmp_path / "test.jsonl", [MATH, harder])
    assert [p.id for p in load("math_500", path)] == ["test/807.json", "test/1.json"]
    [prompt] = load("math_500", path, options={"levels": [5]})
    assert (prompt.id, prompt.truth) == ("test/1.json", MATH["answer"])


def test_gpqa_shuffles_by_the_question_id_and_keeps_the_truth(tmp_path):
    rows = [GPQA | {"Record ID": f"rec{i}"} for i in range(40)]
    with (tmp_path / "gpqa_diamond.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(GPQA))
        writer.writeheader()
        writer.writerows(rows)
    prompts = load("gpqa_diamond", tmp_path / "gpqa_diamond.csv")
    for prompt in prompts:
        assert f"{prompt.truth}) 10^-4 eV\n" in prompt.question + "\n"
        assert sum(f"\n{letter}) " in prompt.question for letter in "ABCD") == 4
    letters = [prompt.truth for prompt in prompts]
    assert set(letters) == set("ABCD")
    # The order belongs to the id: not to the place in the file, not to the process.
    alone = tmp_path / "one.json"
    alone.write_text(json.dumps(rows[17:18]))
    assert load("gpqa_diamond", alone)[0] == prompts[17]
    others = load("gpqa_diamond", tmp_path / "gpqa_diamond.csv", options={"seed": 1})
    assert [p.truth for p in others] != letters


def test_mmlu_numbers_its_choices_from_zero(tmp_path):
    exported = MMLU | {"answer": "D", "subject": "anatomy"}
    path = write_jsonl(tmp_path / "m.jsonl", [MMLU, exported, MMLU])
    prompts = load("mmlu", path)
    assert [p.truth for p in prompts] == ["B", "D", "B"]
    assert "B) 4" in prompts[0].question
    # A question that occurs again is another question.
    assert [p.id for p in prompts[1:]] == [f"{prompts[0].id}-2", f"{prompts[0].id}-3"]
    assert [p.truth for p in load("mmlu", path, options={"subjects": ["anatomy"]})] == ["D"]
    with refused("options.subjects", Cause.UNKNOWN, "anatomi", "abstract_algebra, anatomy"):
        load("mmlu", path, options={"subjects": ["anatomi"]})
    for answer in (4, -1, "E", "AB", ""):
        with refused("answer", Cause.OUT_OF_RANGE, repr(answer), 3):
            load("mmlu", write_jsonl(tmp_path / "w.jsonl", [MMLU | {"answer": answer}]))


def pack(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def livecodebench(number, day, functional=False, **more):
    kind = "functional" if functional else "stdin"
    given, result = ("[1, 2]\n3", "[1, 2, 3]") if functional else ("3\n", "6\n")
    return {
        **{"question_title": "t", "question_content": f"Problem {number}.", "platform": "atcoder"},
        **{"question_id": f"abc{number}", "contest_id": "abc", "contest_date": f"{day}T00:00:00"},
        "starter_code": "class Solution:\n    def add(self, a, b):\n        " if functional else "",
        **{"difficulty": "easy", "metadata": '{"func_name": "add"}' if functional else "{}"},
        "public_test_cases": json.dumps([{"input": given, "output": result, "testtype": kind}]),
        "private_test_cases": pack([{"input": given, "output": result, "testtype": kind}] * 2),
        **more,
    }


def test_livecodebench_tests_become_the_code_rewards(tmp_path):
    rows = [livecodebench(1, "2024-09-01"), livecodebench(2, "2024-10-01", functional=True)]
    stdin, function = load("livecodebench", write_jsonl(tmp_path / "test.jsonl", rows))
    assert stdin.kind == "code" and stdin.fields["language"] == "python"
    assert stdin.fields["limits"]["cpu_seconds"] == 6
    assert stdin.truth == {"tests": [{"input": "3\n", "output": "6\n"}] * 3}
    assert "standard input" in stdin.question and "class Solution" not in stdin.question
    case = {"args": [[1, 2], 3], "result": [1, 2, 3]}
    assert function.truth == {"function": "add", "tests": [case] * 3}
    assert "class Solution" in function.question


def test_livecodebench_releases_and_dates(tmp_path):
    folder = tmp_path / "lcb"
    for number in range(1, 7):
        name = "test.jsonl" if number == 1 else f"test{number}.jsonl"
        write_jsonl(folder / name, [livecodebench(number, f"2024-0{number}-15")])
    ids = lambda **options: [p.id for p in load("livecodebench", folder, options=options)]  # noqa: E731
    assert len(ids()) == 6
    assert ids(release="v2") == ["abc1", "abc2"] == ids(release="release_v2")
    assert ids(**{"from": "2024-03-15", "to": "2024-04-30"}) == ["abc3", "abc4"]
    # YAML reads a bare date as one.
    options = {"from": "2024-06-01"}
    assert ids(**options) == ["abc6"]
    with refused("options.release", Cause.UNKNOWN, "v9", "v1, v2"):
        ids(release="v9")
    with refused("options", Cause.EMPTY, "2030-01-01"):
        ids(**{"from": "2030-01-01"})
    with refused("from", Cause.MALFORMED, "soon"):
        ids(**{"from": "soon"})


class Evil:
    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


def test_private_tests_are_read_without_running_what_they_hold(tmp_path):
    tests = [{"input": "1", "output": "2", "testtype": "stdin"}]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for content in (json.dumps(tests), tests):
            packed = zlib.compress(pickle.dumps(content, protocol))
            assert decode_tests(base64.b64encode(packed).decode(), "row") == tests
    assert decode_tests(json.dumps(tests), "row") == tests
    mark = tmp_path / "ran"
    attacks = [
        pickle.dumps(Evil(os.system, f"touch {mark}")),
        pickle.dumps(Evil(os.system, f"touch {mark}"), 0),
        pickle.dumps([Evil(eval, f"open({str(mark)!r}, 'w')")]),
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL, REDUCE
        b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.",
        b"\x80\x02\x82\x01.",  # EXT1: a class by number
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo index of two thousand million
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",  # a text longer than memory
        b"\x80\x04" + b"(" * 10 + b".",
        pickle.dumps(json.dumps({"input": 1})),
        pickle.dumps(7),
        b"",
    ]
    for attack in attacks:
        with refused("private_test_cases", Cause.MALFORMED, "row"):
            decode_tests(base64.b64encode(zlib.compress(attack)).decode(), "row")
    for damaged in ("%%%", base64.b64encode(b"not zlib").decode(), "[1", ""):
        with refused("private_test_cases", Cause.MALFORMED, "row"):
            decode_tests(damaged, "row")
    assert not mark.exists()


def test_a_bomb_is_refused_before_it_is_unpacked(monkeypatch):
    monkeypatch.setattr("megatron_r1.evaluation.benchmarks.packed_tests.MAX_BYTES", 2**20)
    bomb = base64.b64encode(zlib.compress(bytes(2**24))).decode()
    with refused("private_test_cases", Cause.MALFORMED, "1,048,576"):
        decode_tests(bomb, "row")


@pytest.mark.more
def test_code_problems_are_ones_the_code_reward_can_judge(tmp_path):
    """The truths go through the reward itself, in the sandbox where there is one."""
    try:
        programs.require_sandbox("python")
        programs.require_sandbox("cpp")
    except RuntimeError as error:
        pytest.skip(str(error))
    rows = [
        livecodebench(1, "2024-09-01"),
        livecodebench(2, "2024-10-01", functional=True),
    ]
    stdin, function = load("livecodebench", write_jsonl(tmp_path / "test.jsonl", rows))
    checker = (
        "import sys\n"
        "given, expected, actual = (open(name).read().split() for name in sys.argv[1:4])\n"
        "print(1 if sorted(expected) == sorted(actual) else 0)\n"
    )
    cf = [CODEFORCES, CODEFORCES | {"generated_checker": checker}]
    plain, checked = load("codeforces", write_jsonl(tmp_path / "cf.jsonl", cf))
    double = "```python\nprint(int(input()) * 2)\n```"
    append = "```python\nclass Solution:\n    def add(self, a, b):\n        return a + [b{}]\n```"
    sums = "```cpp\n#include <iostream>\nint main() {{ int a, b; std::cin >> a >> b; {} }}\n```"
    for prompt, correct, incorrect in [
        (stdin, double, double.replace("2", "3")),
        (function, append.format(""), append.format(" + 1")),
        (plain, sums.format("std::cout << a + b;"), sums.format("std::cout << a - b;")),
        (checked, sums.format("std::cout << a + b;"), sums.format("std::cout << a - b;")),
    ]:
        grades = [code.grade(text, prompt.truth, **prompt.fields) for text in (correct, incorrect)]
        assert [grade.reward for grade in grades] == [1.0, 0.0], grades


def test_codeforces_keeps_what_can_be_judged(tmp_path):
    rows = [
        CODEFORCES,
        CODEFORCES | {"id": "1/B", "generated_checker": "print(1)", "rating": 2400},
        CODEFORCES | {"id": "1/C", "interaction_format": "Ask."},
        CODEFORCES | {"id": "1/D", "input_mode": "file"},
        CODEFORCES | {"id": "1/E", "official_tests_complete": False},
        CODEFORCES | {"id": "1/F", "official_tests": []},
    ]
    path = write_jsonl(tmp_path / "cf.jsonl", rows)
    plain, checked = load("codeforces", path)
    assert plain.truth == {
        "tests": [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "2 2\n", "stdout": "4\n"}]
    }
    assert plain.fields["language"] == "cpp" and plain.fields["limits"]["cpu_seconds"] == 2
    assert (checked.id, checked.truth["checker"]) == ("1/B", "print(1)")
    assert all(part in plain.question for part in ("Time limit: 2.0 s", "```\n1 2\n```", "C++17"))
    options = {"language": "python", "max_rating": 1000}
    [easy] = load("codeforces", path, options=options)
    assert easy.fields["language"] == "python" and "Python 3" in easy.question
    with refused("options.language", Cause.UNKNOWN, "rust", "cpp, python"):
        load("codeforces", path, options={"language": "rust"})


PUBLIC_ROWS = {
    **{"aime_2024": AIME_H4, "math_500": MATH, "gpqa_diamond": GPQA, "mmlu": MMLU},
    **{"livecodebench": livecodebench(1, "2024-09-01"), "codeforces": CODEFORCES},
}


@pytest.mark.parametrize("name", PUBLIC_ROWS)
def test_a_missing_column_is_named(tmp_path, name):
    row = PUBLIC_ROWS[name]
    errors = {column: _without(tmp_path, name, row, column) for column in row}
    needed = {column: error for column, error in errors.items() if error}
    assert needed, "no column is needed?"
    for column, error in needed.items():
        assert (error.key, error.cause) == (column, Cause.MISSING)
        assert "w.jsonl:1" in str(error)


def _without(tmp_path, name, row, column):
    path = write_jsonl(tmp_path / "w.jsonl", [{k: v for k, v in row.items() if k != column}])
    try:
        load(name, path)
    except UserError as error:
        return error
    return None


@pytest.mark.parametrize("suite", SUITES)
def test_suites_need_no_data_and_are_the_same_every_time(suite):
    options = {"questions": 2}
    prompts = load(f"gym/{suite}", options=options)
    assert len({p.id for p in prompts}) == len(prompts) == 2 * len(SUITES[suite])
    assert prompts == load(f"gym/{suite}", options=options)
    assert {p.fields["task"] for p in prompts} == set(SUITES[suite])


def test_no_suite_has_syllogism_while_its_grader_accepts_undistributed_middles():
    """All A are B and some B are C does not give some A are C: B is distributed in neither premise.
    Once reasoning-gym rejects it, the task can return to the suites."""
    from reasoning_gym.logic import syllogisms as gym

    a, b, c = gym.SyllogismDataset.DEFAULT_TERMS[:3]
    premises = (gym.Quantifier.ALL, a, b), (gym.Quantifier.SOME, b, c)
    conclusion = (gym.Quantifier.SOME, a, c)
    assert gym.SyllogismDataset._is_valid_syllogism(*premises, conclusion)
    assert not any("syllogism" in tasks for tasks in SUITES.values())


def test_difficulties_differ_and_parameters_are_one_tasks():
    sums = {
        level: load("gym/chain_sum", options={"difficulty": level, "questions": 5})
        for level in ("easy", "hard")
    }
    longest = {k: max(len(p.fields["entry"]["question"]) for p in v) for k, v in sums.items()}
    assert longest["easy"] < longest["hard"]
    parameters = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    options = {"parameters": parameters, "questions": 4, "heldout_fraction": 0.1}
    few = load("gym/chain_sum", options=options, instruction="{question}")
    assert len(few) == 4 and all(p.question.endswith("=") for p in few)
    with refused("options.parameters", Cause.CONFLICT, "gym/arithmetic"):
        load("gym/arithmetic", options=options)
    with refused("eval.benchmarks", Cause.UNKNOWN, "'gym/arithmetic'"):
        load("gym/arithmetics")
    with refused("options.difficulty", Cause.UNKNOWN, "brutal", "default, easy"):
        load("gym/chain_sum", options={"difficulty": "brutal"})


def test_mistakes_in_the_recipe_name_themselves(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [AIME_H4])
    with refused("eval.benchmarks", Cause.UNKNOWN, "aime_2024"):
        load("aime")
    with refused("options.level", Cause.UNKNOWN, "'levels'"):
        load("math_500", path, options={"level": 3})
    with refused("instruction", Cause.MALFORMED, "{question}"):
        load("aime_2024", path, instruction="Solve it.")
    with refused("label", Cause.DUPLICATE, "aime_2024"):
        load_prompt_sets(parse_recipe({"eval": {"benchmarks": ["aime_2024"] * 2}}))
    with refused("path", Cause.CONFLICT, path):
        load("gym/logic", path)
    with refused("path", Cause.NOT_FOUND, "nowhere/x.jsonl"):
        load("aime_2024", tmp_path / "nowhere" / "x.jsonl")
    with refused("files", Cause.MISSING, "someone/aime"):
        load("aime_2024", "someone/aime")
    with refused("eval.benchmarks.0.limit", Cause.OUT_OF_RANGE, 0):
        parse_recipe({"eval": {"benchmarks": [{"name": "mmlu", "limit": 0}]}})


def test_folders_and_hub_names(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "hub/data/train-00000.jsonl", [AIME_H4])
    write_jsonl(tmp_path / "hub/other.jsonl", [MATH])
    with refused("files", Cause.NOT_FOUND, "data/train-*.parquet", "other.jsonl"):
        load("aime_2024", tmp_path / "hub")
    assert len(load("aime_2024", tmp_path / "hub", files=["data/*"])) == 1
    asked = []

    def snapshot_download(hub, repo_type, allow_patterns):
        asked.append((hub, repo_type, allow_patterns))
        write_jsonl(tmp_path / "snapshot/test.jsonl", [MATH])
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert [p.id for p in load("math_500")] == [MATH["unique_id"]]
    assert asked == [("HuggingFaceH4/MATH-500", "dataset", ["test.jsonl"])]


def test_without_a_network_the_remedy_is_said(monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with refused("path", Cause.UNREADABLE, "hf download HuggingFaceH4/MATH-500"):
        load("math_500")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with refused("pyarrow", Cause.NOT_INSTALLED):
        load("aime_2024", tmp_path)


def test_sources_knows_every_suffix_it_names(tmp_path):
    (tmp_path / "x.txt").write_text("")
    with refused("path", Cause.UNSUPPORTED, "x.txt", *READER_BY_SUFFIX):
        load("aime_2024", tmp_path / "x.txt")


def test_your_own_benchmark_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "capitals.py").write_text(
        "from megatron_r1.evaluation.benchmarks.base import Benchmark, Question\n"
        "def questions(rows, options):\n"
        "    for place, row in rows:\n"
        "        yield Question(row['land'], f\"Capital of {row['land']}?\", 'math', row['city'])\n"
        "CAPITALS = Benchmark(questions, hubs={'me/capitals': lambda options: ['*.jsonl']})\n"
    )
    monkeypatch.setattr(sys, "path", [at for at in sys.path if at not in ("", os.getcwd())])
    monkeypatch.chdir(tmp_path)  # the console script does not have it in sys.path
    path = write_jsonl(tmp_path / "c.jsonl", [{"land": "Peru", "city": "Lima"}])
    [prompt] = load("capitals:CAPITALS", path)
    assert (prompt.id, prompt.question, prompt.truth) == ("Peru", "Capital of Peru?", "Lima")
    with refused("eval.benchmarks", Cause.NOT_FOUND, "CITIES"):
        find_benchmark("capitals:CITIES")
