"""`python -m examples.paper [--seeds 0,1,2] [--folder runs/paper] [--only TABLE]`: the paper's
tables with small models.

Runs the unfinished stages of paper.yaml, then writes docs/paper.md: a few hours for three seeds on
two cores. The same command continues a stopped run. Unknown options, such as --pipeline.rerun true,
are passed to `megatron-r1 pipeline`."""

import argparse
import sys
from pathlib import Path

from examples.paper import tables
from examples.paper.page import write_page
from examples.paper.tables import Results
from megatron_r1.base.errors import UserError
from megatron_r1.commands import cli
from megatron_r1.pipeline.pipeline_recipe import load_pipeline

RECIPE = Path(__file__).with_name("paper.yaml")


def main(arguments: list[str] | None = None) -> int:
    published = tables.load_tables()
    options = argparse.ArgumentParser(prog="python -m examples.paper", description=__doc__)
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--folder", type=Path, default=Path("runs/paper"))
    options.add_argument("--only", choices=published.tables, help="run what this table needs")
    options.add_argument("--page", type=Path, default=Path("docs/paper.md"))
    options.add_argument("--page-only", action="store_true", help="run nothing: of what is done")
    chosen, pipeline_options = options.parse_known_args(arguments)

    common = [str(RECIPE), "--pipeline.folder", str(chosen.folder)]
    common += ["--pipeline.seeds", chosen.seeds, *pipeline_options]
    stages = needed_stages(published.tables[chosen.only]) if chosen.only else [None]
    status = 0
    for stage in [] if chosen.page_only else stages:
        until = ["--pipeline.until", stage] if stage else []
        if status := cli.main(["pipeline", *common, *until]):
            break
    try:
        results = Results.read(chosen.folder / "report.json")
    except UserError as error:
        print(f"no page to write: {error}", file=sys.stderr)
        return status or 2
    for file in write_page(chosen.page, published, results):
        print(file)
    return status


def needed_stages(table: tables.PaperTable) -> list[str]:
    """Return the stages whose figures a table shows and those that evaluate them, in the recipe's
    order."""
    recipe = load_pipeline(RECIPE)
    return [
        name
        for name, stage in recipe.stages.items()
        if name in table.stages or stage.evaluates in table.stages
    ]


if __name__ == "__main__":
    sys.exit(main())
