"""Pages of every module, class and function, from their docstrings: `python tools/docs OUT`.

Needs requirements/docs.txt; `make docs` installs it and writes build/docs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("megatron_r1", "r1_kernels", "r1_grading")


def write_pages(out: Path, packages: Sequence[str] = PACKAGES) -> int:
    """Write the pages into `out`; return how many there are."""
    import pdoc

    from megatron_r1.models import platform

    platform.prepare_process()  # before pdoc imports modules that import Megatron
    pdoc.render.configure(docformat="markdown", show_source=True)
    pdoc.pdoc(*packages, output_directory=out)
    return sum(1 for _ in out.rglob("*.html"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tools/docs", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the pages")
    out = parser.parse_args().out
    print(f"{out / 'index.html'}: {write_pages(out)} pages")
