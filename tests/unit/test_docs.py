"""The documents name files, packages and commands that exist."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    if page.name != "CHANGELOG.md"  # history: what was true then
)
FOLDERS = "docs|examples|grading|kernels|megatron_r1|requirements|tests|tools"


def wrong_in_pages(pattern, is_right):
    """What matches `pattern` in a page and is not right there, as "page: match"."""
    found = [
        (page, match)
        for page in PAGES
        for match in re.findall(pattern, page.read_text(encoding="utf-8"))
    ]
    assert len(found) > 5, "the pattern is wrong"
    return [
        f"{page.relative_to(ROOT)}: {match}" for page, match in found if not is_right(page, match)
    ]


def test_links_lead_to_files():
    def is_right(page, link):
        return "://" in link or (page.parent / link).exists()

    assert wrong_in_pages(r"\]\(([^)#\s]+)[^)]*\)", is_right) == []


def test_paths_of_the_repository_exist():
    paths = rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]+\.(?:py|md|yaml|sbatch|jsonl|json|txt))"
    assert wrong_in_pages(paths, lambda page, path: (ROOT / path).exists()) == []


def test_modules_that_are_named_exist():
    def is_right(page, module):
        path = ROOT / module.replace(".", "/")
        return path.with_suffix(".py").exists() or (path / "__main__.py").exists()

    assert wrong_in_pages(r"-m (megatron_r1[\w.]*|examples[\w.]*)", is_right) == []


def test_the_import_contract_orders_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    ordered = [name for layer in layers for name in re.findall(r"megatron_r1\.(\w+)", layer)]
    children = (ROOT / "megatron_r1").iterdir()
    entries = [p.stem for p in children if p.name[0] != "_" and (p.is_dir() or p.suffix == ".py")]
    assert sorted(entries) == sorted(ordered)


def test_import_contracts_name_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers, *contracts = settings["tool"]["importlinter"]["contracts"]
    packages = {
        name for layer in layers["layers"] for name in re.findall(r"megatron_r1\.\w+", layer)
    }
    plugin = next(each for each in contracts if "vLLM plugin" in each["name"])
    named = {*plugin["source_modules"], *plugin["forbidden_modules"]}
    in_parts = {"megatron_r1.base", "megatron_r1.engines", "megatron_r1.push"}
    assert packages - named == in_parts
    for package in in_parts:
        folder = ROOT / package.replace(".", "/")
        names = {
            f"{package}.{path.stem}"
            for path in folder.iterdir()
            if path.name[0] != "_" and (path.is_dir() or path.suffix == ".py")
        }
        assert names - named <= {"megatron_r1.base.processes", "megatron_r1.base.transports"}


def test_short_names_of_modules_exist():
    """`controller/loop` or `push/plan/planner.py` in a document is a file of megatron_r1."""
    packages = {path.name for path in (ROOT / "megatron_r1").iterdir() if path.is_dir()}
    # Prefixes of metrics and of spans: `push/bytes`.
    prefixes = {"controller", "engines", "push", "trainer"}

    def is_right(page, short):
        path = ROOT / "megatron_r1" / short
        room, _, rest = short.partition("/")
        is_one = room in packages and (room not in prefixes or bool(re.search("[/.]", rest)))
        return not is_one or path.exists() or path.with_suffix(".py").exists()

    assert wrong_in_pages(r"`((?:\w+/)+\w+(?:\.py)?/?)`", is_right) == []
