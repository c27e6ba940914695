"""Quantities as text."""

import pytest

from megatron_r1.plan.quantity import Quantity


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.004, "14.4 s"), (0.25, "15 minutes"), (7.25, "7.2 hours"), (1053, "1,053 hours")],
)
def test_hours_of_a_run_have_a_unit_that_leaves_digits(hours, text):
    assert str(Quantity(hours, "hours", "")) == text
