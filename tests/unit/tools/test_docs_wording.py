"""tools/docs/wording.py: the wordings of pages and modules that it finds, and those it leaves."""

import subprocess

import pytest

from tools.docs.wording import (
    find_in_module,
    find_in_page,
    find_in_public_docstrings,
    find_in_raising_docstrings,
    find_in_sections,
    find_in_settings,
    find_in_texts,
    find_long_summaries,
    find_undescribed_parameters,
    find_vague_names,
    main,
)


def lines(findings):
    return [(line, words) for line, words, _ in findings]


def test_prose_of_a_page_is_read_and_code_is_not():
    page = (
        "A file beside it.\n\n```\nbeside\n```\n`beside` [link](beside.md)\nIt has a\nrow, too.\n"
    )
    assert sorted(lines(find_in_page(page))) == [(1, "beside"), (8, ", too")]


def test_comments_and_docstrings_of_a_module_are_read_and_strings_are_not():
    source = (
        '"""Whoever reads it."""\n'
        "SIZE = 1  # no class of ours\n"
        '"""What is\nnone of them."""\n'
        'print("beside the other, and in no mean")\n'
    )
    assert sorted(lines(find_in_module(source))) == [
        (1, "Whoever"),
        (2, "of ours"),
        (3, "is none of"),
    ]


def test_comments_of_settings_are_read_and_values_are_not():
    text = "name: beside  # beside it\n# Whoever reads\nurl: a#beside\n"
    assert lines(find_in_settings(text)) == [(1, "beside"), (2, "Whoever")]


def test_every_string_of_a_module_is_read_but_its_docstrings():
    source = (
        '"""beside"""\nraise ValueError(\n    f"{name} is none of {name}"\n)\nprint("beside")\n'
    )
    assert lines(find_in_texts(source)) == [(3, "is none of"), (5, "beside")]


DESCRIBED = (
    'def f(a, b, c):\n    """Do it.\n\n    Args:\n        a: 1.\n        b: 2.\n        c: 3."""\n'
)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (DESCRIBED, []),
        ('def f(a, b, c):\n    """Do it."""\n', ["f"]),
        ('def f(a, b):\n    """Do it."""\n', []),
        ('def _f(a, b, c):\n    """Do it."""\n', []),
        ('class A:\n    def f(self, a, b, *c):\n        """Do it."""\n', ["f"]),
        ('class A:\n    @override\n    def f(self, a, b, c):\n        """Do it."""\n', []),
        ('def f(a, b, c):\n    """Do it. Arguments and result are those of `g`."""\n', []),
    ],
)
def test_public_functions_of_three_parameters_describe_them(source, found):
    assert [name for _, name in lines(find_undescribed_parameters(source))] == found


def summary_of(words, end):
    return " ".join(["word"] * words) + end


@pytest.mark.parametrize(
    ("docstring", "num_found"),
    [
        (summary_of(30, "."), 0),
        (summary_of(31, "."), 1),
        (summary_of(20, ". ") + summary_of(20, ".").capitalize(), 0),
        (summary_of(20, ".\n\n") + summary_of(40, "."), 0),
        (summary_of(20, ":\n    ") + summary_of(40, "."), 0),
        (summary_of(20, "; ") + summary_of(20, "."), 1),
    ],
)
def test_first_sentences_that_are_long_are_found(docstring, num_found):
    sources = (
        f'"""{docstring}"""\n',
        f'def f():\n    """{docstring}"""\n',
        f'class C:\n    """{docstring}"""\n',
    )
    assert [len(lines(find_long_summaries(source))) for source in sources] == [num_found] * 3


PUBLIC = '''
class Step:
    """One step. index: its number.

    Attributes:
        index: of the run.
        rows: the questions.
    """

    index: int
    rows: list

    def take(self, count, first):
        """Return rows; count: how many.

        first: where to begin. Note: nothing is copied.

        Args:
            count: how many: at most 8.

        Raises:
            ValueError: count: too large.
        """

    def _hidden(self, count):
        """Returns rows. count: how many."""


def rows(path):
    """Return the rows of `path: text`, path by path."""
'''


def test_parameters_and_fields_stand_in_sections_by_what_they_are():
    assert lines(find_in_public_docstrings(PUBLIC)) == [
        (6, "index: of"),
        (3, "index:"),
        (14, "count:"),
        (16, "first:"),
    ]


SECTIONS = '''
class Step:
    """One step.

    Attributes:
        index, rows: of a step.
        index: its number, which
            counts: from 0.
        index: again.
    """

    def __init__(self, index, **others):
        """Make it.

        Args:
            index (int): the number.
            **others: more.
            size: no parameter.

        Returns:
            size, rows: free text.
        """


def take(first, *rest):
    """Take rows.

    Args:
        first: the row.
        rest
        *rest: the others, in
        order.

    Raises:
        OSError, ValueError: unreadable.
        torch.Error: the first reason.
        ValueError: one reason.
        ValueError: another.
    """


def _hidden():
    """Take.

    Args:
        a, b: nothing.
    """
'''


def test_an_entry_of_a_section_is_one_name_of_a_parameter_with_its_description():
    found = [(line, name) for line, name, _ in find_in_sections(SECTIONS)]
    assert sorted(found) == [
        (6, "index, rows"),
        (9, "index"),
        (18, "size"),
        (30, "rest"),
        (32, "order."),
        (35, "OSError, ValueError"),
    ]


RAISING = '''
def read(path):
    """Return the rows of `path`. Raises
    OSError where it is missing."""


class Rows:
    """The rows.

    Raises ValueError for none, and "Raises" as a heading is fine.
    """

    def _hidden(self):
        """Return a row; raise KeyError for another. `Raises ValueError` is quoted."""

        def inner():
            """Return it; raises as `read`."""

    def taken(self, number):
        """Raise ValueError for a number that is taken.

        Nothing else raises ValueError here.

        Args:
            number: a function; raises KeyError for an unknown name.

        Raises:
            ValueError: Raises a limit.
        """
'''


def test_errors_that_a_function_raises_are_entries_of_a_section_and_no_prose():
    assert sorted(lines(find_in_raising_docstrings(RAISING))) == [
        (3, "Raises OSError"),
        (10, "Raises ValueError"),
        (14, "; raise KeyError"),
        (17, "; raises as"),
    ]


def test_names_that_say_nothing_of_their_kind_are_found():
    source = (
        "def outer(first, /, known, *, kept=1, **others):\n"
        "    given = first\n"
        "    async def inner(self, other, known_keys, *rest): return given\n"
        "    def side(left, right): return lambda each: each\n"
        "    def remaining(left): pass\n"
    )
    assert sorted(lines(find_vague_names(source))) == [
        (1, "kept"),
        (1, "known"),
        (1, "others"),
        (2, "given"),
        (3, "rest"),
        (5, "left"),
    ]


@pytest.mark.parametrize(
    "words",
    [
        "Raises ValueError for what is none.",
        "a grade that is none",
        "an end that the policy has not caused is in no mean",
        "A push did not come to its end",
        "the base of ours",
    ],
)
def test_sentences_that_readers_did_not_understand_are_found(words):
    assert len(lines(find_in_page(words))) == 1


@pytest.mark.parametrize(
    "words", ["None for no answer", "besides the response", "too long or too short", "none; one"]
)
def test_plain_sentences_pass(words):
    assert lines(find_in_page(words)) == []


def test_findings_are_named_with_file_line_and_remedy(tmp_path, capsys):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "page.md").write_text("Plain.\nBeside it.\n")
    (tmp_path / "CHANGELOG.md").write_text("Beside it.\n")
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    assert main(tmp_path, []) == 1
    assert capsys.readouterr().out.startswith("page.md:2: 'Beside': write `next to`")
    (tmp_path / "tools").mkdir()
    for name in ("tools/wide.py", "wide.py"):
        (tmp_path / name).write_text("def f(known):\n    pass\n")
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    assert main(tmp_path, ["tools", "wide.py"]) == 1
    assert capsys.readouterr().out.count("tools/wide.py:1: 'known': write the kind") == 1
    (tmp_path / "tools/wide.py").unlink()
    (tmp_path / "page.md").write_text("Plain.\n")
    assert main(tmp_path, []) == 0
