"""A later part of `rl.schedule` that does not fit is named by `tools/plan`."""

from pathlib import Path

from tools.plan.command import main

RECIPE = Path(__file__).parents[3] / "examples/deepseek_r1/r1_zero.yaml"


def test_a_64k_part_without_memory_is_refused_though_the_first_fits(capsys):
    assert main([str(RECIPE), "--memory-gib", "62"]) == 1
    first, _, later = capsys.readouterr().out.partition("\nfrom step 513 (")
    assert "does not fit" not in first
    assert later.startswith("rollout.max_response_tokens=65536; --step 513 shows all)")
    assert "  does not fit: an engine GPU has 3.26 GiB for KV cache" in later
    assert "one sample of 66,048 tokens needs 4.39 GiB: raise rollout.data=16" in later
