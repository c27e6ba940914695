"""What Python files compute, to compare two versions of them: compiled statements of their modules.

Comments, docstrings, formatting, types of parameters, the names of local variables and the file in
which a definition stands are not in them. A name of the project that is another one everywhere
computes the same (`renames`)."""

import __future__

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

from tools.evidence.renames import (
    ProjectNames,
    Renames,
    defined_in,
    find_file_renames,
    find_new_names,
    find_renames,
    imported_names,
    is_of_project,
    names_in,
    rename,
    renamed_modules,
    without_annotations,
)

NO_RENAMES: Renames = frozenset()
NO_MODULES: frozenset[str] = frozenset()
ANY_MODULE = "<module>"
"""Replaces the name of a module whose attributes a file reads; its imports name them."""
HAVE_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NAMED_DEFINITION = re.compile(r"[\w.]+:([A-Za-z_]\w*)")
"""A text that names a definition by its module, as a table of what is imported late does."""
TYPE_CHECKS = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
Import = tuple[str, str, str | None]
"""A module, a name of it, and its alias."""


class _Statements(NamedTuple):
    """The statements of a module.

    Attributes:
        imports: the names that it imports.
        definitions: its functions and classes.
        others: the rest, in order.
        by_name: of these the statement that defines a name.
        named: texts that name a definition by its module, and its name. They stand in the
            statements without the module."""

    imports: frozenset[Import]
    definitions: tuple[Any, ...]
    others: tuple[Any, ...]
    by_name: dict[str, Any]
    named: frozenset[tuple[str, str]]


class Version(NamedTuple):
    """A version of some files.

    Attributes:
        texts: the text of each file, None where it is not there.
        module_text: returns the text of any module of the project, None where it is not there.
        names: returns the names in the project, or None where they are not known; None to look
            for no renames.
        imports: returns what its files import, as (module, name)."""

    texts: Sequence[str | None]
    module_text: Callable[[str], str | None]
    names: Callable[[], ProjectNames | None] | None = None
    imports: Callable[[], frozenset[tuple[str, str]]] | None = None

    def imported_names(self) -> frozenset[tuple[str, str]]:
        """Return what its texts import, as (module, name)."""
        return frozenset(pair for text in self.texts for pair in imported_names(text or ""))

    def statements(self, former_names: Renames, modules: frozenset[str]) -> list[_Statements]:
        """Return those of each file.

        Args:
            former_names: names that are to be others.
            modules: names of modules whose attributes count as if they were imported.

        Raises:
            SyntaxError: a text is not Python.
        """
        return [
            _compiled_statements(text or "", NO_RENAMES, former_names, modules)
            for text in self.texts
        ]

    def file_renames(self, later: "Version", names: frozenset[str] | None) -> list[Renames]:
        """Return the renames of each file alone, also of what has moved to new files.

        Args:
            later: the later version.
            names: those in this version of the project, None where they are not known.

        Raises:
            SyntaxError: a text is not Python.
        """
        pairs = list(zip(self.texts, later.texts, strict=True))
        new_files = [new_text for text, new_text in pairs if text is None and new_text]
        renames = []
        for text, new_text in pairs:
            own = find_file_renames(text or "", (new_text or "",), names)
            moved_names = defined_in(text or "") - defined_in(new_text or "")
            texts = [each for each in new_files if moved_names & defined_in(each)]
            if texts:
                own |= find_file_renames(text or "", (new_text or "", *texts), names)
            renames.append(own)
        return renames

    def renamed_statements(
        self, renames: Renames, file_renames: Sequence[Renames], modules: frozenset[str]
    ) -> list[_Statements]:
        """Return those of each file with the names of a later version.

        Args:
            renames: names that are others everywhere.
            file_renames: names that are others in each file.
            modules: names of modules whose attributes count as if they were imported.

        Raises:
            SyntaxError: a text is not Python.
        """
        pairs = zip(self.texts, file_renames, strict=True)
        return [
            _compiled_statements(text or "", renames | own, NO_RENAMES, modules)
            for text, own in pairs
        ]


def compute_the_same(old: Version, new: Version) -> bool:
    """Return whether two versions of Python files compute the same.

    They have the same statements, in whichever of the files, those of a file other than definitions
    in the same order; and what they import, or name in a text, has the same definitions. Names may
    differ where `find_renames`, `find_file_renames` and `find_new_names` say so.

    Args:
        old: one version.
        new: the other, of the same files.

    Raises:
        SyntaxError: a text is not Python.
    """
    if _compute_the_same(old, new, NO_RENAMES, NO_RENAMES, None, NO_MODULES, NO_MODULES):
        return True
    if old.names is None or new.names is None:
        return False
    old_names, new_names = old.names(), new.names()
    if old_names is None or new_names is None:
        return False
    old_texts, new_texts = _texts_with_imports(old, new), _texts_with_imports(new, old)
    renames = find_renames(old_texts, new_texts, old_names, new_names)
    renamed = {after for _, after in renames}
    former_names = frozenset(
        (after, before)
        for after, before in find_new_names(old_texts, new_texts, old_names, new_names)
        if after not in renamed
    )
    return _compute_the_same(
        old,
        new,
        renames,
        former_names,
        old_names.used,
        renamed_modules(old_names.modules, renames),
        new_names.modules,
    )


def _texts_with_imports(version: Version, other: Version) -> list[str]:
    """Return the texts of a version, and of the modules that it alone imports from."""
    pairs = version.imported_names() - other.imported_names()
    modules = {module for module, _ in pairs} | {f"{module}.{name}" for module, name in pairs}
    own_modules = sorted(module for module in modules if is_of_project(module))
    texts = (*version.texts, *map(version.module_text, own_modules))
    return list(dict.fromkeys(text or "" for text in texts))


def _compute_the_same(
    old: Version,
    new: Version,
    renames: Renames,
    former_names: Renames,
    names: frozenset[str] | None,
    old_modules: frozenset[str],
    new_modules: frozenset[str],
) -> bool:
    modules = _imported_modules(old, old_modules) | _imported_modules(new, new_modules)
    file_renames = [
        frozenset(pair for pair in own if modules.isdisjoint(pair))
        for own in old.file_renames(new, names)
    ]
    old_files = old.renamed_statements(renames, file_renames, old_modules)
    new_files = new.statements(former_names, new_modules)
    if _statement_counts(old_files) != _statement_counts(new_files):
        return False
    if not all(
        _common_statements(a, b) == _common_statements(b, a)
        for a, b in zip(old_files, new_files, strict=True)
    ):
        return False
    public_renames = {pair for own in file_renames for pair in own if pair[0][0] != "_"}
    if not _name_the_same(old_files, new_files):
        return False
    return _are_consistent(public_renames, new) and _import_the_same(
        (old_files, new_files),
        lambda module: _compiled_statements(
            old.module_text(module) or "", renames, NO_RENAMES, old_modules
        ),
        lambda module: _compiled_statements(
            new.module_text(module) or "", NO_RENAMES, former_names, new_modules
        ),
    )


def _imported_modules(version: Version, modules: frozenset[str]) -> set[str]:
    """Return the names of `modules` that files import as such, whose attributes name them."""
    return {name for module, name in version.imported_names() if f"{module}.{name}" in modules}


def _are_consistent(renames: set[tuple[str, str]], new: Version) -> bool:
    """Return whether no two names become one, and whether files import names that exist.

    A name may be another one in the file that defines it alone; then others import it in vain."""
    if len({after for _, after in renames}) < len(renames):
        return False
    names = {name for pair in renames for name in pair}
    imports = new.imports() if names and new.imports else ()
    for module, name in imports:
        text = new.module_text(module) if name in names else None
        is_module = text is not None and new.module_text(f"{module}.{name}") is not None
        if text is not None and not is_module and name not in names_in(text):
            return False
    return True


def _import_the_same(
    files: tuple[Sequence[_Statements], Sequence[_Statements]],
    old_module: Callable[[str], _Statements],
    new_module: Callable[[str], _Statements],
) -> bool:
    """Return whether two versions import the same.

    Names of the project that only one of them imports from their modules have the definitions that
    the other has by these names, and all else is imported by both."""
    old_imports, new_imports = (
        frozenset[Import]().union(*(file.imports for file in version)) for version in files
    )
    if any(not is_of_project(module) for module, _, _ in old_imports ^ new_imports):
        return False
    old_definitions = defaultdict(list)
    for file in files[0]:
        for name, statement in file.by_name.items():
            old_definitions[name].append(statement)
    for module, name, _ in old_imports - new_imports:
        old_definitions[name].append(_imported_definition(module, name, old_module))
    new_definitions = (
        (name, _imported_definition(module, name, new_module))
        for module, name, _ in new_imports - old_imports
    )
    return all(
        definition is not None and definition in old_definitions[name]
        for name, definition in new_definitions
    )


def _name_the_same(old_files: Sequence[_Statements], new_files: Sequence[_Statements]) -> bool:
    """Return whether what texts name by another module than before is defined once, and alike."""
    old_named, new_named = (
        frozenset[tuple[str, str]]().union(*(file.named for file in version))
        for version in (old_files, new_files)
    )
    for name in {name for _, name in old_named ^ new_named}:
        old, new = (
            [file.by_name[name] for file in version if name in file.by_name]
            for version in (old_files, new_files)
        )
        if len(old) != 1 or old != new:
            return False
    return True


def _imported_definition(
    module: str, name: str, statements_of: Callable[[str], _Statements]
) -> Any | None:
    """Return the statement that defines what a module has by a name, or None.

    It is the module's own, or that of the module from which it imports the name; where the name is
    that of a module in a package, all the statements of that."""
    looked_up = set()
    while (module, name) not in looked_up:
        looked_up.add((module, name))
        statements = statements_of(module)
        if name in statements.by_name:
            return statements.by_name[name]
        if inner_statements := _statement_counts([statements_of(f"{module}.{name}")]):
            return frozenset(inner_statements.items())
        sources = (
            (source, source_name)
            for source, source_name, alias in statements.imports
            if (alias or source_name) == name and is_of_project(source)
        )
        module, name = next(sources, (module, name))
    return None


def _statement_counts(files: Sequence[_Statements]) -> Counter[Any]:
    return Counter(each for file in files for each in (*file.definitions, *file.others))


def _common_statements(file: _Statements, other: _Statements) -> list[Any]:
    """Return the statements, without definitions, that both have, in the order of `file`."""
    return [statement for statement in file.others if statement in other.others]


@cache  # claims of many commits ask for the same texts
def _compiled_statements(
    text: str, renames: Renames, former_names: Renames, modules: frozenset[str]
) -> _Statements:
    # They are those of the Python that runs this: two results of two Pythons do not compare.
    tree = rename(rename(ast.parse(text), renames), former_names, in_texts=False)
    tree = without_annotations(tree)
    attributes = _import_attributes(tree, modules)
    imports: set[Import] = {
        (node.module, alias.name, alias.asname)
        for node in ast.walk(tree)  # also within functions
        if isinstance(node, ast.ImportFrom) and node.module and is_of_project(node.module)
        for alias in node.names
    }
    imports |= attributes
    named_definitions = _take_modules_from_texts(tree)
    tree = _WithoutModules().visit(tree)
    definitions: list[Any] = []
    others: list[Any] = []
    by_name: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            imports |= {(alias.name, "", alias.asname) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if not is_of_project(node.module or ""):
                imports |= {(node.module or "", alias.name, alias.asname) for alias in node.names}
        elif not _computes_nothing(node):
            flags = __future__.annotations.compiler_flag
            module_of_one = ast.Module([node], type_ignores=[])
            code = _code_instructions(compile(module_of_one, "", "exec", flags, dont_inherit=True))
            (definitions if isinstance(node, DEFINITIONS) else others).append(code)
            by_name |= dict.fromkeys(_defined_names(node), code)
    return _Statements(
        frozenset(imports), tuple(definitions), tuple(others), by_name, named_definitions
    )


def _take_modules_from_texts(tree: ast.Module) -> frozenset[tuple[str, str]]:
    """Return the texts of a file that name a definition by its module, and its name.

    `tree` is changed in place: of each such text the name stays. Texts stay whole where several
    have one name, so that two of them are not exchanged unseen."""
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [(node, node.value) for node in constants if isinstance(node.value, str)]
    matches = [(node, NAMED_DEFINITION.fullmatch(text)) for node, text in texts]
    naming_texts = [(node, match[0], match[1]) for node, match in matches if match]
    counts = Counter(name for _, name in {(text, name) for _, text, name in naming_texts})
    single = [each for each in naming_texts if counts[each[2]] == 1]
    for node, _, name in single:
        node.value = f":{name}"
    return frozenset((text, name) for _, text, name in single)


def _import_attributes(tree: ast.Module, modules: frozenset[str]) -> set[Import]:
    """Return the attributes that a file reads of modules of the project, as if it imported these.

    `tree` is changed in place: it no longer imports these modules, and `ANY_MODULE` stands for each
    of them. A module stays of which the file does anything else than read attributes, and one that
    shares the name of such an attribute with another."""
    modules_by_alias = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if f"{node.module}.{alias.name}" in modules
    }
    visitor = _ModuleUses(frozenset(modules_by_alias))
    visitor.visit(tree)
    for alias in visitor.other_uses:
        modules_by_alias.pop(alias, None)
    aliases_by_attribute = defaultdict(set)
    for node, name in visitor.read_attributes:
        aliases_by_attribute[node.attr].add(name.id)
    for aliases in aliases_by_attribute.values():
        for alias in aliases if len(aliases) > 1 else ():
            modules_by_alias.pop(alias, None)
    imports: set[Import] = set()
    for node, name in visitor.read_attributes:
        if name.id in modules_by_alias:
            imports.add((modules_by_alias[name.id], node.attr, None))
            name.id = ANY_MODULE
    _WithoutImports(frozenset(modules_by_alias)).visit(tree)
    return imports


class _ModuleUses(ast.NodeVisitor):
    """Finds what is done with modules, where no function has a variable of that name.

    Attributes:
        read_attributes: an attribute that is read, and the module's name in it.
        other_uses: modules of which something else is done."""

    def __init__(self, aliases: frozenset[str]) -> None:
        self._aliases, self._num_classes = aliases, 0
        self.read_attributes: list[tuple[ast.Attribute, ast.Name]] = []
        self.other_uses: set[str] = set()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = node.value
        if (
            isinstance(name, ast.Name)
            and name.id in self._aliases
            and isinstance(node.ctx, ast.Load)
        ):
            self.read_attributes.append((node, name))
        else:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        is_field = self._num_classes and isinstance(node.ctx, ast.Store)
        self.other_uses |= self._aliases & {node.id} if not is_field else frozenset()

    def generic_visit(self, node: ast.AST) -> None:
        aliases = self._aliases
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = list(ast.walk(node))
            self._aliases -= {each.arg for each in inner if isinstance(each, ast.arg)}
            names = (each for each in inner if isinstance(each, ast.Name))
            self._aliases -= {name.id for name in names if not isinstance(name.ctx, ast.Load)}
        self._num_classes += isinstance(node, ast.ClassDef)
        super().generic_visit(node)
        self._num_classes -= isinstance(node, ast.ClassDef)
        self._aliases = aliases


class _WithoutImports(ast.NodeTransformer):
    """Removes the imports of `aliases` from other modules, also within functions."""

    def __init__(self, aliases: frozenset[str]) -> None:
        self._aliases = aliases

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        node.names = [a for a in node.names if (a.asname or a.name) not in self._aliases]
        return node if node.names else ast.copy_location(ast.Pass(), node)


def _defined_names(node: ast.stmt) -> list[str]:
    """Return the names that a statement of a module defines."""
    if isinstance(node, DEFINITIONS):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
    names = (name for target in targets for name in ast.walk(target))
    return [name.id for name in names if isinstance(name, ast.Name)]


class _WithoutModules(ast.NodeTransformer):
    """Removes docstrings, messages of assertions, and of imports from this project the module
    within the package; such imports that follow each other become one."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, HAVE_DOCSTRINGS) and ast.get_docstring(node, clean=False) is not None:
            node.body[:1] = [] if node.body[1:] else [ast.Pass(lineno=1, col_offset=0)]
        if isinstance(node, ast.ImportFrom) and node.module and is_of_project(node.module):
            node.module = node.module.partition(".")[0]
        if isinstance(node, ast.Assert):
            node.msg = None
        if isinstance(node, DEFINITIONS):
            node.body = _joined_imports(node.body)
        return node


def _joined_imports(body: list[ast.stmt]) -> list[ast.stmt]:
    joined: list[ast.stmt] = []
    for node in body:
        last = joined[-1] if joined else None
        if (
            isinstance(node, ast.ImportFrom)
            and isinstance(last, ast.ImportFrom)
            and node.module == last.module
        ):
            last.names = sorted([*last.names, *node.names], key=lambda alias: alias.name)
        else:
            joined.append(node)
    return joined


def _computes_nothing(node: ast.stmt) -> bool:
    """Return whether a statement is a text, imports for the type checker alone, or the list of what
    `import *` imports, which ruff refuses."""
    is_for_types = (
        isinstance(node, ast.If) and ast.unparse(node.test) in TYPE_CHECKS and not node.orelse
    )
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    is_list = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    return is_for_types or is_text or is_list or isinstance(node, ast.Pass)


def _code_instructions(code: CodeType) -> tuple[Any, ...]:
    # Instructions read a local variable by its number, so that its name computes nothing; that of a
    # parameter is in calls. The flags say whether there are `*args` and `**keywords`.
    return (
        code.co_name,
        code.co_code,
        code.co_exceptiontable,
        tuple(map(_comparable_constant, code.co_consts)),
        code.co_names,
        code.co_varnames[: code.co_argcount + code.co_kwonlyargcount],
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
        code.co_flags,
    )


def _comparable_constant(value: object) -> object:
    if isinstance(value, CodeType):
        return _code_instructions(value)
    if isinstance(value, tuple | frozenset):
        return type(value), type(value)(map(_comparable_constant, value))
    return type(value), repr(value)  # 0, 0.0, -0.0 and False are equal
