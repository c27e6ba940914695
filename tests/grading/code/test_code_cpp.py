"""C++ answers: honest ones, and those that go for the compiler or the sandbox."""

import uuid

import pytest
from code_answers import NAP, PATIENT, SPIN, attack, fenced, named_sandboxes, needs_compiler
from r1_grading import Grade, code

pytestmark = needs_compiler
SUM = {"tests": [{"stdin": "2 3\n", "stdout": "5"}, {"stdin": "-7 3", "stdout": "-4\n"}]}
HEADER = "#include <cstdio>\n#include <cstdlib>\n#include <unistd.h>\n#include <sys/syscall.h>\n"


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    with named_sandboxes(f"test-{uuid.uuid4().hex}"):
        yield


def grade(program: str, truth: dict = SUM, **fields: object) -> Grade:
    return code.grade(fenced(program, "cpp"), truth, language="cpp", limits=PATIENT, **fields)


def main(body: str) -> str:
    return f"{HEADER}int main() {{ {body} }}"


PAID = main('puts("42");')


def contained(program: str, *reasons: str, **fields: object) -> None:
    verdict = attack(program, language="cpp", **fields)
    assert verdict.reward == 0.0, verdict.reason
    assert any(reason in verdict.reason for reason in reasons), verdict.reason


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (main('int a, b; scanf("%d %d", &a, &b); printf("%d", a - b);'), "-1"),
        (
            main('int a, b; scanf("%d %d", &a, &b); printf("%d", a + abs(b) + (a < 0))'),
            "main.cpp:5:",
        ),
        (main("return 3;"), "exit status 3"),
        (main("volatile int *p = 0; *p = 1;"), "segmentation fault"),
        (main("volatile int x = 0; return 7 / x;"), "arithmetic error"),
        (main("abort();"), "abort"),
        ("int main(", "main.cpp:1:"),
        ("", "no program"),
        ("int f() { return 1; }", "does not compile"),
        ("#include <vector>\n" + main("for (std::vector<int> v;;) v.resize(1 << 30);"), "memory"),
    ],
)
def test_wrong_programs_get_0_and_the_reason(program, reason):
    verdict = grade(program)
    assert verdict.reward == 0.0 and reason in verdict.reason, verdict.reason


def test_a_failure_on_a_later_test_counts_and_partial_credit_is_a_setting():
    only_positive = main('int a, b; scanf("%d %d", &a, &b); printf("%d", abs(a) + abs(b));')
    assert grade(only_positive).reward == 0.0
    assert grade(only_positive, partial=True).reward == 0.5


def test_the_standard_is_a_setting():
    program = "#include <concepts>\n" + main('puts(std::integral<int> ? "42" : "0");')
    assert attack(program, language="cpp", standard="c++20").reward == 1.0
    contained(program, "does not compile", standard="c++17")


def test_deep_recursion_has_a_stack():
    depth = "int f(int n, volatile char *above) { volatile char here[64]; here[0] = n; "
    depth += "return n ? f(n - 1, here) + 1 + 0 * above[0] : 0; }\n"
    deep = depth + main('char x = 0; printf("%d", f(3000000, &x) == 3000000 ? 42 : 0);')
    assert attack(deep, language="cpp").reward == 1.0
    endless = depth + main('char x = 0; printf("%d", f(1 << 30, &x));')
    contained(endless, "segmentation fault")


@pytest.mark.parametrize(
    "header",
    [
        *("/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/environ", "/root/.bashrc"),
        *(code.__file__, __file__),
    ],
)
def test_files_of_the_host_cannot_be_compiled_in(header):
    contained(f'#include "{header}"\n{PAID}', "No such file")
    contained(f'asm(".incbin \\"{header}\\"");\n{PAID}', "file not found", "does not compile")


ENDLESS = {
    "a file that includes itself twice": '#include "main.cpp"\n#include "main.cpp"\n',
    "templates": "template <int N, int M> struct A { static const long v ="
    " A<N - 1, 2 * M>::v + A<N - 1, 2 * M + 1>::v; };\n"
    "template <int M> struct A<0, M> { static const long v = M; };\n"
    "int main() { return A<28, 0>::v; }",
    "macros": "".join(f"#define M{n} M{n - 1} M{n - 1}\n" for n in range(1, 40))
    + "#define M0 0 +\nint main() { return M39 0; }",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_compilation_has_limits_of_its_own(name):
    limits = {**PATIENT, "compile_seconds": 2, "compile_memory_mib": 256}
    contained(ENDLESS[name], "does not compile", limits=limits)


def test_a_huge_program_is_not_made():
    contained("char x[2000000000] = {1};\n" + PAID, "does not compile")
    contained(PAID + "\n//" + "x" * 300_000, "too long")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param("for (;;) fork();", "1 s of CPU", marks=pytest.mark.more),
        ('if (fork() < 0) return 9; puts("42");', "exit status 9"),
        ('if (vfork() < 0) return 9; puts("42");', "exit status 9"),
        ('if (system("echo 42")) return 9;', "exit status 9"),
        ('if (!fopen("/etc/passwd", "r")) return 9; puts("42");', "exit status 9"),
        ('if (!fopen("/usr/lib/x", "w")) return 9; puts("42");', "exit status 9"),
        ('if (syscall(SYS_ptrace, 0, 0, 0, 0) < 0) return 9; puts("42");', "exit status 9"),
        ('if (syscall(SYS_clone3, 0, 0) < 0) return 9; puts("42");', "exit status 9"),
        ('if (syscall(SYS_socket, 2, 1, 0) < 0) return 9; puts("42");', "exit status 9"),
        ('for (;;) puts("42");', "output limit"),
        ("for (;;) *(volatile char *)malloc(1 << 20) = 1;", "segmentation fault"),
    ],
)
def test_compiled_programs_are_contained(body, reason):
    contained(main(body), reason, limits=SPIN)


def test_another_instruction_set_s_system_calls_end_the_program():
    body = 'int r; asm volatile("int $0x80" : "=a"(r) : "a"(20)); puts("42");'
    contained(main(body), "forbidden system call", "segmentation fault")


def test_a_compiled_program_is_not_left_waiting():
    body = 'puts("42"); fclose(stdout); fclose(stderr); sleep(1000);'
    contained(main(body), "1 s", limits=NAP)
