"""What a rehearsal has exercised and what not, as a table."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_r1.config import Config
from megatron_r1.files import atomic_write
from megatron_r1.rehearsal.layout import data_size
from megatron_r1.rehearsal.phases import Shown
from megatron_r1.rehearsal.recipe import Miniature

Row = tuple[str, str, str, str]
"""(what, in the recipe, in the miniature, exercised or why not)."""

YES = "yes"


def structure(recipe: Config, hf: dict, small: Miniature, verb: str) -> list[Row]:
    """Return a row for each part of the recipe's structure that its verb uses."""
    rows: list[Row] = []
    mini = small.config

    def sizes(section: str, keys: Sequence[str]) -> None:
        before, after = getattr(recipe, section), getattr(mini, section)
        for key in keys:
            old, new = getattr(before, key), getattr(after, key)
            if old > 1:
                is_kept = new > 1
                rows.append((f"{section}.{key}", f"{old:,}", f"{new}", _kept(is_kept)))

    if verb != "sample":
        sizes("parallel", ("processes", "tensor", "context", "expert", "expert_tensor"))
        sizes("parallel", ("pipeline", "virtual_pipeline"))
        before, after = data_size(recipe.parallel), data_size(mini.parallel)
        if before > 1:
            rows.append(("model replicas", f"{before:,}", str(after), _kept(after > 1)))
        if recipe.parallel.pipeline_layout:
            before, after = (str(c.parallel.pipeline_layout) for c in (recipe, mini))
            rows.append(("parallel.pipeline_layout", before, after, YES))
        if recipe.parallel.recompute != "none":
            rows.append(_same("parallel.recompute", recipe.parallel.recompute))
        if recipe.parallel.optimizer_offload:
            rows.append(_gpu("parallel.optimizer_offload", recipe.parallel.optimizer_offload))
        if hf.get("num_nextn_predict_layers"):
            rows.append(_same("model.mtp", recipe.model.mtp))
        if recipe.fp8.recipe != "none":
            rows.append(("fp8.recipe", recipe.fp8.recipe, mini.fp8.recipe, "emulated"))
    if verb in ("rl", "sample"):
        sizes("rollout", ("engines", "tensor", "data", "pipeline", "hosts_per_engine"))
        for key in ("expert_parallel", "colocated"):
            if getattr(recipe.rollout, key):
                rows.append(_same(f"rollout.{key}", True))
        if recipe.rollout.colocated:
            rows.append(("engines asleep on the trainer's GPUs", "GPU memory", "—", "needs a GPU"))
        rows.append(_same("rollout.placement", recipe.rollout.placement))
        served = [name for name, values in recipe.rewards.options.items() if "url" in values]
        for name in served:
            rows.append((f"rewards.options.{name}", "a served model", "—", "no, not served"))
    if verb == "rl":
        old, new = recipe.push.transport, mini.push.transport
        rows.append(("push.transport", old, new, YES if old == new else f"as {new}: no GPU"))
        for key in ("fp8", "delta"):
            if getattr(recipe.push, key):
                rows.append(_same(f"push.{key}", True))
        if recipe.push.memory_gib:
            rows.append(("push in windows", f"{recipe.push.memory_gib} GiB", "2 or more", YES))
        for key in ("routing_replay", "dynamic_sampling"):
            if getattr(recipe.rl, key):
                rows.append(_same(f"rl.{key}", True))
        sizes("rl", ("group_size", "minibatches", "staleness"))
        rows.append(_same("rl.algorithm", recipe.rl.algorithm))
        if recipe.teacher.url:
            rows.append(("teacher.url", "served elsewhere", "started by the run", "no, not served"))
    length = f"{recipe.rollout.max_response_tokens:,} tokens"
    rows.append(("length of a response", length, f"{mini.rollout.max_response_tokens}", "no"))
    rows.append(("layers computed by", "Transformer Engine", "Megatron-Core's own", "needs a GPU"))
    return rows


def _kept(is_kept: bool) -> str:
    return YES if is_kept else "no: too many ranks for this machine"


def _same(what: str, value: object) -> Row:
    return what, str(value), str(value), YES


def _gpu(what: str, value: object) -> Row:
    return what, str(value), str(value), "needs a GPU"


def write(
    folder: Path, title: str, rows: Sequence[Row], shown: Sequence[Shown], small: Miniature
) -> None:
    """Print the tables and write them to `rehearsal.json` and `rehearsal.md`."""
    console = Console(width=140, highlight=False)
    phases = Table("phase", "what it has shown", "seconds", title=f"rehearsal of {title}")
    for phase in shown:
        phases.add_row(phase.phase, phase.evidence, f"{phase.seconds:.0f}")
    parts = Table("structure", "recipe", "miniature", "exercised")
    for row in rows:
        parts.add_row(*row)
    console.print(phases, parts)
    found = {
        "recipe": title,
        "phases": [vars(phase) for phase in shown],
        "structure": [
            dict(zip(("what", "recipe", "miniature", "exercised"), r, strict=True)) for r in rows
        ],
        "changes": [
            dict(zip(("what", "recipe", "miniature", "why"), c, strict=True)) for c in small.changes
        ],
    }
    atomic_write(folder / "rehearsal.json", json.dumps(found, indent=1))
    atomic_write(folder / "rehearsal.md", _markdown(title, rows, shown))
    print(f"{folder / 'rehearsal.md'}; every changed setting is in rehearsal.json beside it")


def _markdown(title: str, rows: Sequence[Row], shown: Sequence[Shown]) -> str:
    lines = [f"# Rehearsal of {title}", "", "| phase | shown | seconds |", "|---|---|---|"]
    lines += [f"| {p.phase} | {p.evidence} | {p.seconds:.0f} |" for p in shown]
    lines += ["", "| structure | recipe | miniature | exercised |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row).replace("|t", "\\|t") + " |" for row in rows]
    return "\n".join(lines) + "\n"
