"""Names of the project that differ between two versions of Python files, and nothing else does.

A module, class, function, constant or attribute that has another name computes the same. Renames
are found where two statements are alike but for names, and count only if they cannot be something
else: the old name is nowhere in the later project, the new one was nowhere in the earlier, and both
are the project's own. Of a parameter, a field or a variable the old name may stay elsewhere."""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

Renames = frozenset[tuple[str, str]]
"""The old name and the new one of each."""
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
PROJECT_PACKAGES = ("megatron_r1", "r1_grading", "r1_kernels", "r1_kernels_bench", "tools")
NAME_FIELDS = ("id", "attr", "name", "arg", "asname", "names", "kwd_attrs", "rest")
"""Fields of nodes that hold names; `names` only where they are texts."""
DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
"""A text that names a module or something in it, as in `__all__`."""


class ProjectNames(NamedTuple):
    """The names in the Python files of a version of the project.

    Attributes:
        used: all names; of a commit also the words of comments and texts.
        defined: those of modules, classes, functions, attributes and parameters; of a commit those
            of what is only set, but of no parameters alone.
        modules: those of modules, with their packages.
        keywords: those of calls, as (function or class, keyword); of a commit none."""

    used: frozenset[str]
    defined: frozenset[str]
    modules: frozenset[str]
    keywords: frozenset[tuple[str, str]] = frozenset()


def find_renames(
    old_texts: Sequence[str],
    new_texts: Sequence[str],
    old_names: ProjectNames,
    new_names: ProjectNames,
) -> Renames:
    """Return the renames between two versions of some files.

    Args:
        old_texts: the texts of one version.
        new_texts: those of the other.
        old_names: the names of the earlier project.
        new_names: those of the later one.

    Raises:
        SyntaxError: a text is not Python.
    """
    candidates = _differing_names(old_texts, new_texts)
    return _one_to_one(
        (before, after)
        for before, after in candidates
        if before not in new_names.used and before in old_names.defined
        if after not in old_names.used and after in new_names.defined
    )


def find_new_names(
    old_texts: Sequence[str],
    new_texts: Sequence[str],
    old_names: ProjectNames,
    new_names: ProjectNames,
) -> Renames:
    """Return the new and the old name of parameters, fields and variables whose name was nowhere in
    the earlier project, while others may still have the old one.

    A method is not among them, nor a parameter of one where the class has bases: another class may
    call or override it by the old name; a property of a class without bases is. Neither is a
    parameter or field that a call names as before, a variable where a function has another by the
    old name, or an attribute where a file has.

    Args:
        old_texts: the texts of one version.
        new_texts: those of the other.
        old_names: the names of the earlier project.
        new_names: those of the later one.

    Raises:
        SyntaxError: a text is not Python.
    """
    candidates = set(_differing_names(old_texts, new_texts))
    counts = Counter(after for _, after in candidates)
    former_names = old_names.defined.union(*map(defined_in, old_texts))
    names = new_names.defined - old_names.used - old_names.defined
    names -= {part for module in new_names.modules for part in module.split(".")}
    names -= _in_any(_methods_and_definitions, new_texts)
    pairs = {
        (after, before)
        for before, after in candidates
        if before in former_names and after in names and counts[after] == 1
    }
    if not pairs:
        return frozenset()
    scopes = [
        scope
        for text in new_texts
        for scope in (*_variables_of_functions(text), _attributes_in(text))
    ]
    owners = defaultdict(set)
    for text in new_texts:
        for owner, name in _parameters(text):
            owners[name].add(owner)
    return frozenset(
        (after, before)
        for after, before in pairs
        if not any({before, after} <= scope for scope in scopes)
        if not any((owner, before) in new_names.keywords for owner in owners[after])
    )


@cache  # claims of many commits ask for the same texts
def _methods_and_definitions(text: str) -> frozenset[str]:
    """Return the names of functions, classes and methods, but for properties of classes without
    bases, and of the parameters of methods of classes that have bases."""
    nodes = list(ast.walk(_parsed_module(text)))
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    members = [member for each in classes if not each.bases for member in each.body]
    properties = [member for member in members if _is_property(member)]
    functions = [node for node in nodes if isinstance(node, FUNCTIONS | ast.ClassDef)]
    names = {function.name for function in functions if function not in properties}
    for method in (method for each in classes if each.bases for method in each.body):
        if isinstance(method, FUNCTIONS) and method.name != "__init__":
            names |= _arguments_of(method)
    return frozenset(names)


def _is_property(node: ast.stmt) -> bool:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any(ast.unparse(each) in ("property", "cached_property") for each in decorators)


def _arguments_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}


@cache  # claims of many commits ask for the same texts
def _parameters(text: str) -> frozenset[tuple[str, str]]:
    """Return parameters of functions and fields of classes, as (function or class, name)."""
    pairs: set[tuple[str, str]] = set()
    for node in ast.walk(_parsed_module(text)):
        if isinstance(node, FUNCTIONS):
            pairs |= {(node.name, name) for name in _arguments_of(node)}
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, FUNCTIONS)]
            fields = {name for each in node.body for name in _target_names(each)}
            fields = fields.union(*map(_arguments_of, methods))
            pairs |= {(node.name, name) for name in fields}
    return frozenset(pairs)


def keywords_in(text: str) -> frozenset[tuple[str, str]]:
    """Return the keywords of all calls, as (function or class, keyword)."""
    calls = (node for node in ast.walk(_parsed_module(text)) if isinstance(node, ast.Call))
    return frozenset(
        (getattr(call.func, "id", getattr(call.func, "attr", "")), keyword.arg)
        for call in calls
        for keyword in call.keywords
        if keyword.arg
    )


@cache  # claims of many commits ask for the same texts
def _variables_of_functions(text: str) -> list[frozenset[str]]:
    """Return the variables and parameters of each function, and those of the module."""
    tree = _parsed_module(text)
    scopes = [tree, *(node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))]
    return [
        frozenset(
            node.id if isinstance(node, ast.Name) else node.arg
            for node in (ast.walk(scope) if scope is not tree else _outside_functions(tree))
            if isinstance(node, ast.Name | ast.arg)
        )
        for scope in scopes
    ]


@cache  # claims of many commits ask for the same texts
def _attributes_in(text: str) -> frozenset[str]:
    nodes = ast.walk(_parsed_module(text))
    return frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute))


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, FUNCTIONS):
            yield child
            yield from _outside_functions(child)


@cache  # claims of many commits ask for the same texts
def find_file_renames(
    old_text: str, new_texts: tuple[str, ...], earlier_names: frozenset[str] | None = None
) -> Renames:
    """Return the renames between two versions of one file, where no other name of the file is the
    old or the new one. Another file may still have these names: it means its own by them.

    They are those of private functions; and where the new name was nowhere in the earlier project,
    of functions and classes that the file defines or imports from the project, and of private
    methods: a class elsewhere that this one inherits from, or that inherits from it, could have
    their new name.

    Args:
        old_text: one version.
        new_texts: the other, and new files to which some of it has moved.
        earlier_names: the names in the earlier project; None: private functions alone count.

    Raises:
        SyntaxError: a text is not Python.
    """
    old_own, new_own = _private_functions(old_text), _in_any(_private_functions, new_texts)
    if earlier_names is not None:
        old_own |= _private_methods(old_text) | public_names(old_text)
        new_own |= (
            _in_any(_private_methods, new_texts) | _in_any(public_names, new_texts)
        ) - earlier_names
    old_own, new_own = old_own - _in_any(names_in, new_texts), new_own - names_in(old_text)
    if not old_own or not new_own:
        return frozenset()
    return _one_to_one(
        (before, after)
        for before, after in _differing_names([old_text], new_texts)
        if before in old_own and after in new_own
    )


def _in_any(names_of: Callable[[str], frozenset[str]], texts: Iterable[str]) -> frozenset[str]:
    return frozenset[str]().union(*map(names_of, texts))


def _differing_names(
    old_texts: Sequence[str], new_texts: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield the old name and the new one where statements are alike but for names."""
    old_statements, new_statements = _by_shape(old_texts), _by_shape(new_texts)
    for shape, old_group in old_statements.items():
        for old, new in zip(old_group, new_statements.get(shape, []), strict=False):
            for before, after in zip(_names_in_tree(old), _names_in_tree(new), strict=True):
                if before != after:
                    yield before, after


def _one_to_one(candidates: Iterable[tuple[str, str]]) -> Renames:
    """Return the renames of which both names are in one of the candidates alone."""
    pairs = set(candidates)
    befores, afters = ([pair[side] for pair in pairs] for side in (0, 1))
    return frozenset(pair for pair in pairs if befores.count(pair[0]) == 1 == afters.count(pair[1]))


@cache  # claims of many commits ask for the same texts
def _private_functions(text: str) -> frozenset[str]:
    """Return the names of a module's functions that begin with an underscore."""
    functions = (node for node in _parsed_module(text).body if isinstance(node, FUNCTIONS))
    return frozenset(node.name for node in functions if node.name.startswith("_"))


@cache  # claims of many commits ask for the same texts
def _private_methods(text: str) -> frozenset[str]:
    """Return the names of the methods of a module's classes that begin with one underscore."""
    classes = (node for node in ast.walk(_parsed_module(text)) if isinstance(node, ast.ClassDef))
    methods = (node for each in classes for node in each.body if isinstance(node, FUNCTIONS))
    return frozenset(node.name for node in methods if re.match("_[^_]", node.name))


@cache  # claims of many commits ask for the same texts
def public_names(text: str) -> frozenset[str]:
    """Return the names of the functions and classes that a module defines, or imports from the
    project, without an underscore."""
    body = _parsed_module(text).body
    names = {node.name for node in body if isinstance(node, FUNCTIONS | ast.ClassDef)}
    names |= {name for module, name in imported_names(text) if is_of_project(module)}
    return frozenset(name for name in names if not name.startswith("_"))


@cache  # claims of many commits ask for the same texts
def imported_names(text: str) -> frozenset[tuple[str, str]]:
    """Return what a module imports from others, anywhere in it, as (module, name)."""
    return frozenset(
        (node.module, alias.name)
        for node in ast.walk(_parsed_module(text))
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    )


def is_of_project(module: str) -> bool:
    """Return whether a module is one of the project's packages."""
    return module.partition(".")[0] in PROJECT_PACKAGES


@cache  # claims of many commits ask for the same texts
def names_in(text: str) -> frozenset[str]:
    """Return the names in a text; a text that is not Python has none."""
    return frozenset(_names_in_tree(_parsed_module(text)))


def _parsed_module(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError:
        return ast.Module([], [])


def rename(tree: ast.Module, renames: Renames, *, in_texts: bool = True) -> ast.Module:
    """Return the tree with the new names; it is changed in place.

    Args:
        tree: a module.
        renames: the names and what they become.
        in_texts: whether texts that are names are renamed, too."""
    new_names = dict(renames)
    for node in ast.walk(tree) if renames else ():
        if isinstance(node, ast.Constant) and not in_texts:
            continue
        for key, value in _name_fields(node):
            if isinstance(value, list):
                setattr(node, key, [new_names.get(name, name) for name in value])
            else:
                parts = (new_names.get(name, name) for name in value.split("."))
                setattr(node, key, ".".join(parts))
    return tree


def renamed_modules(modules: frozenset[str], renames: Renames) -> frozenset[str]:
    """Return the names of modules, and those that they have after the renames."""
    new_names = dict(renames)
    return modules | {
        ".".join(new_names.get(part, part) for part in module.split(".")) for module in modules
    }


def without_annotations(tree: ast.Module) -> ast.Module:
    """Return the tree without the types of parameters and results, which compute nothing; it is
    changed in place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return tree


@cache  # claims of many commits ask for the same texts
def defined_in(text: str) -> frozenset[str]:
    """Return the names of classes, functions, parameters, attributes and a module's variables in a
    text. Local variables are not among them."""
    names: set[str] = set()
    for node in ast.walk(_parsed_module(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        if isinstance(node, ast.arg):
            names.add(node.arg)
        if isinstance(node, ast.Module | ast.ClassDef):
            names |= {name for statement in node.body for name in _target_names(statement)}
    return frozenset(names)


def _by_shape(texts: Sequence[str]) -> dict[str, list[ast.stmt]]:
    """Return the statements of all files by what they are without their names."""
    statements: dict[str, list[ast.stmt]] = defaultdict(list)
    for text in texts:
        for node, shape in _statements_with_shapes(text):
            statements[shape].append(node)
    return statements


@cache  # claims of many commits ask for the same texts
def _statements_with_shapes(text: str) -> list[tuple[ast.stmt, str]]:
    return [(node, _tree_shape(node)) for node in _without_docstrings(ast.parse(text)).body]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(without_annotations(tree)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [each for each in node.body if not _is_text(each)] or [ast.Pass()]
    return tree


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _tree_shape(node: ast.AST) -> str:
    """Return the tree below a node without its names."""
    hidden = dict(_name_fields(node))
    num_names = [len(v) if isinstance(v, list) else v.count(".") for v in hidden.values()]
    parts = [f"{type(node).__name__}{num_names}"]
    for key, value in ast.iter_fields(node):
        if key in hidden or key in ("ctx", "type_comment"):
            continue
        values = value if isinstance(value, list) else [value]
        shapes = [_tree_shape(each) if isinstance(each, ast.AST) else repr(each) for each in values]
        parts.append(f"{key}=[{','.join(shapes)}]")
    return f"({' '.join(parts)})"


def _names_in_tree(node: ast.AST) -> list[str]:
    return [
        name
        for each in ast.walk(node)
        for _, value in _name_fields(each)
        for name in (value if isinstance(value, list) else value.split("."))
    ]


def _name_fields(node: ast.AST) -> Iterator[tuple[str, str | list[str]]]:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str) and DOTTED_NAME.fullmatch(node.value):
            yield "value", node.value
        return
    for key, value in ast.iter_fields(node):
        is_names = isinstance(value, list) and value and all(isinstance(v, str) for v in value)
        if key in NAME_FIELDS and (isinstance(value, str) or is_names):
            yield key, value


def _target_names(node: ast.stmt) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        for each in ast.walk(target) if target is not None else ():
            if isinstance(each, ast.Name):
                yield each.id
