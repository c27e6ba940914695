"""Records of claims: whether they are fresh, how they are measured, and the page made of them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from waiting import wait_until

from tools.evidence import measure
from tools.evidence.command import main
from tools.evidence.measure import measuring_order
from tools.evidence.page import PAGE, render
from tools.evidence.records import (
    FOLDER,
    Claim,
    Failed,
    Measured,
    State,
    changed_files,
    read_claims,
    states,
    write_claim,
)
from tools.evidence.watched import command_files, unwatched_files

ROOT = Path(__file__).resolve().parents[3]


class Repository:
    """A small repository with claims."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / FOLDER).mkdir(parents=True)
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, "-C", self.root, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, **files: str) -> str:
        """Write files, their folders separated by "__", and commit all; return the commit.

        The last folder alone, as in "tools__shapes__", has its __init__.py."""
        for name, text in files.items():
            *folders, last = name.split("__")
            path = self.root.joinpath(*folders, f"{last or '__init__'}.py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "--no-verify", "--allow-empty", "-m", "Change files")
        return self.git("rev-parse", "HEAD")

    def claim(self, id: str = "sum", command: str = "echo total 3", **fields) -> Claim:
        """Write a record that depends on part/; return it."""
        known = {"topic": "numbers", "claim": "Sums are right.", "page": "docs/sum.md"}
        known |= {"reads": [r"total (?P<total>[\d,]+)"], "figure": "{total} in all"}
        known |= {"paths": ["part/", "one.py", "tests/test_*.py"], "seconds": 1.0}
        claim = Claim(id=id, command=command, **known | fields)
        write_claim(self.root, claim)
        return claim

    def measured(self, commit: str, **fields) -> Claim:
        return self.claim(
            measured=Measured("3 in all", commit, "2026-01-02", "a machine"), **fields
        )

    def state(self, claim: Claim) -> State:
        return states(self.root, [claim])[claim.id]

    def record(self, id: str = "sum") -> dict:
        return json.loads((self.root / FOLDER / f"{id}.json").read_text())


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setattr(measure, "busy_cores", lambda: 1.5)
    return Repository(tmp_path)


def test_a_claim_is_fresh_until_a_tracked_file_of_its_paths_changes(repository):
    claim = repository.measured(repository.commit(part__a="n = 1", one="n = 1", other="1"))
    repository.commit(other="2", tests__helper="2")
    assert repository.state(claim) == State("fresh")
    (repository.root / "part/not_tracked.py").write_text("n = 3")
    assert repository.state(claim).name == "fresh"
    (repository.root / "one.py").write_text("n = 2")
    assert repository.state(claim) == State("stale", ("one.py",)), "not committed yet"
    repository.commit(part__new="n = 1", tests__test_x="n = 4")
    changed = ("one.py", "part/new.py", "part/not_tracked.py", "tests/test_x.py")
    assert repository.state(claim) == State("stale", changed)
    assert repository.state(claim).text == "stale, 4 files"


def test_a_file_that_is_taken_back_to_what_was_measured_makes_the_claim_fresh_again(repository):
    claim = repository.measured(repository.commit(part__a="n = 1"))
    repository.commit(part__a="n = 2")
    repository.commit(part__a="n = 1")
    assert repository.state(claim).name == "fresh"


@pytest.mark.parametrize(
    ("text", "state"),
    [
        (
            '"""Docs."""\n\n\ndef f(x):  # why\n    """Return twice x."""\n'
            "    double = 2 * x\n    return double\n",
            "fresh",
        ),
        ("def f(x):\n    twice = (\n        2 * x\n    )\n    return twice\n", "fresh"),
        ("def f(x):\n    double = 3 * x\n    return double\n", "stale"),
        ("def f(x):\n    double = 2.0 * x\n    return double\n", "stale"),
        ("def f(x):\n    double = 2 * x\n    return x\n", "stale"),
        ("def f(z):\n    double = 2 * z\n    return double\n\n\ny = f(z=2)\n", "stale"),
        ("def f(x, y=1):\n    double = 2 * x\n    return double\n", "stale"),
        ("def f(*x):\n    double = 2 * x\n    return double\n", "stale"),
        ("def other(x):\n    double = 2 * x\n    return double\n", "fresh"),
        ('def f(x):\n    double = 2 * x\n    return double\n\n\nNAME = "a"\n', "stale"),
        ("def f(x:\n", "stale"),
    ],
)
def test_of_python_files_only_instructions_count(repository, text, state):
    first = "def f(x):\n    double = 2 * x\n    return double\n"
    claim = repository.measured(repository.commit(part__a=first))
    repository.commit(part__a=text)
    assert repository.state(claim).name == state


TWICE = "def twice(x):\n    return 2 * x\n"
USE = "from tools.{module} import twice\n\n\ndef use(x):\n    return twice(x)\n"
TWO = "import math\n\nONE = 1\n\n\ndef area(r):\n    return math.pi * r * r\n"


@pytest.mark.parametrize(
    ("files", "state"),
    [
        # a definition that moves to another file that is watched, and its import from there
        ({"part__a": TWO, "part__b": TWICE, "part__use": USE.format(module="other")}, "fresh"),
        # ... to one that is not
        ({"part__a": TWO, "other": TWICE}, "stale"),
        # another function of that name is imported
        ({"part__use": USE.format(module="wrong")}, "stale"),
        # the same one, by a module that it has moved to
        ({"part__use": USE.format(module="moved")}, "fresh"),
        # one that is nowhere
        ({"part__use": USE.format(module="nowhere")}, "stale"),
        # statements in another order, definitions in another order
        ({"part__c": "n = 2\nn = 1\n"}, "stale"),
        ({"part__a": f"import math\n{TWICE}\nONE = 1\n{TWO.partition('ONE = 1')[2]}"}, "fresh"),
        # another library has a name
        ({"part__a": TWO.replace("import math", "import cmath as math") + TWICE}, "stale"),
    ],
)
def test_definitions_may_move_between_the_files_of_a_claim(repository, files, state):
    first = {"part__a": TWO + TWICE, "part__use": USE.format(module="other")}
    first |= {"part__c": "n = 1\nn = 2\n", "tools__other": TWICE, "tools__moved": TWICE}
    first |= {"tools__wrong": "def twice(x):\n    return x + x\n"}
    claim = repository.measured(repository.commit(**first))
    repository.commit(**files)
    assert repository.state(claim).name == state


COUNTER = """class Counter:
    number: int = 0

    def add(self, value):
        self.number += value
        return self.number
"""
USE_COUNTER = """from part.counter import Counter


def count(values):
    values = list(values)
    counter = Counter(number=1)
    for value in values:
        counter.add(value)
    return counter.number
"""


@pytest.mark.parametrize(
    ("renames", "others", "state"),
    [
        # a class, a method, an attribute, which is also a parameter: in all files
        ({"Counter": "Sum"}, {}, "fresh"),
        ({"Counter": "Sum", "add": "increase", "number": "total"}, {}, "fresh"),
        # the two names are exchanged; two become one
        ({"add": "number", "number": "add"}, {}, "stale"),
        ({"add": "total", "number": "total"}, {}, "stale"),
        # a name that was somewhere in the project, though not in these files
        ({"add": "elsewhere"}, {}, "stale"),
        # a parameter that is set somewhere; then a caller that is not watched has its old name
        ({"values": "increments"}, {}, "fresh"),
        ({"values": "increments"}, {"elsewhere": "elsewhere = count(values=[1])\n"}, "stale"),
        # a parameter that is set nowhere
        ({"value": "increment"}, {}, "fresh"),
        # renamed in one of the files alone: the old name is still in use
        ({"Counter": "Sum"}, {"part__use": USE_COUNTER}, "stale"),
        # renamed, and computes something else
        (
            {"Counter": "Sum"},
            {"part__counter": COUNTER.replace("Counter", "Sum").replace("+=", "-=")},
            "stale",
        ),
        # a function of another library instead: neither is defined here
        ({}, {"part__use": USE_COUNTER.replace("counter.add", "counter.subtract")}, "stale"),
    ],
)
def test_definitions_may_have_other_names_everywhere(repository, renames, others, state):
    first = {"part__counter": COUNTER, "part__use": USE_COUNTER, "elsewhere": "elsewhere = 1\n"}
    claim = repository.measured(repository.commit(**first))

    def renamed(text):
        return re.sub(r"\w+", lambda word: renames.get(word.group(), word.group()), text)

    files = {"part__counter": renamed(COUNTER), "part__use": renamed(USE_COUNTER)}
    repository.commit(**files | others)
    assert repository.state(claim).name == state


PRIVATE = """def area(r):
    return 3 * _power(r)


def _power(r, exponent=2):
    return r**exponent


def _table():
    return {"area": area}
"""

EXCHANGED = {"power": "_table", "table": "_power"}


@pytest.mark.parametrize(
    ("text", "state"),
    [
        # the name is another function's elsewhere
        (PRIVATE.replace("_power", "_square"), "fresh"),
        (PRIVATE.replace("_power", "_square").replace("_table", "_functions"), "fresh"),
        # to a public one that was nowhere
        (PRIVATE.replace("_power", "square"), "fresh"),
        # renamed in the definition alone; to a name that the file has; to one that was elsewhere
        (PRIVATE.replace("def _power", "def _square"), "stale"),
        (PRIVATE.replace("_power", "_table"), "stale"),
        (PRIVATE.replace("_power", "cube"), "stale"),
        # exchanged; with another body
        (
            PRIVATE.replace("_power", "_x").replace("_table", "_power").replace("_x", "_table"),
            "stale",
        ),
        (PRIVATE.replace("_power", "_square").replace("exponent=2", "exponent=3"), "stale"),
        # another function is called
        (PRIVATE.replace("* _power", "* _square") + "\n\ndef _square(r):\n    return r\n", "stale"),
    ],
)
def test_private_functions_of_a_file_may_have_other_names_there(repository, text, state):
    other = "def _power(x):\n    return x\n\n\ndef _square(x):\n    return x\n\n\ncube = _square\n"
    claim = repository.measured(repository.commit(part__a=PRIVATE, other=other))
    repository.commit(part__a=text)
    assert repository.state(claim).name == state


PRIVATE_METHOD = """class Area:
    def of(self, r):
        return 3 * self._power(r)

    def _power(self, r):
        return r**2
"""


@pytest.mark.parametrize(
    ("text", "state"),
    [
        # the old name is another class's method elsewhere
        (PRIVATE_METHOD.replace("_power", "_square"), "fresh"),
        # renamed in the definition alone; to a name that a class elsewhere has
        (PRIVATE_METHOD.replace("def _power", "def _square"), "stale"),
        (PRIVATE_METHOD.replace("_power", "_cube"), "stale"),
        (PRIVATE_METHOD.replace("_power", "__square__"), "stale"),
        (PRIVATE_METHOD.replace("_power", "_square").replace("r**2", "r**3"), "stale"),
    ],
)
def test_private_methods_may_have_other_names_that_were_nowhere(repository, text, state):
    other = "class Base:\n    def _power(self): ...\n    def _cube(self): ...\n"
    claim = repository.measured(repository.commit(part__a=PRIVATE_METHOD, other=other))
    repository.commit(part__a=text)
    assert repository.state(claim).name == state


SQUARE = "def square(x):\n    return x**2\n"
USE_SQUARE = "from tools.square import square\n\n\ndef area(r):\n    return 3 * square(r)\n"


@pytest.mark.parametrize(
    ("names", "state"),
    [
        # in the file that defines it and in the one that imports it; a file elsewhere has its own
        (("second_power", "second_power"), "fresh"),
        # in one of the two alone
        (("second_power", "square"), "stale"),
        (("square", "second_power"), "stale"),
        # to the name of something else in the earlier project
        (("cube", "cube"), "stale"),
    ],
)
def test_functions_may_have_other_names_in_a_file_and_its_importers(repository, names, state):
    other = "def square(x):\n    return [x]\n\n\ndef cube(x):\n    return x**3\n"
    files = {"tools__square": SQUARE, "part__use": USE_SQUARE, "other": other}
    claim = repository.measured(repository.commit(**files), paths=["part/", "tools/"])
    defined, used = names
    repository.commit(
        tools__square=SQUARE.replace("square", defined),
        part__use=re.sub("(?<!tools.)square", used, USE_SQUARE),
    )
    assert repository.state(claim).name == state


USE_MODULE = "from tools import square\n\n\ndef area(r):\n    return 3 * square.square(r)\n"
USE_MODULES = """from tools import cube, square


def difference(r):
    return square.power(r) - cube.power(r)
"""


@pytest.mark.parametrize(
    ("text", "state"),
    [
        # the function is in another file now, and read there
        (
            USE_MODULE.replace("square.square", "moved.square").replace(
                "import square", "import moved"
            ),
            "fresh",
        ),
        # another file's function of that name
        (
            USE_MODULE.replace("square.square", "cube.square").replace(
                "import square", "import cube"
            ),
            "stale",
        ),
        # another name of that module; the module itself handed on; the alias bound to another thing
        (USE_MODULE.replace("square.square(r)", "square.cube(r)"), "stale"),
        (USE_MODULE.replace("square.square(r)", "getattr(square, 'square')(r)"), "stale"),
        (USE_MODULE.replace("area(r)", "area(r, square)"), "stale"),
    ],
)
def test_a_function_read_from_its_module_may_move(repository, text, state):
    files = {"tools__square": SQUARE, "tools__cube": SQUARE.replace("2", "3")}
    files["part__use"] = USE_MODULE
    claim = repository.measured(repository.commit(**files), paths=["part/", "tools/"])
    files |= {"tools__square": "", "tools__moved": SQUARE} if state == "fresh" else {}
    repository.commit(**files | {"part__use": text})
    assert repository.state(claim).name == state


WITHIN = """def area(r):
    from tools.square import cube, square

    assert r > 0, "no radius"
    return square(r) + cube(r)
"""


@pytest.mark.parametrize(
    ("text", "state"),
    [
        # one of them is imported from the file where it is now; another message of an assertion
        (
            WITHIN.replace(
                "square import cube, square",
                "square import square\n    from tools.cube import cube",
            ),
            "fresh",
        ),
        (WITHIN.replace("no radius", "a negative radius"), "fresh"),
        (WITHIN.replace("r > 0", "r >= 0"), "stale"),
        (WITHIN.replace("import cube, square", "import square as cube, square"), "stale"),
    ],
)
def test_imports_within_a_function_may_be_of_other_files(repository, text, state):
    cube = "def cube(x):\n    return x**3\n"
    claim = repository.measured(
        repository.commit(tools__square=SQUARE + "\n\n" + cube, part__use=WITHIN),
        paths=["part/", "tools/"],
    )
    repository.commit(tools__square=SQUARE, tools__cube=cube)
    repository.commit(part__use=text)
    if "tools.cube" not in text:
        repository.commit(tools__square=SQUARE + "\n\n" + cube, tools__cube="")
    assert repository.state(claim).name == state


def test_functions_of_one_name_in_two_modules_are_not_exchanged(repository):
    files = {"tools__square": "def power(x):\n    return x**2\n"}
    files |= {"tools__cube": "def power(x):\n    return x**3\n", "part__use": USE_MODULES}
    claim = repository.measured(repository.commit(**files), paths=["part/", "tools/"])
    exchanged = USE_MODULES.replace("square.power(r) - cube", "cube.power(r) - square")
    repository.commit(part__use=exchanged)
    assert repository.state(claim).name == "stale"


FIELDS = """class Rows:
    def __init__(self, mask, scale=1):
        self.mask = mask
        self.scale = scale

    def known(self):
        return len(self.mask)

    @property
    def size(self):
        return 2 * self.scale


class Kept(Base):
    def take(self, rows):
        return rows[self.kept]

    @property
    def width(self):
        return self.kept


def total(rows, scale):
    values = [scale * each + rows.size for each in rows.mask]
    return {"mask": sum(values)}
"""


@pytest.mark.parametrize(
    ("names", "state"),
    [
        # a field; a parameter
        ({".mask": ".weights"}, "fresh"),
        ({"total(rows": "total(table", "rows.": "table."}, "fresh"),
        # a property; one that another class may override, one in one place alone
        ({"size": "num_rows"}, "fresh"),
        ({"width": "num_columns"}, "stale"),
        ({"rows.size": "rows.num_rows"}, "stale"),
        # that a call elsewhere names; the field in one place alone; to a name that was elsewhere;
        # a key of a result
        ({"total(rows, scale": "total(rows, factor", "scale * each": "factor * each"}, "stale"),
        ({"rows.mask": "rows.weights"}, "stale"),
        ({".mask": ".scaled"}, "stale"),
        ({'"mask"': '"weights"'}, "stale"),
        # a method; a variable where another has the old name; two to one
        ({"known": "number"}, "stale"),
        # a parameter of a method that another class may call or override
        ({"take(self, rows": "take(self, table", "rows[": "table["}, "stale"),
        (
            {"[scale * each": "[total_scale * each", "rows, scale": "rows, scale, total_scale"},
            "stale",
        ),
        ({".mask": ".weights", ".scale": ".weights"}, "stale"),
    ],
)
def test_fields_and_parameters_may_have_names_that_were_nowhere(repository, names, state):
    other = "def known(scaled):\n    return scaled.mask, scaled.scale, total(scaled, scale=2)\n"
    other += "\n\ndef size(other):\n    return other.size() + other.width()\n"
    claim = repository.measured(repository.commit(part__a=FIELDS, other=other))
    text = FIELDS
    for before, after in names.items():
        text = text.replace(before, after)
    repository.commit(part__a=text)
    assert repository.state(claim).name == state


NAMED = """from part import load

PACKAGE = "part"
TABLE = {
    "square": f"{PACKAGE}.powers:square",
    "cube": "part.powers:cube",
    "one": "part.one:RULES",
    "two": "part.two:RULES",
}
"""
CUBE = "def cube(x):\n    return x**3\n"


@pytest.mark.parametrize(
    ("texts", "files", "state"),
    [
        # both are in files of their own now, and named there
        ({".powers:sq": ".squares:sq", "powers:c": "cubes:c"}, {}, "fresh"),
        # where another function has the name; where none has; which two files have
        ({".powers:sq": ".squares:sq", "powers:c": "wrong:c"}, {"part__cubes": ""}, "stale"),
        ({".powers:sq": ".squares:sq", "powers:c": "cubes:c"}, {"part__cubes": ""}, "stale"),
        ({".powers:sq": ".squares:sq", "powers:c": "cubes:c"}, {"part__copy": SQUARE}, "stale"),
        # another function; two of one name exchanged
        ({".powers:square": ".powers:cube"}, {"part__powers": SQUARE + CUBE}, "stale"),
        (
            {"one:": "three:", "two:": "one:", "three:": "two:"},
            {"part__powers": SQUARE + CUBE},
            "stale",
        ),
    ],
)
def test_a_definition_that_a_text_names_may_move(repository, texts, files, state):
    first = {"part__powers": SQUARE + CUBE, "part__use": NAMED}
    first["part__wrong"] = CUBE.replace("3", "4")
    claim = repository.measured(repository.commit(**first))
    text = NAMED
    for before, after in texts.items():
        text = text.replace(before, after)
    moved = {"part__powers": "", "part__squares": SQUARE, "part__cubes": CUBE}
    kept = moved if "part__powers" not in files else {}
    repository.commit(**kept | files, part__use=text)
    assert repository.state(claim).name == state


USE_PACKAGE = """from tools.shapes import rows, square


def area(r, unit):
    return square(r) * unit(rows)
"""
SHAPES = {"tools__shapes__": "from tools.shapes.plane import square\n"}
SHAPES |= {"tools__shapes__plane": SQUARE, "tools__shapes__rows": "WIDTH = 2\n"}


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({}, "fresh"),
        # the package has another function, or another module, by the name; or none
        ({"tools__forms__": "from tools.cube import square\n"}, "stale"),
        ({"tools__forms__rows": "WIDTH = 3\n"}, "stale"),
        ({"tools__forms__": ""}, "stale"),
        ({"tools__forms__rows": None}, "stale"),
    ],
)
def test_what_a_package_imports_may_come_from_another_package(repository, files, state):
    other = {"tools__cube": SQUARE.replace("2", "3"), "other": "shapes = forms = 1\n"}
    claim = repository.measured(
        repository.commit(**SHAPES, **other, part__use=USE_PACKAGE), paths=["part/"]
    )
    moved = {name.replace("shapes", "forms"): text for name, text in SHAPES.items()}
    moved = {name: text.replace("shapes", "forms") for name, text in moved.items()} | files
    kept = {name: text for name, text in moved.items() if text is not None}
    repository.commit(**kept, part__use=USE_PACKAGE.replace("shapes", "forms"))
    assert repository.state(claim).name == state


def test_an_import_of_another_function_is_no_rename(repository):
    other = "def cube(x):\n    return x**3\n"
    files = {"tools__square": SQUARE, "part__use": USE_SQUARE, "tools__other": other}
    claim = repository.measured(repository.commit(**files), paths=["part/", "tools/"])
    repository.commit(part__use=USE_SQUARE.replace("square import square", "other import cube"))
    assert repository.state(claim).name == "stale"
    repository.commit(
        tools__other=other.replace("cube", "power"),
        part__use=USE_SQUARE.replace("tools.square", "tools.other").replace("square", "power"),
    )
    assert repository.state(claim).name == "stale"


@pytest.mark.parametrize(
    ("text", "state"),
    [
        (TWO + TWICE, "fresh"),
        (TWO + TWICE.replace("2", "3"), "stale"),
        (TWO.replace("1", "0") + TWICE, "stale"),
    ],
)
def test_a_file_may_be_joined_to_one_that_the_claim_watches(repository, text, state):
    first = {"tools__a": TWO, "tools__use": USE.format(module="other"), "tools__other": TWICE}
    paths = ["tools/a.py", "tools/use.py"]
    claim = repository.measured(repository.commit(**first), paths=paths)
    repository.git("rm", "-q", "tools/other.py")
    repository.commit(tools__a=text, tools__use=USE.format(module="a"))
    assert repository.state(claim).name == state


def test_a_removed_file_makes_a_claim_stale(repository):
    claim = repository.measured(repository.commit(part__a="n = 1", part__b="n = 2"))
    repository.git("rm", "-q", "part/a.py")
    assert repository.state(claim) == State("stale", ("part/a.py",))


def test_a_renamed_file_is_followed_where_its_content_is_the_same_and_the_paths_have_it(repository):
    text = "".join(f"line {n}\n" for n in range(50))
    commit = repository.commit(part__a=text, part__keep="n = 0")
    repository.git("mv", "part/a.py", "part/b.py")
    assert repository.state(repository.measured(commit)).name == "fresh"
    repository.commit(part__b=text.replace("line 7\n", "import other\n"))
    assert repository.state(repository.measured(commit)).name == "stale", "nearly the same"


def test_a_folder_that_is_renamed_with_the_records_paths_is_followed(repository):
    commit = repository.commit(old__a="a = " + "1" * 99, old__b="b = " + "2" * 99)
    repository.git("mv", "old", "new")
    repository.commit()
    assert repository.state(repository.measured(commit, paths=["new/"])).name == "fresh"
    gone = repository.state(repository.measured(commit, paths=["old/"]))
    assert gone == State("stale", ("old/a.py", "old/b.py"))


def test_a_commit_that_the_clone_does_not_have_is_unknown(repository, tmp_path_factory):
    first = repository.commit(part__a="n = 1")
    repository.commit(part__a="n = 2")
    assert repository.state(repository.measured("0" * 40)).name == "unknown"
    assert repository.state(repository.measured("no commit")).name == "unknown"
    shallow = tmp_path_factory.mktemp("shallow")
    origin = f"file://{repository.root}"
    subprocess.run(["git", "clone", "-q", "--depth", "1", origin, shallow], check=True)
    claim = repository.measured(first)
    assert repository.state(claim).name == "stale"
    assert states(shallow, [claim])["sum"] == State("unknown")


def test_outside_a_repository_and_without_git_claims_are_unknown(tmp_path, monkeypatch):
    claim = Claim("x", "numbers", "", "", "", [], "", [], 1, {}, Measured("1", "abc", "", ""))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert states(tmp_path, [claim])["x"].name == "unknown"
    monkeypatch.setenv("PATH", "")
    assert states(tmp_path, [claim])["x"].name == "unknown"


def test_what_moves_into_and_out_of_the_paths():
    changes = [("part/a.py", "other/a.py"), ("other/b.py", "part/b.py"), ("part2/c.py",)]
    assert changed_files(changes, ["part/"]) == ["part/a.py"]


def test_kernels_of_gpus_concern_the_claims_that_name_their_folder():
    changes = [("kernels/r1_kernels/primitives/policy_triton.py",)]
    assert changed_files(changes, ["kernels/r1_kernels/"]) == []
    assert changed_files(changes, ["kernels/r1_kernels/primitives/"]) == [*changes[0]]
    plain = [("kernels/r1_kernels/primitives/policy_torch.py",)]
    assert changed_files(plain, ["kernels/r1_kernels/"]) == [*plain[0]]


def test_measuring_writes_figure_commit_day_and_machine_and_renders_the_page(repository, capsys):
    commit = repository.commit(part__a="n = 1")
    repository.claim(command="echo total 1; echo total 1,234 and more")
    assert main(["measure"], repository.root) == 0
    record = repository.record()
    assert record["measured"]["figure"] == "1,234 in all", "the last match"
    assert commit.startswith(record["measured"]["commit"]) and "failed" not in record
    assert "cores" in record["measured"]["machine"]
    assert "1,234 in all" in (repository.root / PAGE).read_text()
    assert "1,234 in all" in capsys.readouterr().out
    repository.commit()
    assert repository.state(read_claims(repository.root)[0]).name == "fresh"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("for i in $(seq 99); do echo line $i; done; exit 7", "exit status 7"),
        ("false | cat; echo line 99", "matches total"),
        ("cat missing | echo total 5", "exit status 1"),
        ("echo total 11; echo line 99", "total is 11"),
        ("echo total 1; echo line 99", "total is 1,"),
        ("echo line 99; echo total 5; echo 2 > part/a.py", "changed while it ran"),
        ("echo line 99; sleep 1000", "limit of 1 s"),
    ],
)
def test_a_failure_is_kept_beside_the_earlier_figure_and_said(repository, capsys, command, reason):
    commit = repository.commit(part__a="n = 1")
    repository.commit(part__a="n = 3")
    before = repository.measured(commit, command=command, bounds={"total": [2, 10]})
    seconds = "1" if "sleep" in command else "10000"
    assert main(["measure", "sum", "--limit", seconds], repository.root) == 1
    after = read_claims(repository.root)[0]
    assert after.measured == before.measured and after.seconds == before.seconds
    assert reason in after.failed.reason
    said = capsys.readouterr().out
    assert reason in said and f"the figure of {commit} stays: 3 in all" in said
    assert repository.state(after).text.startswith("stale; failed 20")
    assert "| stale; failed 20" in (repository.root / PAGE).read_text()


def test_of_a_failures_output_the_end_is_kept_and_a_success_removes_it(repository):
    repository.commit(part__a="n = 1")
    repository.claim(command="for i in $(seq 99); do echo line $i; done; pwd; exit 7")
    assert main(["measure"], repository.root) == 1
    failed = repository.record()["failed"]
    tail = failed["tail"].splitlines()
    assert tail[-2:] == ["line 99", "."] and "line 9" not in tail, "without this machine's folders"
    assert repository.state(read_claims(repository.root)[0]).text.startswith(
        "not measured; failed 20"
    )
    write_claim(repository.root, replace(read_claims(repository.root)[0], command="echo total 4"))
    assert main(["measure"], repository.root) == 0
    assert "failed" not in repository.record()
    assert repository.record()["measured"]["figure"] == "4 in all"


def test_what_is_not_committed_is_not_measured(repository, capsys):
    repository.commit(part__a="n = 1")
    repository.claim()
    (repository.root / "part/a.py").write_text("2")
    assert main(["measure"], repository.root) == 1
    assert "measured" not in repository.record()
    assert "commit part/a.py first" in capsys.readouterr().out


def test_a_speed_is_measured_beside_other_work_only_where_it_is_named(repository, monkeypatch):
    repository.commit(part__a="n = 1")
    repository.claim(topic="speed")
    assert main(["measure"], repository.root) == 1
    assert "measured" not in repository.record()
    assert main(["measure", "sum"], repository.root) == 0
    assert "1.5 busy" in repository.record()["measured"]["machine"]
    assert "1.5 busy" in (repository.root / PAGE).read_text()
    repository.commit(part__a="n = 2")
    monkeypatch.setattr(measure, "busy_cores", lambda: 0.1)
    assert main(["measure"], repository.root) == 0
    assert "0.1 busy" in repository.record()["measured"]["machine"]


def test_cores_that_work_are_counted():
    spin = [sys.executable, "-c", "while True: pass"]
    process = subprocess.Popen(spin)
    try:
        # A machine that is busy with other work has at least one busy core as well.
        assert measure.busy_cores(0.5) > 0.5
    finally:
        process.kill()
        process.wait()


def test_the_shortest_comes_first_what_has_failed_on_these_files_last_and_fresh_ones_never(
    repository,
):
    old = repository.commit(part__a="n = 1")
    new = repository.commit(part__a="n = 2")
    failed = Failed("exit status 1", new, "2026-01-02", "a machine", "")
    repository.measured(new, id="fresh", seconds=1)
    repository.measured(old, id="failed", seconds=2, failed=failed)
    repository.measured(old, id="failed_before", seconds=5, failed=replace(failed, commit=old))
    repository.measured("0" * 40, id="unknown", seconds=4)
    repository.measured(old, id="stale", seconds=3)
    repository.claim(id="never", seconds=6)
    names = [claim.id for claim in measuring_order(repository.root, read_claims(repository.root))]
    assert names == ["stale", "unknown", "failed_before", "never", "failed"]


def test_a_second_start_goes_on_where_the_first_was_stopped(repository):
    """The third command stops the whole of the first start, as a kill does."""
    repository.commit(part__a="n = 1")
    for number in (1, 2, 4):
        command = f"echo x >> runs_of_{number}; echo total {number}"
        repository.claim(id=f"n{number}", seconds=number, command=command)
    stop = "test -e stopped || { touch stopped; kill -9 $PPID; exit; }; echo total 3"
    repository.claim(id="n3", seconds=3, command=stop)
    start = [sys.executable, "-c", "from tools.evidence.command import main, Path; import sys; "]
    start[-1] += f"sys.exit(main(['measure'], Path({str(repository.root)!r})))"
    assert subprocess.run(start, cwd=ROOT, capture_output=True).returncode == -9
    figures = [repository.record(f"n{n}").get("measured", {}).get("figure") for n in (1, 2, 3, 4)]
    assert figures == ["1 in all", "2 in all", None, None]
    assert subprocess.run(start, cwd=ROOT, capture_output=True).returncode == 0
    figures = [repository.record(f"n{n}")["measured"]["figure"] for n in (1, 2, 3, 4)]
    assert figures == ["1 in all", "2 in all", "3 in all", "4 in all"]
    counts = [(repository.root / f"runs_of_{n}").read_text().count("x") for n in (1, 2, 4)]
    assert counts == [1, 1, 1]


def test_processes_that_a_command_leaves_are_ended(repository):
    repository.commit(part__a="n = 1")
    repository.claim(command="sleep 1000 & echo $! > pid; echo total 1")
    assert main(["measure"], repository.root) == 0
    pid = (repository.root / "pid").read_text().strip()
    wait_until(lambda: has_ended(pid))


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_a_claim_that_does_not_exist_is_named(repository, capsys):
    repository.claim()
    with pytest.raises(SystemExit):
        main(["measure", "som"], repository.root)
    assert "no such claim: som; there are sum" in capsys.readouterr().err


def test_status_prints_state_and_changed_files(repository, capsys):
    repository.measured(repository.commit(part__a="n = 1"))
    repository.commit(part__a="n = 2")
    assert main(["status"], repository.root) == 0
    line, last = capsys.readouterr().out.splitlines()
    assert line.split() == ["sum", "stale", "1", "s", "part/a.py"]
    assert last == "1 claims: 1 stale"


def test_what_the_files_of_a_command_import_is_watched_or_named(repository):
    files = {
        "megatron_r1__one": "",
        "megatron_r1__two": "",
        "megatron_r1__three__part": "",
        "tests__helper": "import megatron_r1.two",
        "tests__deep__test_a": "import helper\nfrom megatron_r1.one import name",
        "tests__deep__test_b": "def f():\n    from megatron_r1.three import part",
        "tests__chaos__oracle": "import megatron_r1.one, tools.bench.host",
        "tools__bench__host": "import megatron_r1.two",
        "tools__bench__push__scale": "import megatron_r1.two",
        "examples__demo": "import megatron_r1.two",
    }
    repository.commit(**files)

    def missing(command, *paths):
        claim = Claim("x", "speed", "", "", command, [], "", list(paths), 1)
        assert command_files(repository.root, claim)
        return unwatched_files(repository.root, claim)

    one, two, part = (f"megatron_r1/{name}.py" for name in ("one", "two", "three/part"))
    assert missing("pytest tests/deep/") == [one, part]
    assert missing("pytest tests/deep/", one, "megatron_r1/three/") == []
    assert missing("pytest tests/deep/test_a.py::test_x --deselect tests/deep/test_b.py") == [one]
    assert missing("make it && python -m examples.demo --folder x") == [two]
    assert missing("python tools/bench host --repeats 3") == [two, "tools/bench/host.py"]
    assert missing("python tools/bench push --simulate", "tools/bench/push/scale.py") == [two]
    assert missing("python tools/bench chaos", "tests/chaos/") == [one, "tools/bench/host.py"]


# The records of this repository.


def test_every_claim_watches_what_the_files_of_its_command_import():
    """A file that is missing belongs in `paths` of the claim's record, or its folder does."""
    claims = read_claims(ROOT)
    missing = {claim.id: unwatched_files(ROOT, claim) for claim in claims}
    assert {name: files for name, files in missing.items() if files} == {}


def without_states(page: str) -> str:
    """Return a page without what depends on the commit at which it was rendered."""
    page = re.sub(r"^At `.*$", "", page, flags=re.MULTILINE)
    return re.sub(r" \| [^|]* \|$", " |", page, flags=re.MULTILINE)


def test_the_page_is_what_is_rendered():
    """But for the states, which depend on the commits that a clone has and on its changes."""
    claims = read_claims(ROOT)
    rendered = render(claims, {claim.id: State("unknown") for claim in claims}, "")
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert without_states(page) == without_states(rendered), "run `python -m tools.evidence render`"


def test_without_states_leaves_all_but_the_states():
    claim = Claim("x", "speed", "A | b.", "README.md", "a | b", [], "", [], 5)
    first = render([claim], {"x": State("stale", ("a", "b"), "2026-01-02")}, "abc")
    assert first != render([claim], {"x": State("fresh")}, "")
    assert without_states(first) == without_states(render([claim], {"x": State("fresh")}, ""))
    other = render([replace(claim, seconds=6)], {"x": State("fresh")}, "")
    assert without_states(first) != without_states(other)
    assert "| A \\| b. [x](evidence/x.json), [page](../README.md) | `a \\| b`, 5 |" in first


def test_there_are_at_most_40_claims_and_each_can_be_measured_and_explained():
    claims = read_claims(ROOT)
    assert 0 < len(claims) <= 40
    for claim in claims:
        assert (ROOT / claim.page).is_file(), claim.id
        values = dict.fromkeys(name for each in claim.reads for name in re.compile(each).groupindex)
        claim.figure.format_map(values)
        assert claim.bounds.keys() <= values.keys(), claim.id
        paths = re.findall(r"(?:examples|tests|tools)/[\w./-]+", claim.command)
        for path in [*claim.paths, *paths]:
            assert any(ROOT.glob(path)), f"{claim.id}: {path} is gone"
