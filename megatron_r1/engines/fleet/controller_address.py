"""Where engine hosts connect to a run: a file in its folder, while the run accepts any."""

import json
from pathlib import Path

from megatron_r1.base.files import atomic_write

ADDRESS_FILE = "controller.json"
"""The file in the folder of a run that accepts engine hosts: {"engine_hosts":
"tcp://host:port"}."""


def publish_address(folder: Path, address: str) -> None:
    """Write where engine hosts connect (tcp://host:port) into the run's folder."""
    atomic_write(folder / ADDRESS_FILE, json.dumps({"engine_hosts": address}) + "\n")


def withdraw_address(folder: Path) -> None:
    """Delete the published address, so that no engine host connects to a run that ends."""
    (folder / ADDRESS_FILE).unlink(missing_ok=True)


def published_address(folder: Path) -> str | None:
    """Return where engine hosts of this run connect to, or None while it accepts none."""
    try:
        return json.loads((folder / ADDRESS_FILE).read_text(encoding="utf-8"))["engine_hosts"]
    except FileNotFoundError:
        return None
