"""Pages of every module, class and function, from their docstrings: `python tools/docs OUT`.

Needs requirements/docs.txt; `make docs` installs it and writes build/docs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

from megatron_r1 import platform

PACKAGES = ("megatron_r1", "r1_kernels")


def main(out: Path) -> None:
    platform.prepare()  # what imports Megatron imports then
    pdoc.render.configure(docformat="markdown", show_source=True)
    pdoc.pdoc(*PACKAGES, output_directory=out)
    print(f"{out / 'index.html'}: {sum(1 for _ in out.rglob('*.html'))} pages")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/docs OUT_FOLDER")
    main(Path(sys.argv[1]))
