"""What the source files say about the structure: packages, imports, closure, sizes."""

import ast
import re
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = ("megatron_r1", "kernels/r1_kernels", "grading/r1_grading")
"""Folders whose files are the product's."""
ROLES = {
    "controller": ("megatron_r1.commands.cli", "megatron_r1.commands.rl"),
    "trainer rank": ("megatron_r1.trainer.rank", "megatron_r1.trainer.rank_server"),
    "engine": ("megatron_r1.engines.plugin", "megatron_r1.engines.plugin.serve"),
}
"""The modules with which the processes of `megatron-r1 rl` begin."""


def modules(root: Path, packages: Iterable[str] = PACKAGES) -> dict[str, Path]:
    """Return the files of the product, or of other folders, by their modules' names."""
    paths = {}
    for package in packages:
        parent = (root / package).parent
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(parent).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


def imports(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Yield the product's modules that a file imports, in functions too, but for type checkers."""
    for node in _runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            module = name if name in modules else name.rpartition(".")[0]
            if module in modules:
                yield module


def _runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _runtime_nodes(child)


def closure(modules: dict[str, Path], starts: tuple[str, ...]) -> set[str]:
    """Return the modules that `starts` can import, through others and with their packages."""
    module_names: set[str] = set()
    queue = list(starts)
    while queue:
        name = queue.pop()
        if name in module_names:
            continue
        module_names.add(name)
        queue += imports(modules[name], modules)
        if (parent := name.rpartition(".")[0]) in modules:
            queue.append(parent)
    return module_names


def package_imports(modules: dict[str, Path]) -> Counter[tuple[str, str]]:
    """Return the number of imports from one package of `megatron_r1` to another."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, path in modules.items():
        if name.startswith("megatron_r1."):
            for imported in imports(path, modules):
                if imported.startswith("megatron_r1."):
                    counts[name.split(".")[1], imported.split(".")[1]] += 1
    return Counter({pair: n for pair, n in counts.items() if pair[0] != pair[1]})


def num_lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def num_modules(root: Path) -> int:
    """Return the tracked Python files outside tests."""
    return sum(not name.startswith("tests/") for name in _tracked_files(root, "*.py"))


def _tracked_files(root: Path, pattern: str) -> list[str]:
    command = ["git", "ls-files", pattern]
    output = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout
    return output.splitlines()


def num_words(root: Path, with_code_blocks: bool = True) -> int:
    """Return the words of README, CONTRIBUTING and docs, as `wc -w` counts them.

    Args:
        root: the folder of the repository.
        with_code_blocks: whether commands, recipes and outputs in fences count."""
    pages = [root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md")]
    return _num_words(pages, with_code_blocks)


def num_markdown_words(root: Path) -> int:
    """Return the words of every Markdown file that git tracks, the changelogs included."""
    return _num_words(root / name for name in _tracked_files(root, "*.md"))


def _num_words(pages: Iterable[Path], with_code_blocks: bool = True) -> int:
    texts = (page.read_text(encoding="utf-8") for page in pages)
    if not with_code_blocks:
        texts = (re.sub(r"```.*?```", "", text, flags=re.S) for text in texts)
    return sum(len(text.split()) for text in texts)


def num_layers(root: Path) -> int:
    contracts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    layers = contracts["tool"]["importlinter"]["contracts"][0]["layers"]
    return len(layers)


def table(root: Path) -> str:
    """Return the figures, one a line."""
    all_modules = modules(root)
    names = [name for name in all_modules if name.startswith("megatron_r1.")]
    packages = {name.split(".")[1] for name in names if name.count(".") > 1}
    package_pairs = package_imports(all_modules)
    rows = {
        "packages of megatron_r1": len(packages),
        "layers": num_layers(root),
        "pairs of packages with imports": len(package_pairs),
        "imports between packages": sum(package_pairs.values()),
        "files": len(all_modules),
        "lines": num_lines(all_modules.values()),
    }
    for role, starts in ROLES.items():
        files = closure(all_modules, starts)
        rows[f"files that the {role} of `rl` can import"] = len(files)
    files = closure(all_modules, tuple(start for starts in ROLES.values() for start in starts))
    rows["files of all three"] = len(files)
    rows["lines of all three"] = num_lines(all_modules[name] for name in files)
    rows["Python files outside tests"] = num_modules(root)
    rows["words of README, CONTRIBUTING and docs/"] = num_words(root)
    rows["of them outside code blocks"] = num_words(root, with_code_blocks=False)
    rows["words of all tracked Markdown"] = num_markdown_words(root)
    rows["lines of tests"] = num_lines((root / "tests").rglob("*.py"))
    return "\n".join(f"{name:44} {value:8,}" for name, value in rows.items())
