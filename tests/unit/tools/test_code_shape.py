"""tools/code_shape.py: the statements that it refuses, and those it leaves."""

import subprocess

import pytest

from tools.code_shape import find_bent_statements, main


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("f(*(a, b), c)", [1]),
        ("f(\n    *[a, *rest],\n    *(b,),\n)", [2, 3]),
        ("NAMES = (\n    *('a', 'b'),\n    *other,\n    *['c'],\n)", [2, 4]),
        ("names = [*('a', *('b', 'c'))]", [1, 1]),
        ("names = {*{a, b}}", [1]),
        ("a, b = (\n    x,\n    y,\n)", [1]),
        ("def g():\n    first, (low, high) = (\n        x,\n        bounds,\n    )", [2]),
        ("A, B = BOTH = (\n    1,\n    2,\n)", [1]),
    ],
)
def test_statements_bent_to_save_lines_are_found(source, lines):
    assert [line for line, _ in find_bent_statements("megatron_r1/x.py", source)] == lines


@pytest.mark.parametrize(
    "source",
    [
        "f(*rows, *shape())",
        "f(*(row for row in rows))",
        "names = (*other, *(name for name in names), *([] if a else [b]))",
        "names = ('a', ('b', 'c'))",
        "a, b = b, a",
        "a, b = make(\n    x,\n    y,\n)",
        "pair = (\n    x,\n    y,\n)",
        "(a, b), c = load(), 1",
    ],
)
def test_plain_statements_are_left(source):
    assert find_bent_statements("megatron_r1/x.py", source) == []


def test_tests_may_star_literals_and_assign_one_name_a_line():
    source = "run(*('--steps', 2))\na, b = (\n    x,\n    y,\n)"
    assert [line for line, _ in find_bent_statements("tests/test_x.py", source)] == [2]


def test_the_command_reads_the_repository_s_python_files(tmp_path, capsys):
    (tmp_path / "bent.py").write_text("x = 1\nf(*(x, x))\n")
    (tmp_path / "plain.py").write_text("f(x, x)\n")
    (tmp_path / "not_python.md").write_text("f(*(x, x))\n")
    (tmp_path / "untracked.py").write_text("f(*(x, x))\n")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    files = ["bent.py", "plain.py", "not_python.md"]
    subprocess.run(["git", "add", *files], cwd=tmp_path, check=True)
    assert main(tmp_path, []) == 1
    assert capsys.readouterr().out.startswith("bent.py:2: a starred literal")
    assert main(tmp_path, ["plain.py"]) == 0
