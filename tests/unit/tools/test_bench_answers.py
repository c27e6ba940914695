"""`tools/bench answers`: counted by hand for pairs whose labels both graders are sure of."""

import argparse
import json

from tools.bench import answers

PAIRS = [
    {"truth": "1/2", "answer": "0.5", "reward": 1},
    {"truth": "13", "answer": "12", "reward": 0},
    {"truth": "13", "answer": "13", "reward": 0},  # mislabelled: both accept it
    {"truth": "x^2 - 1", "answer": "(x+1)(x-1)", "reward": 1},
    {"truth": "13", "answer": "14", "reward": 1},  # mislabelled: both reject it
]


def test_right_verdicts_and_accepted_mistakes_are_counted(tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, PAIRS)))
    result = answers.run(argparse.Namespace(file=file, plain=False, show=True))
    counts = {"right": 3, "accepted_although_wrong": 1}
    assert result == {"pairs": 5, "plain": False, "math": counts, "math-verify": counts}
    shown = [line for line in capsys.readouterr().out.splitlines() if "label" in line]
    assert [line.strip() for line in shown] == [
        "label 0: '13' for '13'",
        "label 1: '14' for '13'",
    ]
