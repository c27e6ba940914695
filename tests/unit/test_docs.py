"""The documents name files, packages and commands that exist."""

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest

from megatron_r1.commands import cli
from megatron_r1.config import Config
from megatron_r1.pipeline.pipeline_recipe import PipelineRecipe
from megatron_r1.rehearse.settings import PreflightRecipe, RehearsalRecipe

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
IMPORT_CONTRACTS = SETTINGS["tool"]["importlinter"]["contracts"]
PLUGIN_CONTRACT = next(each for each in IMPORT_CONTRACTS if "vLLM plugin" in each["name"])
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    if not page.name.startswith("CHANGELOG")  # history: what was true then
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


def test_links_lead_to_headings():
    def anchors(page):
        plain = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", line) for line in page.read_text().splitlines())
        heads = (line.lstrip("#").strip().lower() for line in plain if line.startswith("#"))
        return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in heads}

    def is_right(page, link):
        path, anchor = link
        target = (page.parent / path) if path else page
        return "://" in path or target.suffix != ".md" or anchor in anchors(target)

    assert wrong_in_pages(r"\]\(([^)#\s]*)#([^)\s]+)\)", is_right) == []


def test_every_program_of_ours_is_in_the_table_of_processes():
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    table = page.partition("### Where a package runs")[2].partition("\n### ")[0]
    named = re.findall(r"`([\w.]+)`", table)
    programs = {
        ".".join(file.relative_to(ROOT / "megatron_r1").with_suffix("").parts)
        for file in ROOT.glob("megatron_r1/**/*.py")
        if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
    }
    assert programs - set(named) == set()


def test_paths_of_the_repository_exist():
    paths = rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]+\.(?:py|md|yaml|sbatch|jsonl|json|txt))"
    assert wrong_in_pages(paths, lambda page, path: (ROOT / path).exists()) == []


def test_modules_that_are_named_exist():
    def is_right(page, module):
        path = ROOT / module.replace(".", "/")
        return path.with_suffix(".py").exists() or (path / "__main__.py").exists()

    assert wrong_in_pages(r"-m (megatron_r1[\w.]*|examples[\w.]*)", is_right) == []


def test_the_import_contract_orders_every_package():
    layers = IMPORT_CONTRACTS[0]["layers"]
    ordered = [name for layer in layers for name in re.findall(r"megatron_r1\.(\w+)", layer)]
    children = (ROOT / "megatron_r1").iterdir()
    entries = [p.stem for p in children if p.name[0] != "_" and (p.is_dir() or p.suffix == ".py")]
    assert sorted(entries) == sorted(ordered)


def test_import_contracts_name_every_package():
    packages = {
        name
        for layer in IMPORT_CONTRACTS[0]["layers"]
        for name in re.findall(r"megatron_r1\.\w+", layer)
    }
    named = {*PLUGIN_CONTRACT["source_modules"], *PLUGIN_CONTRACT["forbidden_modules"]}
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


def test_the_design_names_the_parts_of_push_that_the_plugin_imports():
    modules = PLUGIN_CONTRACT["source_modules"]
    parts = {name.rpartition(".")[2] for name in modules if ".push." in name}
    design = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    in_table = re.search(r"of `push`: (`\w+`(?:, `\w+`)*)", design)
    in_text = re.search(r"`push\.{([\w,]+)}`", design)
    assert in_table and set(re.findall(r"\w+", in_table[1])) == parts
    assert in_text and set(in_text[1].split(",")) == parts


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks/laptop-demo.md"])
def test_pages_show_the_figures_of_the_demos_record(page):
    text = (ROOT / "docs/evidence/demo.json").read_text(encoding="utf-8")
    base, trained = re.findall(r"[\d.]+%", json.loads(text)["measured"]["figure"])
    assert re.search(
        rf"{re.escape(base)}\W+{re.escape(trained)}", (ROOT / page).read_text(encoding="utf-8")
    )


def test_every_module_of_grading_is_public_or_protected():
    readme = (ROOT / "grading/README.md").read_text(encoding="utf-8")
    public = set(re.findall(r"^\| `(\w+)` \|", readme.partition("## What is public")[2], re.M))
    protected = {
        name.split(".")[1]
        for contract in IMPORT_CONTRACTS
        for name in contract.get("protected_modules", [])
    }
    there = {path.stem for path in (ROOT / "grading/r1_grading").glob("[a-z]*") if path.is_dir()}
    there |= {path.stem for path in (ROOT / "grading/r1_grading").glob("[a-z]*.py")}
    assert len(public) == 8 and there - public - protected == set()


def test_short_names_of_modules_exist():
    """`controller/loop` or `push/matching/rounds.py` in a document is a file of megatron_r1."""
    packages = {path.name for path in (ROOT / "megatron_r1").iterdir() if path.is_dir()}
    # Prefixes of metrics and of spans: `push/bytes`.
    prefixes = {"controller", "engines", "push", "trainer"}

    def is_right(page, short):
        path = ROOT / "megatron_r1" / short
        package, _, rest = short.partition("/")
        is_one = package in packages and (package not in prefixes or bool(re.search("[/.]", rest)))
        return not is_one or path.exists() or path.with_suffix(".py").exists()

    assert wrong_in_pages(r"`((?:\w+/)+\w+(?:\.py)?/?)`", is_right) == []


def test_functions_that_a_response_passes_exist():
    """In docs/README.md and in the loop's docstring, each below the classes that it names."""

    def has(body, names):
        if not names:
            return True
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in body if isinstance(node, kinds) and node.name == names[0]]
        return any(has(node.body, names[1:]) for node in nodes)

    def wrong_rows(text, roots):
        rows = re.findall(r"^ *(\S+\.py) +([\w.]+)$", text, re.M)
        assert len(rows) > 10, "the pattern is wrong"
        sources = [next(filter(Path.is_file, (root / path for root in roots))) for path, _ in rows]
        trees = [ast.parse(source.read_text(encoding="utf-8")) for source in sources]
        pairs = zip(rows, trees, strict=True)
        return [row for row, tree in pairs if not has(tree.body, row[1].split("."))]

    page = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert wrong_rows(page, [ROOT]) == []
    loop = (ROOT / "megatron_r1/controller/loop.py").read_text(encoding="utf-8")
    roots = [ROOT / folder for folder in ("megatron_r1", "grading", "kernels")]
    assert wrong_rows(ast.get_docstring(ast.parse(loop)), roots) == []


@pytest.mark.more
def test_the_tables_that_a_contributor_adds_a_line_to_exist():
    """Each `NAME` in `file.py` of CONTRIBUTING.md, the path relative to some folder."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    pairs = re.findall(r"`([A-Z][A-Z_]+)`[^|`]*(?: or `[A-Z_]+` )?(?:in|of) `([\w/]+\.py)`", page)
    assert len(pairs) >= 6, "the pattern is wrong"
    for name, path in pairs:
        files = [file for file in ROOT.glob(f"*/**/{path}") if ".venv" not in str(file)]
        texts = [
            file.read_text(encoding="utf-8") for file in [ROOT / path, *files] if file.exists()
        ]
        assert any(re.search(rf"^{name}\b", text, re.M) for text in texts), (name, path)


def test_verbs_and_sections_share_a_name_with_package_and_page_or_are_exceptions():
    """The exceptions are the first column of a table of docs/design.md; the sentence before it has
    the verbs with a page, whose code is in `commands`."""
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    before, _, after = page.partition("with these exceptions:")
    with_page = set(re.findall("`([^`]+)`", before[before.rindex("`compare`") :]))
    table = after.strip().partition("\n\n")[0]
    exceptions = {
        name for row in table.splitlines() for name in re.findall("`([^`]+)`", row.split("|")[1])
    }
    settings = [Config, PipelineRecipe, RehearsalRecipe, PreflightRecipe]
    sections = {name for model in settings for name in model.model_fields}
    code = cli.VERB_MODULES | cli.SELF_PARSING_VERBS
    verbs = set(code)
    for verb in verbs:
        assert code[verb].split(".")[2] == verb.replace("-", "_")
    packages = {path.name for path in (ROOT / "megatron_r1").iterdir() if path.is_dir()}
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    same = packages & pages
    assert exceptions == (verbs | sections) - same - with_page
    assert with_page == (verbs & pages) - packages - exceptions


def test_every_folder_of_a_package_has_a_row_in_the_map():
    """Or is named in the row of its package, with a slash; rows name no other folders."""
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")

    def rows(head):
        table = page.partition(head)[2].partition("\n\n")[0]
        return [row.split("|")[1:3] for row in table.splitlines() if row.startswith("| `")]

    of_folders = rows("| folder | what it has |")
    in_own_rows = [name for cell, _ in of_folders for name in re.findall("`([^`]+)`", cell)]
    in_rows_of_packages = [
        f"{package}/{name}"
        for cell, text in rows("| package | what it does |")
        for package in re.findall("`([^`]+)`", cell)
        for name in re.findall(r"`(\w+)/`", text)
    ]
    assert in_rows_of_packages, "the pattern is wrong"
    root = ROOT / "megatron_r1"
    folders = {str(file.parent.relative_to(root)) for file in root.glob("*/*/**/__init__.py")}
    assert sorted(in_own_rows + in_rows_of_packages) == sorted(folders)


def test_names_in_package_docstrings_exist():
    """A bare name is a module, or is defined or quoted in the package."""
    parts = [ROOT / "megatron_r1", ROOT / "grading/r1_grading", ROOT / "kernels/r1_kernels"]
    paths = {path for part in parts for path in part.rglob("*") if path.suffix in ("", ".py")}
    modules = {path.stem for path in paths}
    wrong = []
    for package in (path for path in paths if path.name == "__init__.py"):
        docstring = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
        files = package.parent.rglob("*.py")
        code = "\n".join(path.read_text(encoding="utf-8") for path in files)
        for name in set(re.findall(r"`([a-z_]+)(?:\.py)?`", docstring)) - modules:
            defined = rf'^ *(?:async )?(?:def|class) {name}\b|^ *{name}\b ?[:=]|"{name}"'
            if not re.search(defined, code, re.M):
                wrong.append(f"{package.relative_to(ROOT)}: {name}")
    assert wrong == []


def test_files_in_folders_of_ours_exist():
    """`transports/gloo.py` in a document is a file in a folder of this repository."""
    tracked = [path for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.py")]
    names = ["/" + path.relative_to(ROOT).as_posix() for path in tracked]
    folders = {path.parent.name for path in tracked}

    def is_right(page, short):
        return short.split("/")[0] not in folders or any(n.endswith("/" + short) for n in names)

    assert wrong_in_pages(r"`((?:\w+/)+\w+\.py)\b", is_right) == []


def test_new_names_of_renamed_modules_exist():
    """In the tables old name | new name of a version that is not released."""
    sections = (ROOT / "CHANGELOG_RENAMES.md").read_text(encoding="utf-8").split("\n## ")
    rows = [(s, *row) for s in sections for row in re.findall(r"\| `([\w.]+)` \| `([\w.]+)` \|", s)]
    assert len(rows) > 40, "the pattern is wrong"

    def is_right(old, new):
        path = ROOT / new.replace(".", "/")
        return old != new and (path.is_dir() or path.with_suffix(".py").is_file())

    in_work = [row for section, *row in rows if "(unreleased)" in section.partition("\n")[0]]
    assert [row for row in in_work if not is_right(*row)] == []


def test_dotted_names_of_modules_exist():
    """`trainer.operations` in a document is a module or a name of one (code: test_references)."""
    # Packages that share their name with no section of a recipe.
    packages = "base|commands|controller|engines|evaluation|models|plan|rehearse|reporting|trainer"

    def exists(path, dotted):
        if not path.is_relative_to(ROOT):
            return False
        for part in dotted.split("."):
            if (path / part).is_dir() or (path / f"{part}.py").is_file():
                path /= part
                continue
            source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            return source.is_file() and bool(
                re.search(rf"\b{part}\b", source.read_text(encoding="utf-8"))
            )
        return True

    wrong, found = [], 0
    for file in PAGES:
        # A name with "(" is a call of an object's method.
        pattern = rf"`((?:{packages})(?:\.\w+)+)(?![\w(])"
        for name in re.findall(pattern, file.read_text(encoding="utf-8")):
            found += 1
            is_file = name.endswith((".json", ".jsonl", ".py", ".yaml"))
            below = [ROOT / "megatron_r1", ROOT / "megatron_r1/push", *file.parents]
            if not is_file and not any(exists(base, name) for base in below):
                wrong.append(f"{file.relative_to(ROOT)}: {name}")
    assert found > 20
    assert wrong == []
