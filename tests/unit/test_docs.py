"""The documents name files, packages and commands that exist."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    if page.name not in ("log.md", "CHANGELOG.md")  # history: what was true then
)
FOLDERS = "docs|examples|kernels|megatron_r1|requirements|tests|tools"


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_of_the_repository_exist(page):
    text = page.read_text(encoding="utf-8")
    paths = re.findall(
        rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]+\.(?:py|md|yaml|sbatch|json|txt))", text
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []
    tests = r"(?<![\w/.-])(?:unit|kernels|parallel|system|convert|cluster|gpu|replays)/test_\w+\.py"
    assert not re.findall(tests, text), "paths of tests begin with tests/"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"-m (megatron_r1[\w.]*|examples[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_map_lists_the_packages_that_the_import_contract_orders():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    ordered = [re.findall(r"megatron_r1\.(\w+)", layer) for layer in layers]
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)
    mapped: dict[int, list[str]] = {}
    for layer, package in rows:
        mapped.setdefault(int(layer), []).append(package)
    assert mapped == dict(enumerate(ordered, start=1))
    children = (ROOT / "megatron_r1").iterdir()
    entries = {p.stem for p in children if p.name[0] != "_" and (p.is_dir() or p.suffix == ".py")}
    assert entries == {package for layer in ordered for package in layer}


def test_import_contracts_name_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers, *contracts = settings["tool"]["importlinter"]["contracts"]
    packages = {
        name for layer in layers["layers"] for name in re.findall(r"megatron_r1\.\w+", layer)
    }
    plugin = next(each for each in contracts if "vLLM plugin" in each["name"])
    named = {*plugin["source_modules"], *plugin["forbidden_modules"]}
    assert packages - named == {"megatron_r1.processes", "megatron_r1.weight_sync"}


def test_a_package_s_list_of_files_has_all_its_files():
    for page in (ROOT / "megatron_r1").rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(page.read_text(encoding="utf-8"))) or ""
        listed = set(re.findall(r"(\w+)\.py\b", text))
        files = {path.stem for path in page.parent.glob("*.py")} - {"__init__"}
        if len(listed) > 2:  # else the docstring mentions a file or two
            assert listed == files, page


def test_the_list_of_pages_has_all_pages():
    listed = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in listed} == set()


def test_the_readme_is_one_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 130 and len(text.split()) <= 1200


def test_short_names_of_modules_exist():
    """`rl/loop` or `weight_sync/plan/planner.py` in a document is a file of megatron_r1."""
    packages = {path.name for path in (ROOT / "megatron_r1").iterdir() if path.is_dir()}
    packages.remove("rewards")  # also the prefix of metrics: `rewards/ungraded`
    wrong = []
    for page in PAGES:
        for short in re.findall(r"`((?:\w+/)+\w+(?:\.py)?/?)`", page.read_text(encoding="utf-8")):
            path = ROOT / "megatron_r1" / short
            if short.partition("/")[0] in packages and not (
                path.exists() or path.with_suffix(".py").exists()
            ):
                wrong.append(f"{name(page)}: {short}")
    assert wrong == []
