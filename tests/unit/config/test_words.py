"""Words of other libraries: each leads to keys and pages that are there."""

from pathlib import Path

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands import cli
from megatron_r1.config import Config
from megatron_r1.config.key_aliases import ALIASES, find_aliases
from megatron_r1.config.keys import dotted_keys
from megatron_r1.config.recipe_files import parse_recipe

DOCS = Path(__file__).parents[3] / "docs"
SEARCHED = {
    "overlong filtering": "rl.truncated",
    "TIS": "rl.importance_cap",
    "mismatch": "rl.importance_cap",
    "kl_coef": "rl.kl_beta",
    "KL-free": "rl.kl_beta",
    "max_new_tokens": "rollout.max_response_tokens",
    "7B on 8 GPUs": "parallel.processes",
    "pass@1 on AIME": "eval.benchmarks",
    "algorithm.kl_ctrl.kl_coef": "rl.kl_beta",
    "--n-samples-per-prompt": "rl.group_size",
    "num_generations": "rl.group_size",
    "deepspeed": "parallel.optimizer_offload",
    "nucleus": None,
    "seed of prompt sampling": "run.seed",
    "tokens drafted": "rollout.speculative.tokens",
}


@pytest.mark.first_cases(3)
@pytest.mark.parametrize(("word", "key"), SEARCHED.items())
def test_a_word_that_people_search_for_leads_to_a_key(capsys, word, key):
    arguments = ["keys", *word.split()]
    if key is None:
        with refused(word, Cause.UNKNOWN):
            cli._dispatch_command(arguments)
        return
    assert cli.main(arguments) == 0
    assert any(line.startswith(f"{key}:") for line in capsys.readouterr().out.splitlines())


def test_every_row_names_keys_and_pages_that_are_there():
    known = {key for key, _ in dotted_keys(Config)}
    assert {key for word in ALIASES for key in word.keys} <= known
    assert all((DOCS / word.page).is_file() for word in ALIASES if word.page)
    assert sum(len(word.names) for word in ALIASES) >= 60
    assert all(find_aliases(name, exact=True) for word in ALIASES for name in word.names)


def alias_table() -> str:
    """Return all rows as a table in Markdown, for docs/keys.md."""
    lines = ["| elsewhere | here | |", "|---|---|---|"]
    for row in ALIASES:
        page = f"[{row.page.removesuffix('.md')}]({row.page})" if row.page else ""
        keys = ", ".join(f"`{key}`" for key in row.keys)
        rest = ". ".join(filter(None, (row.note, page)))
        lines.append(f"| {', '.join(row.names)} | {keys} | {rest} |")
    return "\n".join(lines)


def test_the_page_has_the_table():
    assert alias_table() in (DOCS / "keys.md").read_text(encoding="utf-8")


def test_a_key_of_another_library_in_a_recipe_is_refused_with_ours():
    with refused("rl.num_generations", Cause.UNKNOWN, "rl.group_size"):
        parse_recipe({"rl": {"num_generations": 8}})
    with refused("rollout.max_new_tokens", Cause.UNKNOWN, "rollout.max_response_tokens"):
        parse_recipe({"rollout": {"max_new_tokens": 8}})
