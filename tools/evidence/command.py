"""Claims and their figures: `python -m tools.evidence [status | render | measure [ID ...]]`.

status says of each claim whether the files that it depends on have changed since it was measured.
render writes docs/evidence.md from docs/evidence/*.json. measure runs the commands of the claims
named, or of all that are not fresh, the shortest first, and writes each result at once: stopped
and started again, it goes on."""

import argparse
from pathlib import Path

from tools.evidence.measure import measure_all
from tools.evidence.page import summary, write_page
from tools.evidence.records import read_claims, states

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run one of the commands; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.evidence",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="?", default="status", choices=["status", "render", "measure"]
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="claims to measure, fresh or not")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of one claim's command")
    args = parser.parse_args(arguments)
    claims = {claim.id: claim for claim in read_claims(root)}
    if missing := [name for name in args.ids if name not in claims]:
        parser.error(f"no such claim: {', '.join(missing)}; there are {', '.join(claims)}")
    status = 0
    if args.what == "measure":
        # Each result is on the page as soon as it is there, in case the next command is stopped.
        num_failed = measure_all(root, list(claims.values()), args.ids, args.limit, write_page)
        status = min(num_failed, 1)
    elif args.what == "render":
        write_page(root)
    else:
        print_status(root)
    return status


def print_status(root: Path) -> None:
    claims = read_claims(root)
    claim_states = states(root, claims)
    width = max((len(claim.id) for claim in claims), default=0)
    for claim in claims:
        state = claim_states[claim.id]
        files = ", ".join(state.changed[:3]) + (", ..." if len(state.changed) > 3 else "")
        line = f"{claim.id:{width}}  {state.text:24} {claim.seconds:6.0f} s  {files}"
        print(line.rstrip())
    print(summary(claim_states.values()))
