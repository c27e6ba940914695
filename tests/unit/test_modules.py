"""Every module can be imported: what is evaluated at import, annotations among it, is defined. And
every file of tests has a name of its own, and imports what exists."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tools.evidence.renames import public_names

ROOT = Path(__file__).parents[2]
HOMES = {"megatron_r1": ROOT, "r1_kernels": ROOT / "kernels", "r1_grading": ROOT / "grading"}
"""Package -> the folder that it is in."""
PROGRAM = """
import importlib, sys
from megatron_r1.models import platform

platform.prepare_process()  # before anything imports Megatron
for module in sys.stdin.read().split():
    importlib.import_module(module)
"""


@pytest.mark.more
def test_every_module_is_imported_without_an_error():
    modules = [
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        for package, folder in HOMES.items()
        for path in sorted((folder / package).rglob("*.py"))
        # vLLM's process imports the plugin; programs inside the sandbox and __main__ run at import
        if "plugin" not in path.parts and not path.stem.startswith(("inside_", "__main__"))
    ]
    assert len(modules) > 300
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, input="\n".join(modules), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_names_that_packages_import_at_first_use_are_defined():
    homes = {}
    for package, folder in HOMES.items():
        for path in (folder / package).rglob("__init__.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
                if name in ("_MODULE_BY_NAME", "_MODULES"):
                    homes[path.parent] = ast.literal_eval(node.value)
    assert len(homes) == 3
    for folder, modules in homes.items():
        for name, module in modules.items():
            path = folder / module
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            assert name in public_names(path.read_text(encoding="utf-8")), (name, path)


def test_no_two_test_files_have_the_same_name():
    # pytest imports them by it, as folders of tests are no packages.
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.more
def test_programs_of_tests_import_what_exists():
    """Those that tests start, too, which pytest never imports."""
    missing = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
                continue
            folder = HOMES.get(node.module.partition(".")[0])
            if folder is None:
                continue
            module = folder / node.module.replace(".", "/")
            source = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
            text = source.read_text(encoding="utf-8") if source.is_file() else ""
            missing += [
                f"{path.relative_to(ROOT)}: {node.module}.{alias.name}"
                for alias in node.names
                if not (module / alias.name).is_dir()
                and not (module / f"{alias.name}.py").is_file()
                and not re.search(rf"\b{re.escape(alias.name)}\b", text)
            ]
    assert missing == []
