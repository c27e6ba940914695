"""Of a test with many cases the first few run in `make test`, the others in `make test-more`:
`@pytest.mark.first_cases(N)`."""

from collections import Counter

import pytest


def mark_later_cases(items: list[pytest.Item]) -> None:
    """Mark the cases of a test after the first N, as collected, as `more`."""
    num_seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("first_cases")
        if marker is None:
            continue
        test = item.nodeid.partition("[")[0]
        num_seen[test] += 1
        if num_seen[test] > marker.args[0]:
            item.add_marker(pytest.mark.more)
