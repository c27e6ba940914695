"""Find wordings that have a plainer form: `python tools/docs/wording.py [PATH …]`, in `make lint`.

Reads the pages (all but CHANGELOG.md, which keeps what was written), the comments of the examples'
YAML and sbatch files, and the texts that Python files outside tests show; and the
comments and docstrings of all Python files. Code blocks and `quoted code` are left alone. The first
sentence of a docstring has at most `MOST_WORDS` words. A public docstring describes parameters,
fields and errors in sections, each in an entry of its own, by what it is, and no docstring has its
errors in prose. Parameters and variables in `NAMED_PACKAGES` have names that say what they are."""

import ast
import functools
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

# What is found -> what to write instead.
PLAIN_WORDINGS = {
    r"what is none": "name it: `for a value that is not a number`, `for a malformed row`",
    r"([Tt]hat|which|[Ii]t|template|box) (is|are) none": (
        "say what it is: `rejected`, `malformed`, `ungraded`"
    ),
    r"(is|are) none of": "`is not one of`",
    r"in no (mean|average|sum)": "`is excluded from the means`",
    r"of ours": "`our`, or the name of the class or file",
    r"[Ww]hoever|who asks": "name the reader or the caller",
    r"(come|comes|came|coming) to (its|their|an) end": "`finishes`, `is complete`",
    r"[Bb]eside": "`next to`, `compared with`, `besides` or `at the same time as`",
}
# In pages only, where the sentence can be turned without care for the width of a comment.
PLAIN_PAGES = {r", too(?=[.;,:|)]|$)": "`also`, in front of the verb"}
QUOTED_TEXT = re.compile(r"`[^`\n]*`|\]\([^)]*\)")


@functools.lru_cache(maxsize=1)
def parse(source: str) -> ast.Module:
    """Return the tree of a file, which several functions read one after the other."""
    return ast.parse(source)


def find_wordings(text: str, patterns: dict[str, str]) -> Iterator[tuple[int, str, str]]:
    """Yield line (from 1), the words found and what to write instead."""
    for pattern, advice in patterns.items():
        words = pattern if pattern.startswith(",") else rf"\b(?:{pattern})\b"
        for match in re.finditer(words.replace(" ", r"\s+"), text, re.MULTILINE):
            yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), advice


def _blank_match(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def find_in_page(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield what a page in Markdown has."""
    prose = QUOTED_TEXT.sub(
        _blank_match, re.sub(r"^ *```.*?^ *```", _blank_match, text, flags=re.M | re.S)
    )
    yield from find_wordings(prose, PLAIN_WORDINGS | PLAIN_PAGES)


def find_in_settings(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield what the comments of a YAML or shell file have."""
    for number, line in enumerate(text.splitlines(), 1):
        if comment := re.search(r"(?:^|\s)#(.*)", line):
            for _, words, advice in find_wordings(
                QUOTED_TEXT.sub(_blank_match, comment[1]), PLAIN_WORDINGS
            ):
                yield number, words, advice


def find_in_texts(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield what the texts have that a program shows: all strings but docstrings."""
    tree = parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = {
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    }
    for line, text in sorted(texts):
        for _, words, advice in find_wordings(text, PLAIN_WORDINGS):
            yield line, words, advice


def find_in_module(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield what comments and docstrings have, those of fields and constants included."""
    texts = [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    # ast.get_source_segment splits the whole source each time.
    lines = source.splitlines()
    for node in ast.walk(parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                texts.append((node.lineno, "\n".join(lines[node.lineno - 1 : node.end_lineno])))
    for first, text in texts:
        for line, words, advice in find_wordings(
            QUOTED_TEXT.sub(_blank_match, text), PLAIN_WORDINGS
        ):
            yield first + line - 1, words, advice


SECTION = re.compile(r"^ *(?:Args|Attributes|Returns|Yields|Raises):\n", re.M)
"""The heading of a section; all below the first one is sections."""


def find_in_public_docstrings(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield parameters and fields that are described outside of sections, and entries of sections
    that begin with "of"."""
    for node in _public_definitions(parse(source)):
        text = ast.get_docstring(node, clean=False)
        if text is None:
            continue
        first = node.body[0].lineno
        for entry in re.finditer(r"^ +(\w+): of ", text, re.M):
            line = first + text.count("\n", 0, entry.start())
            yield line, entry[0].strip(), "what it is, as `key: the key that errors name.`"
        if not (names := "|".join(map(re.escape, _described_names(node)))):
            continue
        prose = SECTION.split(text, maxsplit=1)[0]
        for entry in re.finditer(rf"(?:^|(?<=[.;] )|(?<=[.;]\n)) *({names}): ", prose, re.M):
            line = first + text.count("\n", 0, entry.start(1))
            yield line, f"{entry[1]}:", "an entry of `Args:` or `Attributes:`"


MOST_WORDS = 30
"""Of the first sentence of a docstring."""
SENTENCE_END = re.compile(r"[.?!][\"')]?(?=\s+[^\sa-z]|\s*$)|:\n")
"""Where a first sentence ends: before a capital, a sign or a line of its own."""


def find_long_summaries(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield the first sentences of docstrings that have more than `MOST_WORDS` words."""
    for node in ast.walk(parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        paragraph = re.split(r"\n\s*\n", ast.get_docstring(node) or "", maxsplit=1)[0]
        end = SENTENCE_END.search(paragraph)
        words = (paragraph[: end.end()] if end else paragraph).split()
        if len(words) > MOST_WORDS:
            advice = f"a first sentence of at most {MOST_WORDS} words, not {len(words)}"
            yield node.body[0].lineno, " ".join(words[:4]), advice


MOST_WITHOUT_SECTION = 2
"""Parameters of a public function that its first sentence may describe."""
SAME_ARGUMENTS = re.compile(r"[Aa]rguments\b[\w\s]*\bare\s+those\s+of")


def find_undescribed_parameters(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield public functions of many parameters without a section for them; overrides and kernels,
    whose comments describe them, excepted."""
    for node in _public_definitions(parse(source)):
        if isinstance(node, ast.ClassDef):
            continue
        arguments = node.args
        parameters = {x.arg for x in _function_parameters(node) if x is not arguments.kwarg}
        parameters -= {"self", "cls"}
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        text = ast.get_docstring(node) or ""
        is_described = "Args:\n" in text or SAME_ARGUMENTS.search(text)
        is_exempt = decorators & {"override", "triton.jit"}
        if len(parameters) > MOST_WITHOUT_SECTION and not is_described and not is_exempt:
            yield node.lineno, node.name, "an `Args:` section with an entry per parameter"


RAISES = re.compile(r"\bRaises\s+\S+|;\s+raises?\s+\S+")
"""A sentence, or the last part of one, that says which errors a function raises."""


def find_in_raising_docstrings(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield sentences of docstrings, private ones included, about errors that a function raises."""
    for node in ast.walk(parse(source)):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = QUOTED_TEXT.sub(_blank_match, ast.get_docstring(node, clean=False) or "")
        for part in RAISES.finditer(SECTION.split(text, maxsplit=1)[0]):
            line = node.body[0].lineno + text.count("\n", 0, part.start())
            yield line, " ".join(part[0].split()), "an entry of `Raises:`, as `KeyError: no name.`"


ENTRY = {
    "Args": re.compile(r"\*{0,2}(\w+)(?: \([^)]*\))?: \S"),
    "Attributes": re.compile(r"(\w+)(?: \([^)]*\))?: \S"),
    "Raises": re.compile(r"((?:\w+\.)*[A-Z]\w*): \S"),
}
"""The beginning of an entry: its one name, then a description."""


def find_in_sections(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield entries of sections that are not one name with its description, that repeat a name, or
    whose name is no parameter."""
    tree = parse(source)
    nodes = list(_public_definitions(tree))
    nodes += [
        part
        for node in nodes
        if isinstance(node, ast.ClassDef)
        for part in node.body
        if isinstance(part, ast.FunctionDef) and part.name == "__init__"
    ]
    for node in nodes:
        text = ast.get_docstring(node, clean=False) or ""
        indent, section, seen_names = " " * node.body[0].col_offset, "", set[str]()
        for number, line in enumerate(text.split("\n")):
            if not line.strip() or line.startswith(indent + " " * 5):
                continue  # the rest of an entry
            if not line.startswith(indent + " " * 4):
                section, seen_names = line.strip().removesuffix(":"), set()
                continue
            if section not in ENTRY:
                continue
            entry = ENTRY[section].match(line.strip())
            place = node.body[0].lineno + number
            if entry is None:
                name = line.split(":")[0].strip()
                yield place, name, "an entry for each name, with a description of its own"
                continue
            if entry[1] in seen_names and section != "Raises":
                yield place, entry[1], f"it once in `{section}:`"
            elif section == "Args" and entry[1] not in _described_names(node):
                yield place, entry[1], "the name of a parameter"
            seen_names.add(entry[1])


PRODUCT_PACKAGES = ("grading/r1_grading/", "kernels/r1_kernels/", "megatron_r1/")
"""Whose public functions describe their parameters."""
NAMED_PACKAGES = (*PRODUCT_PACKAGES, "tools/")
"""Whose parameters and variables have names that say what they are."""
VAGUE_NAMES = frozenset(
    ("asked", "both", "chosen", "done", "found", "given", "here", "into", "kept", "known", "made")
    + ("more", "moved", "named", "needed", "same", "seen", "shown", "used", "wanted", "which")
    + ("whole",)
)
"""Names that say nothing of the value's kind. (`other` is Python's word for a second operand.)"""
VAGUE_VARIABLES = VAGUE_NAMES | {"where"}
"""`where` is a setting, and so a parameter."""
VAGUE_PARAMETERS = VAGUE_NAMES | {"each", "every", "held", "left", "others", "own", "rest", "taken"}
SIDES = {"left": "right", "chosen": "rejected"}
"""Names that say what they are next to another."""


def find_vague_names(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield parameters and variables of functions whose names are participles, pronouns or adverbs;
    names in `SIDES` are found where a function has one without the other."""
    findings = set[tuple[int, str]]()
    for node in ast.walk(parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        parameters = {parameter.arg: parameter.lineno for parameter in _function_parameters(node)}
        variables = {
            (part.lineno, part.id)
            for part in ast.walk(node)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
        }
        names = parameters.keys() | {name for _, name in variables}
        sides = {name for name, opposite in SIDES.items() if opposite in names}
        findings |= {
            (line, name) for name, line in parameters.items() if name in VAGUE_PARAMETERS - sides
        }
        findings |= {entry for entry in variables if entry[1] in VAGUE_VARIABLES - sides}
    for line, name in sorted(findings):
        yield line, name, "the kind of the value, as `known_keys`"


def _function_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    arguments = node.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return parameters + [
        parameter for parameter in (arguments.vararg, arguments.kwarg) if parameter
    ]


def _public_definitions(
    tree: ast.Module,
) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    statements: list[ast.stmt] = list(tree.body)
    for node in statements:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not node.name.startswith("_"):
            yield node
            statements += node.body if isinstance(node, ast.ClassDef) else []


def _described_names(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Return the parameters of a function, or the fields of a class and its constructor's."""
    if not isinstance(node, ast.ClassDef):
        return [parameter.arg for parameter in _function_parameters(node)]
    names = []
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            names.append(part.target.id)
        elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
            names += _described_names(part)
    return names


def _readers_of_file(name: Path) -> tuple[Callable[[str], Iterator[tuple[int, str, str]]], ...]:
    if name.suffix == ".md":
        return (find_in_page,)
    if name.suffix == ".py":
        if name.parts[0] == "tests":
            return (find_in_module, find_long_summaries)
        name_checks = (find_vague_names,) if name.as_posix().startswith(NAMED_PACKAGES) else ()
        is_product = name.as_posix().startswith(PRODUCT_PACKAGES)
        parameter_checks = (find_undescribed_parameters,) if is_product else ()
        # The patterns above are such texts.
        text_checks = (find_in_texts,) if name != Path("tools/docs/wording.py") else ()
        return (
            *name_checks,
            *text_checks,
            find_in_module,
            find_long_summaries,
            find_in_public_docstrings,
            *parameter_checks,
            find_in_raising_docstrings,
            find_in_sections,
        )
    if name.suffix in (".yaml", ".sbatch") and name.parts[0] == "examples":
        return (find_in_settings,)
    return ()


def main(root: Path, paths: list[str]) -> int:
    """Print every finding below `root`, in `paths` or everywhere; return the exit status."""
    command = ["git", "ls-files", *(paths or ["."])]
    output = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout
    findings = 0
    for name in output.splitlines():
        path = root / name
        if path.name == "CHANGELOG.md" or not path.exists():
            continue
        for line, words, advice in sorted(
            finding
            for read in _readers_of_file(Path(name))
            for finding in read(path.read_text(encoding="utf-8"))
        ):
            print(f"{name}:{line}: {words!r}: write {advice}")
            findings += 1
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parents[2], sys.argv[1:]))
