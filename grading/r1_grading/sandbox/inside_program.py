"""Runs a Python program inside the sandbox: `python -c THIS_FILE PROGRAM [INPUT EXPECTED ACTUAL]`.

A line before this file may define FUNCTION, a function to call with the arguments that standard
input holds, and NAMES, {name: module} of what the program has without importing it. Else the
program runs as `__main__`; with three files it is a checker. The interpreter starts without `site`
(a third of its start-up time). The program can tamper with everything here; since the expected
value of a test is not in the sandbox, writing the right value is still the only way to pass."""

TYPE_CHECKING = False
if TYPE_CHECKING:  # an import of typing or types would cost start-up time
    from types import CodeType

FUNCTION: str = globals().get("FUNCTION", "")
NAMES: dict[str, str] = globals().get("NAMES", {})


def start() -> None:
    """Set the interpreter up as `site` and LiveCodeBench's harness do, and run the program."""
    import sys

    builtins = vars(sys.modules["builtins"])
    builtins["exit"] = builtins["quit"] = sys.exit
    sys.setrecursionlimit(50_000)
    sys.set_int_max_str_digits(0)  # solutions print numbers of more than 4,300 digits
    del sys.argv[0]
    path, *files = sys.argv
    with open(path, "rb") as file:
        source = file.read()
    if FUNCTION:
        call_function(FUNCTION, source, path)
    else:
        run_program(source, path, files)


def run_program(source: bytes, path: str, files: "list[str]") -> None:
    """Run the program as `__main__`, with its own standard input and output.

    A checker that fails (an exception) exits with status 3; one that rejects exits with another
    status. A mark on standard error shows that the last of its `files` was opened: a failure before
    it is not caused by the output.

    Args:
        source: the program's text.
        path: the name that tracebacks give it.
        files: its files, for a checker."""
    import sys

    names, provide, space = NAMES, provide_names, globals()
    for name in [name for name in space if not name.startswith("__")]:
        del space[name]  # the program finds a `__main__` like any other
    if files:
        import os

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            """Write the mark on standard error when the last file is opened."""
            if event == "open" and os.path.basename(str(arguments[0])) == files[-1]:
                os.write(2, b"\0actual\n")

        sys.addaudithook(watch)
    try:
        code = compile(source, path, "exec", dont_inherit=True)
        provide(code, space, names)
        exec(code, space)
    except BaseException as error:
        if not files or isinstance(error, SystemExit):
            raise
        sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
        sys.exit(3)  # testlib's status for a checker that failed


def call_function(name: str, source: bytes, path: str) -> None:
    """Load the program, call its function, and write the result; does not return.

    The result leaves as JSON on the original standard output, while prints go to /dev/null.

    Args:
        name: the function's name.
        source: the program's text.
        path: the name that tracebacks give it."""
    import marshal
    import posix
    import sys

    args, kwargs = marshal.loads(sys.stdin.buffer.read())
    channel = posix.dup(1)
    posix.dup2(posix.open("/dev/null", posix.O_WRONLY), 1)
    module = type(sys)("solution")
    sys.modules["solution"] = module
    code = compile_lazily(source, path)
    provide_names(code, module.__dict__, NAMES)
    exec(code, module.__dict__)
    solution = module.__dict__.get("Solution")
    owner = solution() if solution is not None and hasattr(solution, name) else module
    answer = encode_json(getattr(owner, name)(*args, **kwargs)).encode("utf-8", "surrogatepass")
    while answer:
        answer = answer[posix.write(channel, answer) :]
    posix._exit(0)


def provide_names(
    code: "CodeType", namespace: "dict[str, object]", names: "dict[str, str]"
) -> None:
    """Import those of `names` that `code` uses, into its `namespace`.

    Args:
        code: the compiled program.
        namespace: its globals.
        names: name → the module that provides it."""
    code_names: set[str] = set()
    pending_blocks = [code] if names else []
    while pending_blocks:
        block = pending_blocks.pop()
        code_names.update(block.co_names)
        pending_blocks += [part for part in block.co_consts if isinstance(part, type(code))]
    for name in code_names.intersection(names):
        module = __import__(names[name])
        # Another version of Python may lack the name.
        value = module if name == names[name] else getattr(module, name, None)
        if value is not None:
            namespace[name] = value


def compile_lazily(source: bytes, path: str) -> "CodeType":
    """Compile with annotations kept as text, so that `List[int]` needs no typing (10 ms)."""
    import __future__

    return compile(source, path, "exec", __future__.annotations.compiler_flag, dont_inherit=True)


def encode_json(value: object) -> str:
    """Return JSON text of JSON's types and tuples (importing the json module takes 8 ms)."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        text = float.__repr__(value)
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)
    if isinstance(value, str):
        from _json import encode_basestring_ascii

        return encode_basestring_ascii(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([encode_json(item) for item in value]) + "]"
    if isinstance(value, dict):
        pairs = [f"{encode_json(str(key))}:{encode_json(item)}" for key, item in value.items()]
        return "{" + ",".join(pairs) + "}"
    raise TypeError(f"the function returned a {type(value).__name__}, which JSON cannot hold")


start()
