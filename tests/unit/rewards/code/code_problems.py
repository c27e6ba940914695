"""Problems in the manner of LiveCodeBench and Codeforces, with answers that are right and wrong."""

PROBLEMS = {
    "largest sum of a run (stdin)": {
        "truth": {
            "tests": [
                {"stdin": "5\n1 -2 3 4 -1\n", "stdout": "7\n"},
                {"stdin": "1\n-5\n", "stdout": "-5\n"},
                {"input": "3\n-2 -1 -3\n", "output": "-1"},
            ]
        },
        "right": {
            "python": """
import sys
def main():
    data = sys.stdin.buffer.read().split()
    best, run = None, 0
    for x in map(int, data[1:]):
        run = max(run + x, x)
        best = run if best is None else max(best, run)
    sys.stdout.write(str(best))
if __name__ == "__main__":
    main()
    exit()
""",
            "cpp": """
#include <bits/stdc++.h>
using namespace std;
int main() {
    int n; cin >> n;
    long long best = LLONG_MIN, run = 0;
    for (int i = 0; i < n; i++) {
        long long x; cin >> x; run = max(run + x, x); best = max(best, run);
    }
    cout << best << "\\n";
}
""",
        },
        # The empty run, which the problem does not allow.
        "wrong": {
            "python": """
input()
best = run = 0
for x in map(int, input().split()):
    run = max(run + x, 0)
    best = max(best, run)
print(best)
""",
            "cpp": """
#include <iostream>
int main() {
    int n; std::cin >> n;
    long long best = 0, run = 0, x;
    while (std::cin >> x) { run = std::max(run + x, 0LL); best = std::max(best, run); }
    std::cout << best;
}
""",
        },
        "failing": (2, 3),
    },
    "pair with a sum (functional)": {
        "truth": {
            "function": "twoSum",
            "tests": [
                {"input": "[2, 7, 11, 15]\n9", "output": "[0, 1]"},
                {"args": [[3, 2, 4]], "kwargs": {"target": 6}, "result": [1, 2]},
                {"input": "[3, 3]\n6\n", "output": "[0, 1]"},
            ],
        },
        "right": {
            "python": """
class Solution:
    def twoSum(self, nums: List[int], target: int) -> List[int]:
        seen = defaultdict(int)
        for i, x in enumerate(nums):
            if target - x in seen:
                print("debugging", i)
                return (seen[target - x], i)
            seen[x] = i
""",
        },
        "wrong": {
            "python": """
def twoSum(nums, target):
    return [nums.index(next(x for x in nums if target - x in nums)), nums.index(target - nums[0])]
""",
        },
        "failing": (2, 3),
    },
    "any two numbers with a product (checker)": {
        "truth": {
            "tests": [{"stdin": "12\n", "stdout": "3 4"}, {"stdin": "97\n"}],
            "checker": """
import json, sys
n, expected, actual = (open(path).read().split() for path in sys.argv[1:])
right = len(actual) == 2 and all(x.isdigit() for x in actual)
right = right and int(actual[0]) * int(actual[1]) == int(n[0])
print(json.dumps({"score": int(right), "reason": "a product" if right else "no such product"}))
""",
        },
        "right": {
            "python": "n = int(input())\nd = next(d for d in range(2, n + 1) if n % d == 0)\n"
            "print(n // d)\nprint(d)",
            "cpp": '#include <cstdio>\nint main() { int n; scanf("%d", &n); printf("1 %d", n); }',
        },
        "wrong": {
            "python": "n = int(input())\nprint(2, n // 2)",
            "cpp": "#include <cstdio>\n"
            'int main() { int n; scanf("%d", &n); printf("3 %d", n / 3); }',
        },
        "failing": (2,),
    },
    "a permutation without fixed points (checker by exit status)": {
        "truth": {
            "tests": [{"stdin": "4"}, {"stdin": "7"}],
            "checker": """
import sys
n = int(open(sys.argv[1]).read())
p = [int(x) for x in open(sys.argv[3]).read().split()]
if sorted(p) != list(range(1, n + 1)):
    sys.exit("not a permutation")
sys.exit(2 if any(i == x for i, x in enumerate(p, 1)) else 0)
""",
        },
        "right": {
            "python": "n = int(input())\nprint(*range(2, n + 1), 1)",
            "cpp": "#include <iostream>\nint main() { int n; std::cin >> n; std::cout << n << ' ';"
            " for (int i = 1; i < n; i++) std::cout << i << std::endl; }",
        },
        # Reversed: right for an even n.
        "wrong": {
            "python": "n = int(input())\nprint(*range(n, 0, -1))",
            "cpp": "#include <iostream>\nint main() { int n; std::cin >> n;"
            " for (; n; n--) std::cout << n << ' '; }",
        },
        "failing": (2,),
    },
    "a mean (tolerance)": {
        "truth": {
            "tolerance": 1e-6,
            "tests": [
                {"stdin": "3\n1 2 2\n", "stdout": "mean 1.6666666667"},
                {"stdin": "2\n1 3", "stdout": "mean 2"},
            ],
        },
        "right": {
            "python": "n = int(input())\nprint('mean', sum(map(int, input().split())) / n)",
            "cpp": '#include <cstdio>\nint main() { int n, x; double s = 0; scanf("%d", &n);'
            ' for (int i = 0; i < n; i++) { scanf("%d", &x); s += x; }'
            ' printf("mean %.9f\\n", s / n); }',
        },
        "wrong": {
            "python": "n = int(input())\nprint('mean', sum(map(int, input().split())) // n)",
            "cpp": '#include <cstdio>\nint main() { int n, x, s = 0; scanf("%d", &n);'
            ' for (int i = 0; i < n; i++) { scanf("%d", &x); s += x; }'
            ' printf("mean %d\\n", s / n); }',
        },
        "failing": (1,),
    },
    "several lines": {
        "truth": {"tests": [{"stdin": "3", "stdout": "1\n1 2\n1 2 3\n"}]},
        "right": {
            "python": "for n in range(int(input())):\n    for k in range(n + 1):\n"
            "        print(k + 1, end=' ')\n    print()\nprint()",
            "cpp": "#include <iostream>\nint main() { int n; std::cin >> n;"
            " for (int i = 1; i <= n; i++) { for (int k = 1; k <= i; k++) std::cout << k << ' ';"
            " std::cout << '\\n'; } }",
        },
        "wrong": {
            "python": "print(1, 1, 2, 1, 2, 3)",
            "cpp": '#include <cstdio>\nint main() { puts("1\\n\\n1 2\\n1 2 3"); }',
        },
        "failing": (1,),
    },
}
